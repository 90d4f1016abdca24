"""Rows change devices: those sorted by expert go to the devices that hold their experts, and their
results come back.

    device 0   rows  a a b | c      experts 0 1 | 2 3        device 0 receives  a a b . | e . . .
    device 1   rows  e | f f g      E = 4, P = 2 devices     device 1 receives  c . . . | f f g .

A sender's block has its own place in the receiver's rows, as long as all rows of a sender, so no
choice is ever dropped. On TPU and GPU a ragged all-to-all carries the filled part alone; XLA on CPU
has none, so there whole places travel. Both run within shard_map_local, on the axis of experts; one
is the transpose of the other. Letters: R rows of a device, P devices of the axis."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Route(NamedTuple):
    """Destinations of rows."""

    first: jax.Array  # [P + 1] where each device's block begins in the sender's rows; the end
    received: jax.Array  # [P] rows that come from each device
    back: jax.Array  # [P] where they stand there


def route(first_of_expert: jax.Array, axis: str, rows: int) -> tuple[Route, jax.Array]:
    """The route of rows sorted by expert; and for each received row [P * R] the number of its
    expert among the own, E / P without one.

    Args:
      first_of_expert: [E + 1] int32, first row of each expert, and the end of the last one.
      rows: R.
    """
    devices = jax.lax.axis_size(axis)
    per_device = (len(first_of_expert) - 1) // devices
    first = first_of_expert[::per_device]
    counts = jax.lax.all_to_all(
        jnp.diff(first_of_expert).reshape(devices, per_device), axis, 0, 0, tiled=True
    )
    back = jax.lax.all_to_all(first[:-1], axis, 0, 0, tiled=True)
    owner = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(rows), side="right"))(
        jnp.cumsum(counts, axis=1)
    )
    return Route(first, counts.sum(1), back), owner.reshape(-1).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dispatch(x: jax.Array, route: Route, axis: str, ragged: bool) -> jax.Array:
    """Sorted rows [R, D] -> received rows [P * R, D], 0 where there is none."""
    devices, rows = len(route.received), len(x)
    if ragged:
        out = jnp.zeros((devices * rows, x.shape[1]), x.dtype)
        place = jnp.full(devices, jax.lax.axis_index(axis) * rows, jnp.int32)
        return jax.lax.ragged_all_to_all(
            x, out, route.first[:-1], jnp.diff(route.first), place, route.received, axis_name=axis
        )
    at = route.first[:-1, None] + jnp.arange(rows)
    blocks = jnp.take(
        x, jnp.where(at < route.first[1:, None], at, rows), axis=0, mode="fill", fill_value=0
    )
    return jax.lax.all_to_all(blocks, axis, 0, 0, tiled=True).reshape(-1, x.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def combine(y: jax.Array, route: Route, axis: str, ragged: bool) -> jax.Array:
    """The way back: [P * R, D] -> [R, D], 0 where no row was sent."""
    devices = len(route.received)
    rows = len(y) // devices
    if ragged:
        out, places = (
            jnp.zeros((rows, y.shape[1]), y.dtype),
            jnp.arange(devices, dtype=jnp.int32) * rows,
        )
        return jax.lax.ragged_all_to_all(
            y, out, places, route.received, route.back, jnp.diff(route.first), axis_name=axis
        )
    blocks = jax.lax.all_to_all(y.reshape(devices, rows, -1), axis, 0, 0, tiled=True).reshape(
        -1, y.shape[1]
    )
    row = jnp.arange(rows)
    device = jnp.searchsorted(route.first[1:], row, side="right")
    at = device * rows + row - route.first[jnp.minimum(device, devices - 1)]
    return jnp.take(
        blocks, jnp.where(device < devices, at, len(blocks)), axis=0, mode="fill", fill_value=0
    )


dispatch.defvjp(
    lambda x, route, axis, ragged: (dispatch(x, route, axis, ragged), route),
    lambda axis, ragged, route, g: (combine(g, route, axis, ragged), None),
)
combine.defvjp(
    lambda y, route, axis, ragged: (combine(y, route, axis, ragged), route),
    lambda axis, ragged, route, g: (dispatch(g, route, axis, ragged), None),
)
