"""The language model, by choices of LLMConfig.

A block does not know how its keys are found: the caller passes `attend`, which is masked attention
over the row in training and attention over a cache in generation. What else `attend` returns, the
block passes on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.config import LLMConfig
from evlm_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    RMSNorm,
    heads,
    held,
    operand,
    param,
    stack,
)
from evlm_jax.models.rotary import Rope, rotate, rotate_queries
from evlm_jax.ops.quantised import Quantised
from evlm_jax.parallel.sharding import lookup, shard

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(cfg: LLMConfig, width: int, rngs: nnx.Rngs) -> RMSNorm:
    """A norm as the whole language model has it."""
    return RMSNorm(width, cfg.eps, rngs, cfg.norms.endswith("+1"))


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor of `Scales`."""
    return x if factor == 1 else x * factor


def finished(cfg: LLMConfig, logits: jax.Array) -> jax.Array:
    """Logits from the head's products [..., vocab]."""
    logits, cap = scaled(logits, 1 / cfg.scales.logits), cfg.scales.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits


class SelfAttention(nnx.Module):
    """Projections and rotary positions around `attend`."""

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        d, n, k = cfg.hidden, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = Linear((d, n), ("embed", "heads"), rngs, cfg.qkv_bias)
        self.k = Linear((d, k), ("embed", "kv_heads"), rngs, cfg.qkv_bias)
        self.v = Linear((d, k), ("embed", "kv_heads"), rngs, cfg.qkv_bias)
        self.o = Linear((n, d), ("heads", "embed"), rngs)
        self.head_dim, self.qk_norm = cfg.head_dim, cfg.qk_norm
        widths = {"none": None, "head": (cfg.head_dim, cfg.head_dim), "all": (n, k)}[cfg.qk_norm]
        self.q_norm, self.k_norm = (
            (rms_norm(cfg, width, rngs) for width in widths) if widths else (None, None)
        )

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads(a, self.head_dim) for a in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        out, kept = attend(rotate_queries(q, rope), rotate(k, rope), v)
        return self.o(out.reshape(*x.shape[:-1], -1)), kept


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        self.gate = Linear((cfg.hidden, cfg.mlp), ("embed", "mlp"), rngs)
        self.up = Linear((cfg.hidden, cfg.mlp), ("embed", "mlp"), rngs)
        self.down = Linear((cfg.mlp, cfg.hidden), ("mlp", "embed"), rngs)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Decoder layer: x [B, T, D] -> [B, T, D]; attention, then MLP, each with its norms."""

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        both = cfg.norms.startswith("both")
        self.ln1 = rms_norm(cfg, cfg.hidden, rngs)
        self.attn = SelfAttention(cfg, rngs)
        self.ln1_out = rms_norm(cfg, cfg.hidden, rngs) if both else None
        self.ln2 = rms_norm(cfg, cfg.hidden, rngs)
        self.mlp = GatedMLP(cfg, rngs)
        self.ln2_out = rms_norm(cfg, cfg.hidden, rngs) if both else None
        self.post, self.residual = cfg.norms == "post", cfg.scales.residual

    def read(self, x: jax.Array) -> jax.Array:
        """What the projections of its attention read of its input: x [B, T, D] -> [B, T, D]."""
        return x if self.post else self.ln1(x)

    @jax.named_scope("llm")
    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        y, kept = self.attn(self.read(x), rope, attend)
        x = x + self._added(y, self.ln1, self.ln1_out)
        y = self.mlp(x if self.post else self.ln2(x))
        return x + self._added(y, self.ln2, self.ln2_out), kept

    def _added(self, y: jax.Array, norm: RMSNorm, out: RMSNorm | None) -> jax.Array:
        """The change of x by a part's output y."""
        behind = norm if self.post else out
        return scaled(y if behind is None else behind(y), self.residual)


class LLM(nnx.Module):
    """Embedding, stacked layers, final norm and head. trunk.py runs the layers, with
    cross-attention between them.
    """

    embed_scale: nnx.Param | None = None  # [vocab, D / tile] of quantised embeddings
    kind = ""  # of their quantisation

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        self.embed = param(rngs, (cfg.words, cfg.hidden), ("vocab", "embed"), std=0.02)
        self.layers = stack(lambda r: Block(cfg, r), cfg.layers, rngs)
        self.ln_f = rms_norm(cfg, cfg.hidden, rngs)
        self.head = None if cfg.tied else Linear((cfg.hidden, cfg.vocab), ("embed", "vocab"), rngs)

    def hold(self, kind: str, tile: int) -> None:
        """Holds the embeddings quantised; their values are still to come."""
        self.embed, self.embed_scale = held(self.embed, kind, tile, -1)
        self.kind = kind

    def head_matrix(self, dtype: str) -> tuple[str, jax.Array | Quantised]:
        """The head, and its product with [..., D] as ops/matmul.py writes it."""
        if self.head is None:
            return "...d,vd->...v", operand(self.embed, self.embed_scale, self.kind, -1, dtype)
        return "...d,dv->...v", self.head.operand(dtype)

    def table(self) -> jax.Array | Quantised:
        """The embeddings [vocab, D] as they lie."""
        if self.embed_scale is None:
            return self.embed[...]
        return Quantised(self.embed[...], self.embed_scale[...], self.kind, -1)

    def words(self, tokens: jax.Array) -> jax.Array:
        """Embeddings of tokens [B, T] -> [B, T, D], as the table has them."""
        rows = lookup(self.embed, tokens)
        if self.embed_scale is None:
            return rows
        scale = shard(self.embed_scale[...][tokens], "rows")
        return Quantised(rows, scale, self.kind, -1).astype(scale.dtype)
