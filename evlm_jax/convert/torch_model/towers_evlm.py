"""The towers of EVLM in PyTorch, by choices: a ViT (DINOv2, CLIP, SigLIP and others) and a
decoder (Llama, Qwen, Gemma and others).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

FORMER = {  # what exports compute that were made before there was a field
    "gated": False,
    "norm_kind": "layer",
    "patch_norm": False,
    "rotary": 0.0,
    "qk_norm": "none",
    "norms": "pre",
    "window": [0],
    "rope": [],
    "rope_scaling": None,
    "rotary_share": 1.0,
    "scales": {
        "embedding": 1.0,
        "residual": 1.0,
        "query": 0.0,
        "logits": 1.0,
        "score_cap": 0.0,
        "logit_cap": 0.0,
    },
    "activation": "silu",
    "first": 0,
    "kv_norm": True,
    "gate": "tanh",
}


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


def attend(q, k, v, mask=None, sdpa=False, scale=0.0, cap=0.0):
    """q [B, N, T, H], k and v [B, K, S, H] with K dividing N, mask [B, 1, T, S] -> [B, T, N * H],
    and weights [B, N, T, S].

    Written out, with its softmax in float32; or by PyTorch's own operation, which keeps no weights
    (None) and has no cap. Where a query sees nothing at all, both give it the mean of all values.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (a.repeat_interleave(group, dim=1) for a in (k, v))
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        q, mask = q.masked_fill(blind, 0), mask | blind
    scale = scale or q.shape[-1] ** -0.5
    if sdpa and k.shape[2] and not cap:
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return out.transpose(1, 2).flatten(2), None
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if cap:
        scores = cap * (scores / cap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    weights = scores.softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2), weights


# ------------------------------------------------------------------------------------- vision tower


class MLP(nn.Module):
    """Two matrices around an activation; gated, a third beside the first."""

    def __init__(self, width, hidden, activation, bias, gated=False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
        self.up = nn.Linear(width, hidden, bias) if gated else None
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        y = self.activation(self.fc1(x))
        return self.fc2(y if self.up is None else y * self.up(x))


class VisionAttention(nn.Module):
    """Attention within one image; `bias` says which matrices have one."""

    def __init__(self, cfg):
        super().__init__()
        biased = {"all": "qkvo", "qv": "qvo", "out": "o"}.get(cfg.bias, "")
        for x in "qkvo":
            self.add_module(x, nn.Linear(cfg.width, cfg.width, bias=x in biased))
        self.q_norm, self.k_norm = (
            nn.RMSNorm(cfg.width, cfg.eps) if cfg.qk_norm == "all" else nn.Identity() for _ in "qk"
        )
        self.head_dim, self.cfg = cfg.width // cfg.heads, cfg

    def forward(self, x, sdpa=False):
        """x [n, S, V] -> [n, S, V]."""
        q, k = self.q_norm(self.q(x)), self.k_norm(self.k(x))
        q, k, v = (split_heads(a, self.head_dim) for a in (q, k, self.v(x)))
        if self.cfg.rotary:
            q, k = self._turned(q, k)
        return self.o(attend(q, k, v, sdpa=sdpa)[0])

    def _turned(self, *arrays):
        """[n, N, S, H] with patches turned by their places, -1..1 down and across."""
        cfg, how = self.cfg, {"device": arrays[0].device, "dtype": torch.float32}
        centres = [(2 * torch.arange(count, **how) + 1) / count - 1 for count in grid(cfg)]
        places = torch.cartesian_prod(*centres)
        frequency = 2 * math.pi / cfg.rotary ** torch.arange(0, 1, 4 / self.head_dim, **how)
        angle = (places[:, :, None] * frequency).flatten(1)
        for a in arrays:
            before, patches = a[:, :, : -len(places)], a[:, :, -len(places) :].float()
            low, high = patches.chunk(2, -1)
            turned = [
                low * angle.cos() - high * angle.sin(),
                high * angle.cos() + low * angle.sin(),
            ]
            yield torch.cat([before, torch.cat(turned, -1).to(a.dtype)], 2)


def sides(size):
    """Height and width; a number is both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def grid(cfg):
    """Patches down and across."""
    height, width = sides(cfg.image_size)
    return height // cfg.patch, width // cfg.patch


def make_norm(cfg):
    """A norm of the residual stream."""
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[cfg.norm_kind](cfg.width, cfg.eps)


class VisionBlock(nn.Module):
    """norm "pre": x + f(norm(x)); "res_post": x + norm(f(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.norm2 = make_norm(cfg), make_norm(cfg)
        self.attn, self.mlp = (
            VisionAttention(cfg),
            MLP(cfg.width, cfg.mlp, cfg.activation, cfg.bias != "none", cfg.gated),
        )
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
        down, across = grid(cfg)
        self.cls = nn.Parameter(torch.zeros(cfg.width)) if cfg.class_token else None
        self.registers = (
            nn.Parameter(torch.zeros(cfg.registers, cfg.width)) if cfg.registers else None
        )
        size = (down * across + cfg.class_token, cfg.width)
        self.pos = None if cfg.rotary else nn.Parameter(torch.zeros(size))

    def forward(self, patches):
        parts, repeat = (
            [patches if self.pos is None else patches + self.pos[-patches.shape[1] :]],
            lambda tokens: tokens.expand(len(patches), -1, -1),
        )
        if self.registers is not None:
            parts.insert(0, repeat(self.registers))
        if self.cls is not None:
            parts.insert(0, repeat(self.cls[None] if self.pos is None else self.cls + self.pos[:1]))
        return torch.cat(parts, 1)


class ViT(nn.Module):
    """pixels [n, 3, h, w], normalised -> taps [n, G, S, V];
    no block above the highest tap exists.
    """

    def __init__(self, cfg):
        super().__init__()
        self.places = Places(cfg)
        self.patch = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch, bias=cfg.patch_bias)
        self.patch_norm = make_norm(cfg) if cfg.patch_norm else nn.Identity()
        self.embed_norm = make_norm(cfg) if cfg.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(max(cfg.taps)))
        self.taps = cfg.taps

    def forward(self, pixels, run=call, sdpa=False):
        """pixels [n, 3, h, w] -> taps [n, G, S, V]."""
        patches = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x, taps = self.embed_norm(self.places(self.patch_norm(patches))), []
        for number, block in enumerate(self.blocks, 1):
            x = run(block, x, sdpa)
            if number in self.taps:
                taps.append(x)
        return torch.stack(taps, 1)


# ----------------------------------------------------------------------------------- language model


class RMSNorm(nn.Module):
    """RMSNorm in float32; cast before the scale, as Llama and Qwen do. Gemma scales by 1 + weight,
    then casts.
    """

    def __init__(self, width, cfg):
        super().__init__()
        self.eps, self.plus_one = cfg.eps, cfg.norms.endswith("+1")
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.plus_one))

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (y * (1 + self.weight.float())).to(x.dtype)
        return y.to(x.dtype) * self.weight


def frequencies(cfg, base, scaled, device):
    """What the first dimensions of a head turn by a position, [r/2], and the factor on cos and sin.
    `base` 0 turns nothing; [B, 1, 1, 1] is one for each row.
    """
    width = int(cfg.head_dim * cfg.rotary_share)
    number = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    if isinstance(base, (int, float)) and not base:
        return torch.zeros_like(number), 1.0
    plain = base ** (-number / width)
    if not scaled:
        return plain, 1.0
    s = Config(cfg.rope_scaling)
    if s.kind == "dynamic":  # the base has grown instead
        return plain, s.attention
    if s.kind == "linear":
        return plain / s.factor, s.attention
    if s.kind == "llama3":
        kept = (s.original * plain / (2 * math.pi) - s.slow) / (s.fast - s.slow)
    else:  # yarn
        first, last = (
            width * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (s.fast, s.slow)
        )
        first, last = (math.floor(first), math.ceil(last)) if s.truncate else (first, last)
        first, last = max(first, 0), min(last, width - 1)
        kept = 1 - (number / 2 - first) / (last - first or 0.001)
    kept = kept.clamp(0, 1)
    return plain * kept + plain / s.factor * (1 - kept), s.attention


def growth(cfg, length):
    """What the rotary base is multiplied by in a text of `length` tokens, where it is dynamic."""
    factor, width = cfg.rope_scaling["factor"], int(cfg.head_dim * cfg.rotary_share)
    times = (length / cfg.rope_scaling["original"]).clamp(min=1)
    return (factor * times - (factor - 1)) ** (width / (width - 2))


class SelfAttention(nn.Module):
    """Projections, rotary positions and the cache around `attend`."""

    def __init__(self, cfg):
        super().__init__()
        n, k = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = nn.Linear(cfg.hidden, n, bias=cfg.qkv_bias)
        self.k, self.v = (nn.Linear(cfg.hidden, k, bias=cfg.qkv_bias) for _ in range(2))
        self.o = nn.Linear(n, cfg.hidden, bias=False)
        self.head_dim, self.qk_norm = cfg.head_dim, cfg.qk_norm
        self.scale, self.cap = cfg.scales["query"], cfg.scales["score_cap"]
        widths = {"none": (), "head": (cfg.head_dim,) * 2, "all": (n, k)}[cfg.qk_norm]
        self.q_norm, self.k_norm = [RMSNorm(width, cfg) for width in widths] or (None, None)

    def forward(self, x, rope, mask, cache, layer, sdpa):
        cos, sin, scale = rope

        def rotate(a):
            half = cos.shape[-1]
            low, high, rest = a.float().split((half, half, a.shape[-1] - 2 * half), -1)
            turned = [low * cos - high * sin, high * cos + low * sin, rest]
            return torch.cat(turned, -1).to(a.dtype)

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
        out, weights = attend(q, k, v, mask, sdpa, self.scale, self.cap)
        return self.o(out), weights


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.gate, self.up = (nn.Linear(cfg.hidden, cfg.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(cfg.mlp, cfg.hidden, bias=False)
        self.activation = ACTIVATIONS[cfg.activation]

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Decoder layer; returns x, and the weights of its attention where they are computed eagerly.

    norms "pre": x + f(norm(x)); "post": x + norm(f(x)); "both": x + norm(f(norm(x))).
    """

    def __init__(self, cfg):
        super().__init__()
        self.place = cfg.norms.partition("+")[0]
        self.ln1, self.ln2 = (RMSNorm(cfg.hidden, cfg) for _ in range(2))
        if self.place == "both":
            self.ln1_out, self.ln2_out = (RMSNorm(cfg.hidden, cfg) for _ in range(2))
        self.attn, self.mlp = SelfAttention(cfg), GatedMLP(cfg)
        self.residual = cfg.scales["residual"]

    def forward(self, x, rope, mask, cache, layer, sdpa):
        post, both = self.place == "post", self.place == "both"
        out, weights = self.attn(x if post else self.ln1(x), rope, mask, cache, layer, sdpa)
        x = x + self.residual * (self.ln1(out) if post else self.ln1_out(out) if both else out)
        out = self.mlp(x if post else self.ln2(x))
        out = self.ln2(out) if post else self.ln2_out(out) if both else out
        return x + self.residual * out, weights


class Words(nn.Embedding):
    """Embeddings of words times a factor."""

    def __init__(self, cfg):
        super().__init__(cfg.vocab, cfg.hidden)
        self.factor = cfg.scales["embedding"]

    def forward(self, ids):
        return super().forward(ids) * self.factor


class LLM(nn.Module):
    """Embedding, layers, last norm and head; they are run by EVLM, with cross-attention between the
    layers. Who makes it ties the head.
    """

    def __init__(self, cfg):
        super().__init__()
        self.embed = Words(cfg)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.ln_f = RMSNorm(cfg.hidden, cfg)
        self.head = nn.Linear(cfg.hidden, cfg.vocab, bias=False)
        self.divisor, self.cap = cfg.scales["logits"], cfg.scales["logit_cap"]

    def logits(self, x):
        """Of hidden states behind the last norm."""
        logits = self.head(x) / self.divisor
        return self.cap * (logits / self.cap).tanh() if self.cap else logits
