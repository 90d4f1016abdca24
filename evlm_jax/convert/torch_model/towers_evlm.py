"""The towers of EVLM in PyTorch: a ViT by choices (DINOv2, CLIP, SigLIP, EVA02-CLIP-E) and a
decoder (Llama, Qwen).
"""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


FORMER = {"qk_norm": "none"}  # what the exports compute that were made before there was a field


class Config:
    """A section of the configuration, its fields as attributes."""

    def __init__(self, fields: dict):
        self.__dict__.update(FORMER | fields)


def call(module, *args):
    """How a block is run; training with gradient checkpoints has another way."""
    return module(*args)


def split_heads(x, head_dim):
    """[..., T, N * H] -> [..., N, T, H]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def attend(q, k, v, mask=None, sdpa=False):
    """q [B, N, T, H], k and v [B, K, S, H] with K dividing N, mask [B, 1, T, S] -> [B, T, N * H],
    and weights [B, N, T, S].

    Written out, with its softmax in float32; or by PyTorch's own operation, which keeps no weights
    (None). Where a query sees nothing at all, both give it the mean of all values.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (a.repeat_interleave(group, dim=1) for a in (k, v))
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        q, mask = q.masked_fill(blind, 0), mask | blind
    if sdpa and k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2), None
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    weights = scores.softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2), weights


# ------------------------------------------------------------------------------------- vision tower


class MLP(nn.Module):
    """Two matrices around an activation."""

    def __init__(self, width, hidden, activation, bias):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        return self.fc2(self.activation(self.fc1(x)))


class VisionAttention(nn.Module):
    """Attention within one image; `bias` "qv" leaves the keys without."""

    def __init__(self, cfg):
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(cfg.width, cfg.width) for _ in range(3))
        self.k = nn.Linear(cfg.width, cfg.width, bias=cfg.bias == "all")
        self.head_dim = cfg.width // cfg.heads

    def forward(self, x, sdpa=False):
        """x [n, S, V] -> [n, S, V]."""
        return self.o(
            attend(
                *(split_heads(project(x), self.head_dim) for project in (self.q, self.k, self.v)),
                sdpa=sdpa,
            )[0]
        )


class VisionBlock(nn.Module):
    """norm "pre": x + f(norm(x)); "res_post": x + norm(f(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.width, cfg.eps) for _ in range(2))
        self.attn, self.mlp = VisionAttention(cfg), MLP(cfg.width, cfg.mlp, cfg.activation, True)
        self.scale1, self.scale2 = (
            nn.Parameter(torch.ones(cfg.width)) if cfg.layer_scale else None for _ in range(2)
        )
        self.pre = cfg.norm == "pre"

    def forward(self, x, sdpa=False):
        """x [n, S, V] -> [n, S, V]."""

        def attention(y):
            return self.attn(y, sdpa)

        for f, norm, scale in (
            (attention, self.norm1, self.scale1),
            (self.mlp, self.norm2, self.scale2),
        ):
            y = f(norm(x)) if self.pre else norm(f(x))
            x = x + (y if scale is None else y * scale)
        return x


class Places(nn.Module):
    """Patches [n, S, V] with their positions, behind the class token and the registers."""

    def __init__(self, cfg):
        super().__init__()
        grid = cfg.image_size // cfg.patch
        self.cls = nn.Parameter(torch.zeros(cfg.width)) if cfg.class_token else None
        self.registers = (
            nn.Parameter(torch.zeros(cfg.registers, cfg.width)) if cfg.registers else None
        )
        self.pos = nn.Parameter(torch.zeros(grid**2 + cfg.class_token, cfg.width))

    def forward(self, patches):
        parts, repeat = (
            [patches + self.pos[-patches.shape[1] :]],
            lambda tokens: tokens.expand(len(patches), -1, -1),
        )
        if self.registers is not None:
            parts.insert(0, repeat(self.registers))
        if self.cls is not None:
            parts.insert(0, repeat(self.cls + self.pos[:1]))
        return torch.cat(parts, 1)


class ViT(nn.Module):
    """pixels [n, 3, h, w], normalised -> taps [n, G, S, V];
    no block above the highest tap exists.
    """

    def __init__(self, cfg):
        super().__init__()
        self.places = Places(cfg)
        self.patch = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch, bias=cfg.patch_bias)
        self.embed_norm = nn.LayerNorm(cfg.width, cfg.eps) if cfg.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(max(cfg.taps)))
        self.taps = cfg.taps

    def forward(self, pixels, run=call, sdpa=False):
        """pixels [n, 3, h, w] -> taps [n, G, S, V]."""
        patches = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x, taps = self.embed_norm(self.places(patches)), []
        for number, block in enumerate(self.blocks, 1):
            x = run(block, x, sdpa)
            if number in self.taps:
                taps.append(x)
        return torch.stack(taps, 1)


# ----------------------------------------------------------------------------------- language model


class RMSNorm(nn.Module):
    """RMSNorm in float32; cast before the scale, as Llama and Qwen do."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


class SelfAttention(nn.Module):
    """Projections, rotary positions and the cache around `attend`."""

    def __init__(self, cfg):
        super().__init__()
        n, k = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = nn.Linear(cfg.hidden, n, bias=cfg.qkv_bias)
        self.k, self.v = (nn.Linear(cfg.hidden, k, bias=cfg.qkv_bias) for _ in range(2))
        self.o = nn.Linear(n, cfg.hidden, bias=False)
        self.head_dim, self.qk_norm = cfg.head_dim, cfg.qk_norm
        widths = {"none": (), "head": (cfg.head_dim,) * 2, "all": (n, k)}[cfg.qk_norm]
        self.q_norm, self.k_norm = [RMSNorm(width, cfg.eps) for width in widths] or (None, None)

    def forward(self, x, rope, mask, cache, layer, sdpa):
        cos, sin, scale = rope

        def rotate(a):
            low, high = a.float().chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(a.dtype)

        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (split_heads(a, self.head_dim) for a in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q), rotate(k)
        if scale is not None:
            q = (q * scale).to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        out, weights = attend(q, k, v, mask, sdpa)
        return self.o(out), weights


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.gate, self.up = (nn.Linear(cfg.hidden, cfg.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(cfg.mlp, cfg.hidden, bias=False)

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm decoder layer; returns x, and the weights of its attention where they are computed
    eagerly.
    """

    def __init__(self, cfg):
        super().__init__()
        self.ln1, self.ln2 = (RMSNorm(cfg.hidden, cfg.eps) for _ in range(2))
        self.attn, self.mlp = SelfAttention(cfg), GatedMLP(cfg)

    def forward(self, x, rope, mask, cache, layer, sdpa):
        out, weights = self.attn(self.ln1(x), rope, mask, cache, layer, sdpa)
        x = x + out
        return x + self.mlp(self.ln2(x)), weights


class LLM(nn.Module):
    """Embedding, layers, last norm and head; they are run by EVLM, with cross-attention between the
    layers. Who makes it ties the head.
    """

    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab, cfg.hidden)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.ln_f = RMSNorm(cfg.hidden, cfg.eps)
        self.head = nn.Linear(cfg.hidden, cfg.vocab, bias=False)
