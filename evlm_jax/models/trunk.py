"""The loop over the language model's layers, with a cross-attention block before every
`xattn.every`-th of them, or beside its self-attention, from `xattn.first` on.

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
    sees: jax.Array | None = None,
    remat: str = "",
) -> tuple[jax.Array, Passed]:
    """x [B, T, D] through all layers, before the final norm.

    Args:
      layers: the stack of llm.Block, `crosses` that of xattn.Block; packed for decoding, or not.
      rope: cos and sin of the tokens' positions (rotary.rope_tables).
      self_attend: (number of the layer, its q, k, v) -> (attention output, anything to keep).
      cross_attend: (the block, its number, q) -> (attention output, anything to keep). Where both
        share a softmax, outputs are `Sums` (gate.py).
      observe: (a block, its number, its input x [B, T, D]) -> anything to keep.
      kind: [B, T] of each token, for the mixtures of experts (moe.py).
      sees: bool [B, T], which tokens see an image; None: all.
      remat: what the backward pass computes again (layers.REMAT); "" where there is none.
    """
    every, count = cfg.xattn.every, cfg.llm.layers
    blocks, groups = len(cfg.cross_layers), -(-count // every) if every else 0
    even = not every or count % every == 0
    wrap = REMAT[remat] if remat else (lambda body: body)
    loop = _Loop(
        cfg,
        layers,
        crosses,
        rope,
        self_attend,
        cross_attend,
        observe,
        kind,
        sees,
        even,
        blocks == groups,
    )
    if not every:
        x, new = jax.lax.scan(wrap(loop.layer), x, (_scanned(layers), jnp.arange(count)))
        return x, Passed(new)
    # Where `every` does not divide the layers, they are read by number: a part would be a copy.
    own = jax.tree.map(partial(_split, groups), _scanned(layers)) if even else None
    each = _scanned(crosses) if blocks == groups else None
    inputs = each, jnp.arange(groups), own, _split(groups, jnp.arange(groups * every))
    x, passed = jax.lax.scan(wrap(loop.group), x, inputs)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], passed.layers)
    return x, _part(passed._replace(layers=None), slice(blocks))._replace(layers=flat)


class _Loop(NamedTuple):
    """The body of the loop; all but the last two fields are arguments of `run_layers`.

    A layer and a block come with their numbers, and themselves where the scan can hand them out.
    """

    cfg: EVLMConfig
    layers: nnx.Module
    crosses: nnx.Module | None
    rope: Rope
    self_attend: Callable
    cross_attend: Callable
    observe: Callable
    kind: jax.Array | None
    sees: jax.Array | None
    even: bool  # the last group has all its layers
    whole: bool  # and its block

    def group(self, x: jax.Array, inputs: tuple) -> tuple[jax.Array, Passed]:
        """`first` layers, a cross-attention block, or a layer with one beside its self-attention,
        and further layers.
        """
        block, number, *own = inputs
        xattn, kept, at = self.cfg.xattn, [], self.cfg.xattn.first
        if at:
            x, new = jax.lax.scan(self.layer, x, _part(own, slice(at)))
            kept.append(new)
        if xattn.placement == "parallel":
            x, (new, seen) = self.layer(x, _part(own, at), (block, number))
            kept.append(jax.tree.map(lambda a: a[None], new))
            at += 1
        else:
            cross, there = partial(self.before, block, number), number < len(self.cfg.cross_layers)
            x, seen = cross(x) if self.whole else _if_there(there, cross, x)
        if at < xattn.every:
            x, new = jax.lax.scan(self.layer, x, _part(own, slice(at, None)))
            kept.append(new)
        if len(kept) > 1:
            new = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
        return x, Passed(new, *seen)

    def layer(self, x: jax.Array, inputs: tuple, cross: tuple = ()) -> tuple[jax.Array, Any]:
        """A layer over x [B, T, D], with the block `cross` beside its self-attention where given,
        and what attention gives besides.
        """
        layer, number = inputs

        def run(x):
            own, block = (
                layer_rope(self.cfg.llm, self.rope, number),
                _block(self.layers, number, layer),
            )
            attend = partial(self.self_attend, number)
            if cross:
                attend = partial(self.beside, *cross, x, block.read(x), own, attend)
            elif self.cfg.xattn.one_softmax:
                attend = partial(_alone, attend)
            x, kept = block(x, own, attend)
            return shard(x, "rows"), kept

        return run(x) if self.even else _if_there(number < self.cfg.llm.layers, run, x)

    def before(
        self, block: nnx.Module | None, number: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, tuple]:
        """A block over x [B, T, D], and what of Passed it gives."""
        block = _block(self.crosses, number, block)
        observed = self.observe(block, number, x)
        attend = partial(self.cross_attend, block, number)
        x, kept, routing = block(x, attend, self.kind, self.sees)
        return x, (kept, observed, routing)

    def beside(
        self,
        block: nnx.Module | None,
        number: jax.Array,
        x: jax.Array,
        read: jax.Array,
        rope: Rope,
        attend: Callable,
        *qkv: jax.Array,
    ) -> tuple[jax.Array, tuple]:
        """Attention of a layer with a block beside it, and what both give besides. `x` is the
        layer's input, of which its projections read `read`; `attend` its self-attention of q, k, v.
        """
        block = _block(self.crosses, number, block)
        observed = self.observe(block, number, x)
        text, kept = attend(*qkv)
        look = partial(self.cross_attend, block, number)
        out, seen = block.beside(read, qkv[0], text, rope, look)
        return out, (kept, (seen, observed, None))


def _alone(attend: Callable, *qkv: jax.Array) -> tuple[jax.Array, Any]:
    """Attention to text that no images join, without its `Sums`."""
    (out, _), kept = attend(*qkv)
    return out, kept


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
