"""The demo's train step as one would write it in PyTorch: frozen decoder, gated cross-attention
before every layer, AdamW.

Read beside evlm_jax/models: the same parameters in the same places, with torch's own attention
under boolean masks and the loss at the supervised positions only. It takes the fields of Batch as
they are."""

import torch
import torch.nn.functional as F
from torch import nn

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig


class Cross(nn.Module):
    """Gated cross-attention; taps [B, I * S, V], with the zero keys behind them."""

    def __init__(self, cfg: EVLMConfig):
        super().__init__()
        d, v, n, k = (
            cfg.llm.hidden,
            cfg.vit.width,
            *(heads * cfg.xattn.head_dim for heads in (cfg.xattn.heads, cfg.xattn.kv_heads)),
        )
        self.norm, self.kv_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(v), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (
            nn.Linear(*size, bias=False) for size in ((d, n), (v, k), (v, k), (n, d))
        )
        self.ffn = nn.Sequential(
            nn.Linear(d, cfg.xattn.ffn, bias=False),
            nn.GELU(),
            nn.Linear(cfg.xattn.ffn, d, bias=False),
        )
        self.attn_gate, self.ffn_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.head_dim, self.sinks = cfg.xattn.head_dim, cfg.xattn.sinks

    def forward(self, x, tap, mask):
        def split(a):
            return a.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        kv = self.kv_norm(tap)
        k, v = (F.pad(project(kv), (0, 0, 0, self.sinks)) for project in (self.k, self.v))
        out = F.scaled_dot_product_attention(
            split(self.q(self.norm(x))), split(k), split(v), mask, enable_gqa=True
        )
        x = x + self.attn_gate.tanh() * self.o(out.transpose(1, 2).flatten(2))
        return x + self.ffn_gate.tanh() * self.ffn(self.ffn_norm(x))


class Layer(nn.Module):
    """Decoder layer of SmolLM2."""

    def __init__(self, cfg: EVLMConfig):
        super().__init__()
        llm = cfg.llm
        d, n, k = llm.hidden, llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
        self.ln1, self.ln2 = nn.RMSNorm(d, llm.eps), nn.RMSNorm(d, llm.eps)
        self.q, self.k, self.v, self.o = (
            nn.Linear(*size, bias=False) for size in ((d, n), (d, k), (d, k), (n, d))
        )
        self.gate, self.up, self.down = (
            nn.Linear(*size, bias=False) for size in ((d, llm.mlp), (d, llm.mlp), (llm.mlp, d))
        )
        self.head_dim = llm.head_dim

    def forward(self, x, cos, sin, mask):
        def split(a):
            return a.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def rotate(a):
            return (
                a * cos
                + torch.cat([-a[..., self.head_dim // 2 :], a[..., : self.head_dim // 2]], -1) * sin
            )

        h = self.ln1(x)
        q, k, v = rotate(split(self.q(h))), rotate(split(self.k(h))), split(self.v(h))
        x = x + self.o(
            F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )
        h = self.ln2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """The language model with its cross-attention, on cached taps; the head is the embedding."""

    def __init__(self, cfg: EVLMConfig):
        super().__init__()
        self.embed, self.media = (
            nn.Embedding(cfg.llm.vocab, cfg.llm.hidden),
            nn.Embedding(cfg.media.tokens, cfg.llm.hidden),
        )
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.llm.layers))
        self.crosses = nn.ModuleList(Cross(cfg) for _ in cfg.cross_layers)
        self.ln_f = nn.RMSNorm(cfg.llm.hidden, cfg.llm.eps)
        self.cfg = cfg
        for frozen in (self.embed, self.layers, self.ln_f):
            frozen.requires_grad_(False)

    def loss(self, b: Batch):
        cfg, (rows, length) = self.cfg, b.tokens.shape
        at = torch.arange(length)
        text = ((at <= at[:, None]) & (at[:, None] < b.visible_until[:, None, :]))[:, None]
        image = torch.arange(b.taps.shape[1]).repeat_interleave(cfg.vit.tokens)
        seen = (image >= b.visible_start[..., None]) & (image < b.visible_stop[..., None])
        cross = F.pad(seen, (0, cfg.xattn.sinks), value=True)[:, None]
        taps = b.taps.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [G, B, I * S, V]
        inverse = cfg.llm.rope_theta ** (-torch.arange(0, cfg.llm.head_dim, 2) / cfg.llm.head_dim)
        angle = (b.positions[..., None] * inverse).repeat(1, 1, 2)[:, None]
        x = torch.where(
            b.media_slot[..., None] >= 0,
            self.media(b.media_slot.clamp(min=0)),
            self.embed(b.tokens),
        )
        crosses = dict(zip(cfg.cross_layers, zip(self.crosses, cfg.tap_of_cross_layer)))
        for i, layer in enumerate(self.layers):
            if i in crosses:
                block, tap = crosses[i]
                x = block(x, taps[tap], cross)
            x = layer(x, angle.cos(), angle.sin(), text)
        hidden = self.ln_f(x)[torch.arange(rows)[:, None], b.target_positions]
        return F.cross_entropy(
            F.linear(hidden, self.embed.weight).flatten(0, 1), b.targets.flatten(), ignore_index=-1
        )


def make_step(cfg: EVLMConfig, batch: Batch):
    """A function that does one optimizer step on the batch and returns the loss;
    train.matmul_precision "bfloat16" is autocast.
    """
    model = Model(cfg)

    def as_torch(a):
        return (
            None
            if a is None
            else torch.tensor(a.astype("float32" if a.dtype.itemsize == 2 else a.dtype))
        )

    tensors = Batch(*map(as_torch, batch))._replace(targets=torch.tensor(batch.targets).long())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=cfg.optim.lr
    )

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=cfg.train.matmul_precision == "bfloat16"
        ):
            loss = model.loss(tensors)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
        optimizer.step()
        return loss.item()

    return step
