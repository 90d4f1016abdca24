"""Attention of pairs of blocks, for TPUs: kernels that compute what a plan names and nothing else.

A pair is a block of queries and a block of keys that they see: an image (grouped_attention.py), all
tokens of their own image (image_attention.py), or tokens of their row (packed_attention.py). A step
of a kernel is one pair and some heads. Prefetched numbers say which blocks it reads, so keys are
not gathered, and scores stay in the core's memory. Steps walk the pairs by blocks of queries for
the outputs and for the queries' gradient, by blocks of keys for the gradients of keys and values;
sums are kept while the owner stays the same.

    pairs           (0,2) (1,0) (1,2) padding
    by queries      (0,2) (1,0) (1,2)
    by keys         (1,0) (-,1) (0,2) (1,2)         block 1 is seen by nobody: its gradient is 0

The softmax goes from pair to pair by the largest score and the sum so far, which begin with the
sink: 0 and `sinks`. Heads lie side by side, each filled up to 128 lanes. Letters: X blocks of b
queries, Y blocks of S keys, N and K heads, H their width."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from evlm_jax.ops.grouped_attention import NEGATIVE
from evlm_jax.ops.matmul import operand_dtype
from evlm_jax.ops.platform import LANES, platform

VMEM = 12 * 2**20  # bytes that a step may take; the compiler gives a kernel 16 MiB on every chip
FIRST, LAST, REAL = 1, 2, 4  # bits of a step: its owner's first and last one; a pair is computed


class Walk(NamedTuple):
    """Steps in the order of their owners, int32."""

    queries: jax.Array  # [pairs] number of the block
    keys: jax.Array  # [pairs]
    bits: jax.Array  # [pairs]
    count: jax.Array  # of the steps that are made; what is behind them is padding


class Form(NamedTuple):
    """What is fixed when a kernel is made."""

    name: str
    scale: float
    sinks: int = 0
    cap: float = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    row: int = 0  # blocks of a row of text, within which queries see keys; 0: all keys are seen
    heads: int = 1  # key heads of a step
    group: int = 1  # queries that share a key head
    lanes: int = LANES  # of a head
    dtype: jnp.dtype = jnp.dtype("float32")  # of the operands of products
    interpret: bool = False

    @property
    def queries(self) -> int:
        """Query heads of a step."""
        return self.heads * self.group

    def columns(self) -> list[tuple[int, slice, slice]]:
        """(number, lanes of its queries, lanes of its keys) of each query head of a step."""
        lanes = [slice(i * self.lanes, (i + 1) * self.lanes) for i in range(self.queries)]
        return [(i, lanes[i], lanes[i // self.group]) for i in range(self.queries)]


def walks(queries: jax.Array, keys: jax.Array, real: jax.Array, blocks: int) -> tuple[Walk, Walk]:
    """Pairs [n] by their blocks of queries, and by their blocks of keys, of which there are
    `blocks`; those that no queries see have a step as well, which writes zeros.
    """
    unseen = jnp.ones(blocks, bool).at[jnp.where(real, keys, blocks)].set(False, mode="drop")
    all_queries = jnp.concatenate([queries, jnp.zeros(blocks, queries.dtype)])
    all_keys = jnp.concatenate([keys, jnp.arange(blocks, dtype=keys.dtype)])
    every = jnp.concatenate([real, jnp.zeros(blocks, bool)])
    made = jnp.concatenate([real, unseen])
    return (
        _walk(queries, keys, queries, real, real),
        _walk(all_queries, all_keys, all_keys, every, made),
    )


def _walk(
    queries: jax.Array, keys: jax.Array, owner: jax.Array, real: jax.Array, made: jax.Array
) -> Walk:
    owner = jnp.where(made, owner, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(owner, stable=True)
    changes, end = owner[order][1:] != owner[order][:-1], jnp.ones(1, bool)
    first, last = jnp.concatenate([end, changes]), jnp.concatenate([changes, end])
    bits = FIRST * first + LAST * last + REAL * real[order]
    # a number that no step reads is some block all the same
    at = jnp.where(made, jnp.stack([queries, keys]), 0)[:, order]
    return Walk(*at.astype(jnp.int32), bits.astype(jnp.int32), made.sum(dtype=jnp.int32))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    until: jax.Array | None,
    by: tuple[Walk, Walk],
    form: Form,
    place: jax.Array | None = None,
) -> jax.Array:
    """q [X, b, N, H], k and v [Y, S, K, H] -> [X, b, N, H]; what is in blocks of queries without a
    pair is undefined, here and in the gradient of q.

    Off TPUs kernels are interpreted, which is for tests.

    Args:
      until: [Y, 1 or 2, S] int32, of each key the first token of its row that does not see it, and
        with `place` the first place that does not; None where `form.row` is 0.
      by: of `walks`.
      place: [X, b] int32, of queries; None: none is too far away.
    Raises:
      ValueError: not even one head fits the core's memory.
    """
    (_, rows, n, h), (_, keys, kv, _) = q.shape, k.shape
    form = form._replace(
        group=n // kv, lanes=-(-h // LANES) * LANES, dtype=operand_dtype(q),
        interpret=platform() != "tpu",
    )  # fmt: skip
    form = _fit(form, kv, rows, keys, q.dtype.itemsize)

    def wide(x):
        filled = jnp.pad(x, ((0, 0),) * 3 + ((0, form.lanes - h),))
        return filled.reshape(*x.shape[:2], x.shape[2] * form.lanes)

    place = None if place is None else place[..., None]
    out = _attend(wide(q), wide(k), wide(v), (until, place), by, form)
    return out.reshape(*q.shape[:3], form.lanes)[..., :h]


def _fit(form: Form, kv: int, rows: int, keys: int, size: int) -> Form:
    """With as many heads a step as fit: small steps are all overhead."""
    for heads in range(kv, 0, -1):
        tried = form._replace(heads=heads)
        if kv % heads == 0 and step_bytes(tried, rows, keys, size) <= VMEM:
            return tried
    raise ValueError(
        f"train.attention = 'pallas': blocks of {rows} queries and {keys} keys take"
        f" {step_bytes(tried, rows, keys, size) >> 20} MiB of a core's memory and have"
        f" {VMEM >> 20}: lower xattn.query_block, or use 'xla'"
    )


def step_bytes(form: Form, rows: int, keys: int, size: int) -> int:
    """What a step of any kernel holds at most: of queries and of keys two arrays read and two
    written, each twice, for the next blocks travel meanwhile; their sums; scores of a head.

    `size`: bytes of an element of the results.
    """
    queries, shared = form.queries * form.lanes * rows, form.heads * form.lanes * keys
    moved = 2 * (queries + shared) * 2 * (form.dtype.itemsize + size)
    return moved + 4 * (queries + 2 * shared + 4 * rows * -(-keys // LANES) * LANES)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, sight, by, form) -> jax.Array:
    return _forward(q, k, v, sight, by, form)[0]


def _forward(q, k, v, sight, by, form) -> tuple[jax.Array, tuple]:
    """Outputs like q [X, b, N * lanes], and what the backward pass needs: with the log-sum-exp of
    each row and head [X, steps of heads, b, heads of a step].
    """
    rows, width = q.shape[1], form.queries * form.lanes
    sums = (len(q), k.shape[2] // (form.heads * form.lanes), rows, form.queries)
    out, lse = _call(
        Kernel("forward", _begin, _add, _end),
        by[0],
        form,
        _operands(form, sight, q=q, k=k, v=v),
        {"out": (q.shape, q.dtype), "lse": (sums, jnp.float32)},
        {"top": (rows, form.queries), "total": (rows, form.queries), "summed": (rows, width)},
    )
    return out, (q, k, v, sight, by, out, lse)


def _backward(form: Form, saved: tuple, g: jax.Array) -> tuple:
    q, k, v, sight, by, out, lse = saved
    inputs = _operands(form, sight, q=q, k=k, v=v, g=g) | {"lse": lse}
    width = form.heads * form.lanes
    dq, delta = _call(
        Kernel("queries", _begin_queries, _add_queries, _write),
        by[0],
        form,
        inputs | {"out": out},
        {"dq": (q.shape, q.dtype), "delta": (lse.shape, lse.dtype)},
        {"of_dq": (q.shape[1], width * form.group)},
    )
    dk, dv = _call(
        Kernel("keys", _zero, _add_keys, _write),
        by[1],
        form,
        inputs | {"delta": delta},
        {"dk": (k.shape, k.dtype), "dv": (v.shape, v.dtype)},
        {"of_dk": (k.shape[1], width), "of_dv": (k.shape[1], width)},
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _operands(form: Form, sight: tuple, **arrays: jax.Array) -> dict[str, jax.Array]:
    cast = {name: x.astype(form.dtype) for name, x in arrays.items()}
    named = zip(("until", "place"), sight, strict=True)
    return cast | {name: x for name, x in named if x is not None}


class Kernel(NamedTuple):
    """What a kernel does with its blocks, which it is handed by name: at the first pair of an
    owner, at every pair, at the last one.
    """

    name: str
    begin: Callable[[Form, SimpleNamespace], None]
    add: Callable[[Form, SimpleNamespace, jax.Array | None], None]  # mask [b, S], or None
    end: Callable[[Form, SimpleNamespace], None]


def _block(name: str, shape: tuple[int, ...], form: Form) -> pl.BlockSpec:
    """Which part of an array a step has: of its block of queries or of keys, its heads."""
    if name == "until":
        return pl.BlockSpec(
            (None, *shape[1:]), lambda head, i, queries, keys, bits: (keys[i], 0, 0)
        )
    if name == "place":
        return pl.BlockSpec(
            (None, *shape[1:]), lambda head, i, queries, keys, bits: (queries[i], 0, 0)
        )
    if name in ("lse", "delta"):
        own = (None, None, *shape[2:])
        return pl.BlockSpec(own, lambda head, i, queries, keys, bits: (queries[i], head, 0, 0))
    if name in ("k", "v", "dk", "dv"):
        own = (None, shape[1], form.heads * form.lanes)
        return pl.BlockSpec(own, lambda head, i, queries, keys, bits: (keys[i], 0, head))
    own = (None, shape[1], form.queries * form.lanes)
    return pl.BlockSpec(own, lambda head, i, queries, keys, bits: (queries[i], 0, head))


def _call(
    kernel: Kernel, walk: Walk, form: Form, inputs: dict, outputs: dict, scratch: dict
) -> list[jax.Array]:
    """Runs a kernel over all pairs, for some heads at a time.

    Args:
      inputs: arrays; `outputs` and `scratch` (float32) their shapes.
    """
    names = [*inputs, *outputs, *scratch]

    def run(queries, keys, bits, *refs):
        at, own = pl.program_id(1), SimpleNamespace(**dict(zip(names, refs, strict=True)))
        pl.when(bits[at] & FIRST > 0)(partial(kernel.begin, form, own))

        @pl.when(bits[at] & REAL > 0)
        def add():
            kernel.add(form, own, _visible(form, queries[at], keys[at], own) if form.row else None)

        pl.when(bits[at] & LAST > 0)(partial(kernel.end, form, own))

    return pl.pallas_call(
        run,
        name=f"{form.name}_{kernel.name}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(inputs["k"].shape[2] // (form.heads * form.lanes), walk.count),
            in_specs=[_block(name, x.shape, form) for name, x in inputs.items()],
            out_specs=[_block(name, shape, form) for name, (shape, _) in outputs.items()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=form.interpret,
    )(walk.queries, walk.keys, walk.bits, *inputs.values())


def _visible(form: Form, queries: jax.Array, keys: jax.Array, own: SimpleNamespace) -> jax.Array:
    """[b, S]: whether a token sees another of its row, k <= q < until[k], and not too far away."""
    shape = own.q.shape[0], own.k.shape[0]
    q = (queries % form.row) * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    k = (keys % form.row) * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (k <= q) & (q < own.until[:1])
    return seen & (own.place[...] < own.until[1:]) if hasattr(own, "place") else seen


def _dot(a: jax.Array, b: jax.Array, left: int, right: int) -> jax.Array:
    """The product over dimension `left` of a and `right` of b, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((left,), (right,)), ((), ())), exact, preferred_element_type=jnp.float32
    )


def _scores(form, own, mask, queries, keys) -> tuple[jax.Array, jax.Array | float]:
    """Scores [b, S] of a head, and their slope over the product of queries and keys."""
    scores, slope = _dot(own.q[:, queries], own.k[:, keys], 1, 1) * form.scale, form.scale
    if form.cap:
        bent = jnp.tanh(scores / form.cap)
        scores, slope = form.cap * bent, form.scale * (1 - bent * bent)
    return (scores if mask is None else jnp.where(mask, scores, NEGATIVE)), slope


def _begin(form: Form, own: SimpleNamespace) -> None:
    own.top[...] = jnp.full(own.top.shape, 0.0 if form.sinks else NEGATIVE, jnp.float32)
    own.total[...] = jnp.full(own.total.shape, form.sinks, jnp.float32)
    own.summed[...] = jnp.zeros(own.summed.shape, jnp.float32)


def _add(form: Form, own: SimpleNamespace, mask: jax.Array | None) -> None:
    for i, queries, keys in form.columns():
        scores, _ = _scores(form, own, mask, queries, keys)
        before, one = own.top[:, i : i + 1], slice(i, i + 1)
        now = jnp.maximum(before, scores.max(1, keepdims=True))
        weights, shrink = jnp.exp(scores - now), jnp.exp(before - now)
        own.top[:, one] = now
        own.total[:, one] = own.total[:, one] * shrink + weights.sum(1, keepdims=True)
        out = _dot(weights.astype(form.dtype), own.v[:, keys], 1, 0)
        own.summed[:, queries] = own.summed[:, queries] * shrink + out


def _end(form: Form, own: SimpleNamespace) -> None:
    for i, queries, _ in form.columns():
        out = own.summed[:, queries] / own.total[:, i : i + 1]
        own.out[:, queries] = out.astype(own.out.dtype)
    own.lse[...] = own.top[...] + jnp.log(own.total[...])


def _zero(form: Form, own: SimpleNamespace) -> None:
    for name, ref in vars(own).items():
        if name.startswith("of_"):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)


def _write(form: Form, own: SimpleNamespace) -> None:
    for name, ref in vars(own).items():
        if name.startswith("of_"):
            out = getattr(own, name.removeprefix("of_"))
            out[...] = ref[...].astype(out.dtype)


def _again(form, own, mask, i, queries, keys) -> tuple[jax.Array, jax.Array]:
    """Weights [b, S] of head i, and the gradient of its products of queries and keys."""
    scores, slope = _scores(form, own, mask, queries, keys)
    weights = jnp.exp(scores - own.lse[:, i : i + 1])
    into = _dot(own.g[:, queries], own.v[:, keys], 1, 1) - own.delta[:, i : i + 1]
    return weights.astype(form.dtype), (weights * into * slope).astype(form.dtype)


def _begin_queries(form: Form, own: SimpleNamespace) -> None:
    """Also what the gradient of a row's weights has too much, the sum over its outputs."""
    _zero(form, own)
    for i, queries, _ in form.columns():
        products = own.out[:, queries].astype(jnp.float32) * own.g[:, queries].astype(jnp.float32)
        own.delta[:, i : i + 1] = products.sum(1, keepdims=True)


def _add_queries(form: Form, own: SimpleNamespace, mask: jax.Array | None) -> None:
    for i, queries, keys in form.columns():
        _, into = _again(form, own, mask, i, queries, keys)
        own.of_dq[:, queries] += _dot(into, own.k[:, keys], 1, 0)


def _add_keys(form: Form, own: SimpleNamespace, mask: jax.Array | None) -> None:
    for i, queries, keys in form.columns():
        weights, into = _again(form, own, mask, i, queries, keys)
        own.of_dk[:, keys] += _dot(into, own.q[:, queries], 0, 0)
        own.of_dv[:, keys] += _dot(weights, own.g[:, queries], 0, 0)
