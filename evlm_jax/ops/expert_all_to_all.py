"""Rows change devices: those sorted by expert go to the devices that hold their experts, and their
results come back, in rounds.

    sorted rows, device A   0 0 0 2       experts 0 1 on A, 2 3 on B; blocks of 2 rows
                 device B   0 1 3 3
    received, by device A   A0 A0 | A0 B0 | B1 .
              by device B   A2 .  | B3 B3

A receiver's rows are numbered expert by expert, each expert's filled up to whole blocks of
ops/grouped_matmul.py, and of an expert sender by sender: every device computes that from the counts
of all. A round carries the next C of these rows, twice as many as a device sends, so a balanced
load takes one round, all rows for one device take P / 2, and no choice is ever dropped. What is
received needs no sorting, and what is filled of it stands in front.

On TPU and GPU a ragged all-to-all carries a round; XLA on CPU has none, so there the rows go round
in a ring, and each device takes its own. All run within shard_map_local, on the axis of experts.
Letters: R rows of a device, C rows of a round, P devices of the axis, E experts."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Exchange(NamedTuple):
    """How rows travel."""

    axis: str  # of the mesh
    others: tuple[str, ...]  # axes along which other rows are exchanged
    ragged: bool  # by a ragged all-to-all
    block: int  # rows that are multiplied together
    rows: int  # R

    @property
    def capacity(self) -> int:
        """C: whole blocks, no more than 2R rows but for a single block."""
        return max(1, 2 * self.rows // self.block) * self.block


class Routes(NamedTuple):
    """Where the rows of every sender and expert stand, and how many they are: each [P, E]."""

    count: jax.Array
    at: jax.Array  # the first one among the sender's
    place: jax.Array  # the first one among the receiver's
    first: jax.Array  # [P, E / P + 1] first block of each of a receiver's experts, and the end


def routes(first_of_expert: jax.Array, exchange: Exchange) -> Routes:
    """The routes of rows sorted by expert: [E + 1] int32, first row of each expert on this device,
    and the end of the last one.
    """
    count = jax.lax.all_gather(jnp.diff(first_of_expert), exchange.axis)
    blocks = (-(-count.sum(0) // exchange.block)).reshape(len(count), -1)
    first = jnp.pad(jnp.cumsum(blocks, 1), ((0, 0), (1, 0)))
    before = jnp.cumsum(count, 0) - count  # of the same expert, from senders with lower numbers
    place = first[:, :-1].reshape(-1) * exchange.block + before
    return Routes(count, jnp.cumsum(count, 1) - count, place, first)


def own_blocks(routes: Routes, number: jax.Array, exchange: Exchange) -> jax.Array:
    """What this device receives in a round: the first block of each of its experts, and the end
    [E / P + 1].
    """
    per_round = exchange.capacity // exchange.block
    own = routes.first[jax.lax.axis_index(exchange.axis)]
    return jnp.clip(own - number * per_round, 0, per_round)


def over_rounds(one: Callable, routes: Routes, exchange: Exchange, *arrays: jax.Array) -> jax.Array:
    """The sum of `one(routes, number, *arrays)` over all rounds, of which all devices have as many:
    XLA's collectives within a loop may wait for devices of other groups.

    The first is differentiated as it is. Of the others, which a balanced load has not, nothing is
    kept for the backward pass. A row of `arrays` is a single round's; kernels [E / P, ...] are
    those of all, and their gradients are summed in float32.
    """
    rounds = -(-routes.first[:, -1].max() * exchange.block // exchange.capacity)
    rounds = jax.lax.pmax(rounds, exchange.others) if exchange.others else rounds
    return _later(one, routes, rounds, one(routes, jnp.int32(0), *arrays), *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later(
    one: Callable, routes: Routes, rounds: jax.Array, out: jax.Array, *arrays: jax.Array
) -> jax.Array:
    return _loop(rounds, lambda number, out: out + one(routes, number, *arrays), out)


def _later_backward(one: Callable, saved: tuple, g: jax.Array) -> tuple:
    routes, rounds, arrays = saved

    def add(number, sums):
        _, pull = jax.vjp(partial(one, routes, number), *arrays)
        return [total + more.astype(total.dtype) for total, more in zip(sums, pull(g))]

    zeros = [jnp.zeros(a.shape, jnp.float32 if a.ndim > 2 else a.dtype) for a in arrays]
    sums = _loop(rounds, add, zeros)
    return None, None, g, *(total.astype(a.dtype) for total, a in zip(sums, arrays))


_later.defvjp(
    lambda one, routes, rounds, out, *arrays: (
        _later(one, routes, rounds, out, *arrays),
        (routes, rounds, arrays),
    ),
    _later_backward,
)


@jax.named_scope("overflow")
def _loop(rounds: jax.Array, step: Callable, carry: Any) -> Any:
    return jax.lax.fori_loop(1, rounds, step, carry)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x: jax.Array, routes: Routes, number: jax.Array, exchange: Exchange) -> jax.Array:
    """Sorted rows [R, D] -> those that this device receives in a round [C, D], 0 where there is
    none.
    """
    shape = exchange.capacity, *x.shape[1:]
    if exchange.ragged:
        sent, received = _slices(routes, number, exchange)
        # not zeros: the compiler fills what it exchanges at a quarter of the rate of HBM
        room = jax.lax.empty(shape, x.dtype)
        out = jax.lax.ragged_all_to_all(
            x, room, sent.at, sent.count, sent.place, received.count, axis_name=exchange.axis
        )
        return jnp.where(_filled(routes, number, exchange)[:, None], out, 0)
    me = jax.lax.axis_index(exchange.axis)

    def take(out, sender, travelling):
        x, device, place = travelling
        return out.at[jnp.where(device == me, place, len(out))].set(x, mode="drop")

    travelling = x, *_destinations(routes, number, exchange)
    return _ring(take, jnp.zeros(shape, x.dtype), travelling, exchange.axis)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(y: jax.Array, routes: Routes, number: jax.Array, exchange: Exchange) -> jax.Array:
    """The way back, and the transpose: [C, D] -> [R, D], 0 where a row was not sent in this
    round.
    """
    shape = exchange.rows, *y.shape[1:]
    device, place = _destinations(routes, number, exchange)
    if exchange.ragged:
        sent, received = _slices(routes, number, exchange)
        room, back = jax.lax.empty(shape, y.dtype), (received.place, received.count)
        out = jax.lax.ragged_all_to_all(
            y, room, *back, received.at, sent.count, axis_name=exchange.axis
        )
        return jnp.where((place < exchange.capacity)[:, None], out, 0)

    def take(out, receiver, y):
        here = jnp.take(y, place, axis=0, mode="fill", fill_value=0)
        return jnp.where((device == receiver)[:, None], here, out)

    return _ring(take, jnp.zeros(shape, y.dtype), y, exchange.axis)


dispatch.defvjp(
    lambda x, routes, number, exchange: (dispatch(x, routes, number, exchange), (routes, number)),
    lambda exchange, saved, g: (combine(g, *saved, exchange), None, None),
)
combine.defvjp(
    lambda y, routes, number, exchange: (combine(y, routes, number, exchange), (routes, number)),
    lambda exchange, saved, g: (dispatch(g, *saved, exchange), None, None),
)


class Slices(NamedTuple):
    """Of a round, one for each expert and sender, in the order of the other device: each [E]."""

    count: jax.Array
    at: jax.Array  # among the sender's rows
    place: jax.Array  # among those that the receiver has in this round


def _slices(routes: Routes, number: jax.Array, exchange: Exchange) -> tuple[Slices, Slices]:
    """What this device sends, and what it receives."""
    begin = number * exchange.capacity
    low, high = (
        jnp.clip(end, begin, begin + exchange.capacity)
        for end in (routes.place, routes.place + routes.count)
    )
    all_of = Slices(high - low, routes.at + low - routes.place, low - begin)
    me, per_device = jax.lax.axis_index(exchange.axis), routes.first.shape[1] - 1
    received = (
        jax.lax.dynamic_slice_in_dim(x, me * per_device, per_device, 1).reshape(-1) for x in all_of
    )
    return Slices(*(x[me] for x in all_of)), Slices(*received)


def _destinations(
    routes: Routes, number: jax.Array, exchange: Exchange
) -> tuple[jax.Array, jax.Array]:
    """The device to which each of this device's rows goes, P where a row does not travel in this
    round, and its place there: each [R]. Places of other rows are out of range.
    """
    count, at, place = (x[jax.lax.axis_index(exchange.axis)] for x in routes[:3])
    row = jnp.arange(exchange.rows)
    expert = jnp.searchsorted(at + count, row, side="right")
    there = expert < len(at)
    own = jnp.minimum(expert, len(at) - 1)
    to = place[own] + row - at[own] - number * exchange.capacity
    there &= (to >= 0) & (to < exchange.capacity)
    device = own // (routes.first.shape[1] - 1)
    nowhere = len(routes.first), exchange.capacity
    return jnp.where(there, device, nowhere[0]), jnp.where(there, to, nowhere[1])


def _filled(routes: Routes, number: jax.Array, exchange: Exchange) -> jax.Array:
    """Which of the rows that this device receives in a round there are: bool [C]."""
    me = jax.lax.axis_index(exchange.axis)
    begin = routes.first[me] * exchange.block
    own = jax.lax.dynamic_slice_in_dim(routes.count.sum(0), me * (len(begin) - 1), len(begin) - 1)
    row = jnp.arange(exchange.capacity) + number * exchange.capacity
    expert = jnp.searchsorted(begin[1:], row, side="right")
    there, expert = expert < len(own), jnp.minimum(expert, len(own) - 1)
    return there & (row - begin[expert] < own[expert])


def _ring(take: Callable, out: jax.Array, travelling: Any, axis: str) -> jax.Array:
    """`take(out, device, what that device began with) -> out` over all devices of the axis."""
    devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def step(i, carry):
        out, travelling = carry
        out = take(out, (me - i) % devices, travelling)
        return out, jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to_next), travelling)

    return jax.lax.fori_loop(0, devices, step, (out, travelling))[0]
