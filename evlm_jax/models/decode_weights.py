"""A model's weights laid out for decoding (ops/decode_matmul.py)."""

from typing import NamedTuple

import jax
from flax import nnx

from evlm_jax.models.evlm import EVLM
from evlm_jax.models.layers import Linear
from evlm_jax.models.llm import LLM
from evlm_jax.models.moe import Experts, PackedExperts
from evlm_jax.ops.decode_matmul import Packed, pack, pack_head
from evlm_jax.ops.platform import platform
from evlm_jax.ops.quantised import Quantised


class Weights(NamedTuple):
    """Parameters of a model in the layout of decoding; the layers stay stacked."""

    embed: jax.Array | Quantised  # [vocab, D]
    media: jax.Array | None  # [media tokens, D]; None where patches stand in their place
    bridge: nnx.Module | None  # bridge.py, not packed: it runs once an image, as in training
    layers: nnx.Module  # llm.Block
    crosses: nnx.Module | None  # xattn.Block; None without cross-attention
    ln_f: nnx.Module
    head: Packed | Quantised

    @classmethod
    def of(cls, model: EVLM, dtype: str) -> "Weights":
        """The weights of `model`, its matrices in `dtype`."""
        llm, table = model.llm, model.llm.table()
        layers, crosses = _pack(llm.layers, dtype), _pack(model.xattn, dtype)
        media = None if model.media is None else model.media.embedding[...]
        return cls(
            table if isinstance(table, Quantised) else table.astype(dtype),
            media,
            model.bridge,
            layers,
            crosses,
            llm.ln_f,
            _head(llm, dtype),
        )


def _head(llm: LLM, dtype: str) -> Packed | Quantised:
    matrix = llm.table() if llm.head is None else llm.head.matrix()
    if isinstance(matrix, Quantised) and platform() != "cpu":
        return matrix
    return pack_head(matrix.T if llm.head is None else matrix, dtype)


def _pack(stack: nnx.Module, dtype: str) -> nnx.Module:
    """A stack of blocks with a Packed in place of each Linear, and PackedExperts in place of
    Experts. A quantised kernel beside an adapter, and elsewhere than on CPUs, stays as it is.
    """

    def convert(leaf):
        if isinstance(leaf, Experts):
            return PackedExperts.of(leaf, dtype)
        if not isinstance(leaf, Linear):
            return leaf
        quantised = leaf.kernel_scale is not None
        if quantised and (leaf.lora_a is not None or platform() != "cpu"):
            return leaf
        matrix = leaf.matrix() if quantised else pack(leaf.matrix(), dtype)
        return Packed(matrix, None if leaf.bias is None else leaf.bias[...], dtype=dtype)

    return jax.tree.map(convert, stack, is_leaf=lambda leaf: isinstance(leaf, (Linear, Experts)))
