"""The language model: Llama, SmolLM2, Qwen 1.0, Qwen2 and Qwen3 by config.

A block does not know how its keys are found: the caller passes `attend`, which is masked attention
over the row in training and attention over a cache in generation. What else `attend` returns, the
block passes on."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from evlm_jax.config import LLMConfig
from evlm_jax.models.layers import Linear, RMSNorm, heads, param, rotate, stack
from evlm_jax.parallel.sharding import gathered_weight, lookup

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


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
            (RMSNorm(width, cfg.eps, rngs) for width in widths) if widths else (None, None)
        )

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads(a, self.head_dim) for a in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        out, kept = attend(rotate(q, rope), rotate(k, rope), v)
        return self.o(out.reshape(*x.shape[:-1], -1)), kept


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        self.gate = Linear((cfg.hidden, cfg.mlp), ("embed", "mlp"), rngs)
        self.up = Linear((cfg.hidden, cfg.mlp), ("embed", "mlp"), rngs)
        self.down = Linear((cfg.mlp, cfg.hidden), ("mlp", "embed"), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm decoder layer: x [B, T, D] -> [B, T, D]."""

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        self.ln1 = RMSNorm(cfg.hidden, cfg.eps, rngs)
        self.attn = SelfAttention(cfg, rngs)
        self.ln2 = RMSNorm(cfg.hidden, cfg.eps, rngs)
        self.mlp = GatedMLP(cfg, rngs)

    @jax.named_scope("llm")
    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        y, kept = self.attn(self.ln1(x), rope, attend)
        x = x + y
        return x + self.mlp(self.ln2(x)), kept


class LLM(nnx.Module):
    """Embedding, stacked layers, final norm and head. trunk.py runs the layers, with
    cross-attention between them.
    """

    def __init__(self, cfg: LLMConfig, rngs: nnx.Rngs):
        self.embed = param(rngs, (cfg.vocab, cfg.hidden), ("vocab", "embed"), std=0.02)
        self.layers = stack(lambda r: Block(cfg, r), cfg.layers, rngs)
        self.ln_f = RMSNorm(cfg.hidden, cfg.eps, rngs)
        self.head = None if cfg.tied else Linear((cfg.hidden, cfg.vocab), ("embed", "vocab"), rngs)

    def head_matrix(self, dtype: str) -> tuple[str, jax.Array]:
        """The head, and its product with [..., D] as ops/matmul.py writes it."""
        if self.head is None:
            return "...d,vd->...v", gathered_weight(self.embed, dtype)
        return "...d,dv->...v", gathered_weight(self.head.kernel, dtype)

    def words(self, tokens: jax.Array) -> jax.Array:
        """Embeddings of tokens [B, T] -> [B, T, D]."""
        return lookup(self.embed, tokens)
