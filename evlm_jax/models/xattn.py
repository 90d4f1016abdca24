"""Gated cross-attention block, placed before an LLM layer (paper section 2; Flamingo, arXiv
2204.14198).

    x += attn_gate * CrossAttention(LN(x), LN(tap))
    x += ffn_gate * FFN(LN(x))                the FFN is dense, or a mixture of experts (moe.py)

Published models (docs/conversion.md) have other norms, norms of queries and keys, a gated FFN, or
none for tokens that see no image.
mPLUG-Owl3 (arXiv 2408.04840) has it within the layer, parallel to self-attention; the layer's norm
and output projection serve both, and its MLP is the only one:

    x += o(gate(SelfAttention(ln1(x)), CrossAttention(ln1(x), LN(tap))))

Its later form has one softmax over the keys of both, and no gate.

Gates (gate.py) start closed: the block is the identity, bit for bit. Nothing has a bias but the
norms: the zero sink (grouped_attention) stands for keys and values that are projections of zero
vectors, which are zero only without biases."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.gate import Gate, MixingGate, attention_gate
from evlm_jax.models.layers import MLP, LayerNorm, Linear, RMSNorm, heads
from evlm_jax.models.moe import MoE, Routing
from evlm_jax.models.rotary import Rope, rotate

Attend = Callable[[jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
    """A cross-attention block: x [B, T, D] -> [B, T, D]. `attend` reads the keys and values of its
    tap.
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        d, v, n, k = (
            cfg.llm.hidden,
            cfg.view_width,
            *(heads * cfg.xattn.head_dim for heads in (cfg.xattn.heads, cfg.xattn.kv_heads)),
        )
        parallel, own = cfg.xattn.placement == "parallel", cfg.xattn.query == "own"
        kind = LayerNorm if cfg.xattn.norm_kind == "layer" else RMSNorm

        def norm(width, there, kind=RMSNorm):
            return kind(width, cfg.xattn.eps, rngs) if there else None

        self.norm = norm(d, not parallel, kind)
        # Taps are raw residual streams, whose scale grows with depth.
        self.kv_norm = norm(v, cfg.xattn.kv_norm, LayerNorm)
        self.q = Linear((d, n), ("embed", "heads"), rngs) if own else None
        # Beside self-attention they have biases where its own keys and values have them.
        bias = parallel and cfg.llm.qkv_bias
        self.k = Linear((v, k), ("whole", "image_heads"), rngs, bias)
        self.v = Linear((v, k), ("whole", "image_heads"), rngs, bias)
        self.o = None if parallel else Linear((n, d), ("heads", "embed"), rngs)
        normed = cfg.xattn.qk_norm == "head"
        self.q_norm, self.k_norm = (
            norm(cfg.xattn.head_dim, normed and there) for there in (own, True)
        )
        self.attn_gate = attention_gate(cfg, rngs)
        self.ffn_norm = norm(d, not parallel, kind)
        self.ffn = None if parallel else _ffn(cfg, rngs)
        self.ffn_gate = None if parallel else Gate(rngs)
        self.head_dim, self.rotary = cfg.xattn.head_dim, cfg.xattn.key_rotary
        self.ffn_without_image = cfg.xattn.ffn_without_image

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
        self,
        x: jax.Array,
        attend: Attend,
        kind: jax.Array | None = None,
        sees: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Routing | None]:
        """x [B, T, D] -> (x, what else `attend` returns, the routing of the mixture of experts;
        None of a dense FFN).

        Args:
          attend: queries [B, T, N, H] -> (attention outputs of the same shape, anything).
          kind: [B, T] as in moe.py.
          sees: bool [B, T], which tokens see an image; None: all.
        """
        out, kept = attend(self._queries(self.norm(x)))
        x = x + self.attn_gate(x) * self.o(out.reshape(*x.shape[:-1], -1))
        y, routing = (
            self.ffn(self.ffn_norm(x), kind)
            if isinstance(self.ffn, MoE)
            else (self.ffn(self.ffn_norm(x)), None)
        )
        if sees is not None and not self.ffn_without_image:
            y = jnp.where(sees[..., None], y, 0)
        return x + self.ffn_gate(x) * y, kept, routing

    @jax.named_scope("cross")
    def beside(
        self, x: jax.Array, q: jax.Array, text: jax.Array, rope: Rope, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Attention of a layer to its text, joined by that to images: text [B, T, N, H], `Sums`
        where both share a softmax -> ([B, T, N, H], what else `attend` returns).

        Args:
          x: [B, T, D], what the layer's projections read.
          q: [B, T, N, H], the layer's queries, turned by their positions.
          rope: by which it turned them.
          attend: as of `__call__`.
        """
        if self.q is not None:
            q = rotate(self._queries(x), rope) if self.rotary else self._queries(x)
        out, kept = attend(q)
        return self.attn_gate.join(text, out), kept

    def _queries(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, N, H]."""
        q = heads(self.q(x), self.head_dim)
        return q if self.q_norm is None else self.q_norm(q)

    def gates(self) -> dict[str, Gate | MixingGate]:
        """The block's gates by the names under which a run reports them."""
        gates = {"attn_gate": self.attn_gate, "ffn_gate": self.ffn_gate}
        return {name: gate for name, gate in gates.items() if isinstance(gate, (Gate, MixingGate))}


def _ffn(cfg: EVLMConfig, rngs: nnx.Rngs) -> MoE | MLP:
    x, d = cfg.xattn, cfg.llm.hidden
    if cfg.moe.copies:
        return MoE(d, x.ffn, cfg.moe, rngs)
    return MLP(d, x.ffn, "silu" if x.gated else "gelu", False, rngs, gated=x.gated)


def layer_rngs(cfg: EVLMConfig, rngs: nnx.Rngs) -> nnx.Rngs:
    """Random numbers of each block, with a leading axis, by the number of the layer that it stands
    before: two models begin with equal blocks where both have one.
    """
    numbers = np.array(cfg.cross_layers)
    return jax.tree.map(lambda keys: keys[numbers], rngs.split(cfg.llm.layers))
