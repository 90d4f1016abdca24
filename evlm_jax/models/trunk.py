"""The loop over the language model's layers, with a cross-attention block before every
`xattn.every`-th of them, from `xattn.first` on.

Training, prefill, a decode step and the attention maps run this one loop. They hand it how
attention is computed, from a row or from a cache, and get back what each layer and block gave them.

Unusual: the layers and the blocks run as ONE scan. Compile time does not grow with depth.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evlm_jax.config import EVLMConfig
from evlm_jax.models.layers import REMAT
from evlm_jax.models.moe import PackedExperts, Routing
from evlm_jax.models.rotary import Rope, layer_rope
from evlm_jax.ops.decode_matmul import Packed
from evlm_jax.parallel.sharding import shard


class Passed(NamedTuple):
    """Outputs of a pass through the layers besides x.

    Leaves have a leading axis: L layers, or X cross-attention blocks.
    """

    layers: Any  # second results of `self_attend`
    # second results of `cross_attend`; this and the next two are None where there is no block
    crosses: Any = None
    observed: Any = None  # results of `observe`
    routing: Routing | None = None  # of the mixtures of experts; None where the FFNs are dense


def run_layers(
    cfg: EVLMConfig,
    layers: nnx.Module,
    crosses: nnx.Module | None,
    x: jax.Array,
    rope: Rope,
    *,
    self_attend: Callable[..., tuple[jax.Array, Any]],
    cross_attend: Callable[..., tuple[jax.Array, Any]],
    observe: Callable[..., Any] = lambda block, number, x: None,
    kind: jax.Array | None = None,
    remat: str = "",
) -> tuple[jax.Array, Passed]:
    """x [B, T, D] through all layers, before the final norm.

    Args:
      layers: the stack of llm.Block, `crosses` that of xattn.Block; packed for decoding, or not.
      rope: cos and sin of the tokens' positions (rotary.rope_tables).
      self_attend: (number of the layer, q, k, v of these tokens) -> (attention output, anything to
        keep).
      cross_attend: (the block, its number, q) -> (attention output, anything to keep).
      observe: (a block, its number, its input x [B, T, D]) -> anything to keep.
      kind: [B, T] of each token for the mixtures of experts (moe.py).
      remat: what the backward pass computes again (layers.REMAT); "" where there is none.
    """
    every, first, count = cfg.xattn.every, cfg.xattn.first, cfg.llm.layers
    blocks, groups = len(cfg.cross_layers), -(-count // every) if every else 0
    wrap = REMAT[remat] if remat else (lambda body: body)
    even = not every or count % every == 0

    def layer(x, inputs):
        block, number = inputs

        def run(x):
            own = layer_rope(cfg.llm, rope, number)
            x, kept = _block(layers, number, block)(x, own, partial(self_attend, number))
            return shard(x, "rows"), kept

        return run(x) if even else _if_there(number < count, run, x)

    def group(x, inputs):
        """`first` layers, one cross-attention block, and the layers behind it."""
        block, number, *own = inputs
        cross = partial(_cross, crosses, cross_attend, observe, kind, block, number)
        x, before = jax.lax.scan(layer, x, _part(own, slice(first))) if first else (x, None)
        x, seen = cross(x) if blocks == groups else _if_there(number < blocks, cross, x)
        x, new = jax.lax.scan(layer, x, _part(own, slice(first, None)))
        new = jax.tree.map(lambda *parts: jnp.concatenate(parts), before, new) if first else new
        return x, Passed(new, *seen)

    if not every:
        x, new = jax.lax.scan(wrap(layer), x, (_scanned(layers), jnp.arange(count)))
        return x, Passed(new)
    # Where `every` does not divide the layers, they are read by number: a part would be a copy.
    own = jax.tree.map(partial(_split, groups), _scanned(layers)) if even else None
    each = _scanned(crosses) if blocks == groups else None
    inputs = each, jnp.arange(groups), own, _split(groups, jnp.arange(groups * every))
    x, passed = jax.lax.scan(wrap(group), x, inputs)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], passed.layers)
    return x, _part(passed._replace(layers=None), slice(blocks))._replace(layers=flat)


def _cross(
    crosses: nnx.Module,
    cross_attend: Callable,
    observe: Callable,
    kind: jax.Array | None,
    block: nnx.Module | None,
    number: jax.Array,
    x: jax.Array,
) -> tuple[jax.Array, tuple]:
    """A block over x [B, T, D], and what of Passed it gives. Arguments as of `run_layers`."""
    block = _block(crosses, number, block)
    observed = observe(block, number, x)
    x, kept, routing = block(x, partial(cross_attend, block, number), kind)
    return x, (kept, observed, routing)


def _part(tree: Any, part: slice) -> Any:
    """A part of the leading axis of every leaf."""
    return jax.tree.map(lambda a: a[part], tree)


def _split(groups: int, a: jax.Array) -> jax.Array:
    """[L, ...] -> [groups, L / groups, ...]."""
    return a.reshape(groups, -1, *a.shape[1:])


def _if_there(there: jax.Array, run: Callable, x: jax.Array) -> tuple[jax.Array, Any]:
    """`run(x)`, or x and zeros in place of what it would keep."""
    none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, x)[1])
    return jax.lax.cond(there, run, lambda x: (x, none), x)


def _packed(leaf: Any) -> bool:
    return isinstance(leaf, (Packed, PackedExperts))


def _scanned(stack: nnx.Module) -> nnx.Module | None:
    """The stack, if a scan can hand out its blocks; None where its matrices are packed: they are
    read where they lie.
    """
    return None if any(map(_packed, jax.tree.leaves(stack, is_leaf=_packed))) else stack


def _block(stack: nnx.Module, number: jax.Array, block: nnx.Module | None) -> nnx.Module:
    """`block`, if the scan has handed it out, else that of the stack."""
    return pick(stack, number) if block is None else block


def pick(stack: nnx.Module, number: jax.Array | int) -> nnx.Module:
    """One block of a stack; packed weights are read in place."""

    def one(leaf):
        if _packed(leaf):
            return replace(leaf, layer=number)
        return checkpoint_name(jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), "weight")

    return jax.tree.map(one, stack, is_leaf=_packed)
