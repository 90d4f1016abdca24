"""Gated cross-attention block, placed before an LLM layer (paper section 2; Flamingo, arXiv
2204.14198).

    x += attn_gate * CrossAttention(LN(x), LN(tap))
    x += ffn_gate * FFN(LN(x))                the FFN is dense, or a mixture of experts (moe.py)

Published models (docs/conversion.md) have other norms, norms of queries and keys, or a gated FFN.

Gates (gate.py) start closed: the block is the identity, bit for bit. Nothing has a bias but the
norms: the zero sink (grouped_attention) stands for keys and values that are projections of zero
vectors, which are zero only without biases."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.gate import Gate
from evlm_jax.models.layers import MLP, LayerNorm, Linear, RMSNorm, heads
from evlm_jax.models.moe import MoE, Routing

Attend = Callable[[jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
    """A cross-attention block: x [B, T, D] -> [B, T, D]. `attend` reads the keys and values of its
    tap.
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        d, v, n, k = (
            cfg.llm.hidden,
            cfg.vit.width,
            *(heads * cfg.xattn.head_dim for heads in (cfg.xattn.heads, cfg.xattn.kv_heads)),
        )
        norm = LayerNorm if cfg.xattn.norm_kind == "layer" else RMSNorm
        self.norm = norm(d, cfg.xattn.eps, rngs)
        # Taps are raw residual streams, whose scale grows with depth.
        self.kv_norm = LayerNorm(v, cfg.xattn.eps, rngs) if cfg.xattn.kv_norm else None
        self.q = Linear((d, n), ("embed", "heads"), rngs)
        self.k = Linear((v, k), ("whole", "image_heads"), rngs)
        self.v = Linear((v, k), ("whole", "image_heads"), rngs)
        self.o = Linear((n, d), ("heads", "embed"), rngs)
        self.q_norm, self.k_norm = (
            RMSNorm(cfg.xattn.head_dim, cfg.xattn.eps, rngs)
            if cfg.xattn.qk_norm == "head"
            else None
            for _ in range(2)
        )
        self.attn_gate = Gate(rngs)
        self.ffn_norm = norm(d, cfg.xattn.eps, rngs)
        self.ffn = (
            MoE(d, cfg.xattn.ffn, cfg.moe, rngs)
            if cfg.moe.copies
            else MLP(
                d,
                cfg.xattn.ffn,
                "silu" if cfg.xattn.gated else "gelu",
                False,
                rngs,
                gated=cfg.xattn.gated,
            )
        )
        self.ffn_gate = Gate(rngs)
        self.head_dim = cfg.xattn.head_dim

    @jax.named_scope("keys_values")
    def keys_values(self, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tap [..., S, V] -> keys and values [..., S, K, H]: once per image,
        cached in generation.
        """
        normed = tap if self.kv_norm is None else self.kv_norm(tap)
        keys = heads(self.k(normed), self.head_dim)
        keys = keys if self.k_norm is None else self.k_norm(keys)
        return keys, heads(self.v(normed), self.head_dim)

    @jax.named_scope("cross")
    def __call__(
        self, x: jax.Array, attend: Attend, kind: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Routing | None]:
        """x [B, T, D] -> (x, what else `attend` returns, the routing of the mixture of experts;
        None of a dense FFN).

        Args:
          attend: queries [B, T, N, H] -> (attention outputs of the same shape, anything).
          kind: [B, T] as in moe.py.
        """
        q = heads(self.q(self.norm(x)), self.head_dim)
        out, kept = attend(q if self.q_norm is None else self.q_norm(q))
        x = x + self.attn_gate(x) * self.o(out.reshape(*x.shape[:-1], -1))
        y, routing = (
            self.ffn(self.ffn_norm(x), kind)
            if isinstance(self.ffn, MoE)
            else (self.ffn(self.ffn_norm(x)), None)
        )
        return x + self.ffn_gate(x) * y, kept, routing

    def gates(self) -> dict[str, Gate]:
        """The block's gates by the names under which a run reports them."""
        return {"attn_gate": self.attn_gate, "ffn_gate": self.ffn_gate}


def layer_rngs(cfg: EVLMConfig, rngs: nnx.Rngs) -> nnx.Rngs:
    """Random numbers of each block, with a leading axis, by the number of the layer that it stands
    before: two models begin with equal blocks where both have one.
    """
    numbers = np.array(cfg.cross_layers)
    return jax.tree.map(lambda keys: keys[numbers], rngs.split(cfg.llm.layers))
