"""What models say about the arrays of a mesh, without knowing its axes; the layout that is active
while they are traced does (mesh.py).

A matrix is gathered from where it is stored to where it is used by `gathered_weight`; its gradient
goes back summed and split. On one device, without a layout, every function here hands its array
through.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from evlm_jax.parallel.mesh import active_layout, is_param


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation: a logical axis, or None, for each of its first
    dimensions.
    """
    layout = active_layout()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(axes))


def lookup(table: nnx.Variable, index: jax.Array) -> jax.Array:
    """Rows of a table [vocab, D] at index [B, T] -> [B, T, D]."""
    layout = active_layout()
    if layout is not None and (layout.cfg.zero == 3 or layout.cfg.frozen == "sharded"):
        return shard(shard(table[...][shard(index, "copies")], "copies", None, "pieces"), "rows")
    return shard(table[...][index], "rows")


def gathered_weight(param: nnx.Variable, dtype: jnp.dtype) -> jax.Array:
    """A parameter at its use.

    On a mesh it is gathered in `dtype`; its gradient is summed over rows and scattered to the
    pieces in which the parameter is stored.
    """
    layout = active_layout()
    if layout is None:
        return param[...]
    used, stored = layout.place(param, stored=False), layout.place(param, stored=True)
    return (
        param[...]
        if used == stored
        else checkpoint_name(_place(used, stored, param.dtype, dtype, param[...]), "weight")
    )


def all_gather_params(params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Trainable parameters at the start of a step: with ZeRO-2 their matrices gathered in `dtype`;
    with ZeRO-3 as they are stored.
    """
    layout = active_layout()
    if layout is None or layout.cfg.zero == 3:
        return params

    def gather(param: nnx.Variable) -> nnx.Variable:
        used = layout.place(param, stored=False)
        if used == layout.place(param, stored=True):
            return param
        return param.replace(jax.lax.with_sharding_constraint(param[...].astype(dtype), used))

    return jax.tree.map(gather, params, is_leaf=is_param)


def reduce_scatter_grads(grads: nnx.State) -> nnx.State:
    """Gradients, sharded as their parameters are stored."""
    layout = active_layout()
    return (
        grads if layout is None else jax.lax.with_sharding_constraint(grads, layout.trained(grads))
    )


def in_each_slice(f: Callable) -> Callable:
    """`f` of parameters and of the rows of one slice -> of parameters and of the rows of all,
    [slices, ...], whose results are [slices, ...]: what is summed over rows stays within a slice.
    """
    layout = active_layout()

    def own(params: nnx.State, rows: Any) -> Any:
        with replace(layout, within=True).active():
            return f(params, rows)

    return jax.vmap(own, in_axes=(None, 0), spmd_axis_name="slices")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _place(
    used: NamedSharding, stored: NamedSharding, own: jnp.dtype, dtype: jnp.dtype, x: jax.Array
) -> jax.Array:
    return jax.lax.with_sharding_constraint(x.astype(dtype), used)


_place.defvjp(
    lambda used, stored, own, dtype, x: (_place(used, stored, own, dtype, x), None),
    lambda used, stored, own, dtype, _, g: (
        jax.lax.with_sharding_constraint(g, stored).astype(own),
    ),
)


def shard_map_local(
    f: Callable, inputs: tuple[tuple[str | None, ...], ...], outputs: Any
) -> Callable:
    """`f` applied to each device's shard."""
    layout = active_layout()
    if layout is None:
        return f

    def specs(tree):
        return jax.tree.map(
            layout.spec,
            tree,
            is_leaf=lambda node: (
                isinstance(node, tuple) and all(isinstance(a, str | None) for a in node)
            ),
        )

    return jax.shard_map(
        f, mesh=layout.mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False
    )


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Mesh axes of more than one device over which `axis` is split where it is used: for sums and
    exchanges within `shard_map_local`.
    """
    layout = active_layout()
    return () if layout is None else layout.split(layout.rule(axis).used)
