"""Products of tokens with the kernels of the experts they chose: rows sorted by expert into tiles, one expert a tile.

    choices   token    0 0 1 1 2 2 3 3        top 2 of 3 experts, tile = 2; token 3 is padding: it chooses nobody
              expert   0 2 0 1 2 0 - -
    rows               0 1 | 2 . | 1 . | 0 2 | . .
    first              0 = expert 0, 2 = expert 1, 3 = expert 2, 4 = the end; the number of tiles is static

Unusual: two forms, chosen once and said. Where tokamax is installed and the backend has its kernels, those; else a loop over each
expert's own tiles, which reads a kernel once, computes no tile that is not filled, and adds up the gradient of a kernel in place.
No form multiplies all tokens by all experts, as XLA's own ragged_dot does on CPU. Letters: R rows of all tiles, A choices, k a token.
"""

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.ops.product import operand_dtype, product
from evlm_jax.sharding import platform

STRIDES = (16, 4, 1)  # tiles that are multiplied together where an expert has so many


class Groups(NamedTuple):
    """Where choices stand. Choices are numbered choice by choice, not token by token: number i of token t is i * tokens + t."""

    choice: jax.Array  # [R] int32, A in a row without one
    row: jax.Array  # [A] int32, R for a choice that has none
    first: jax.Array  # [E + 1] int32, first tile of each expert, and the end of the last one


def group(expert: jax.Array, experts: int, tile: int, limit: jax.Array | None = None) -> Groups:
    """The rows of choices: expert [A] int32, `experts` for a choice that gets no row; `limit`: the most choices an expert takes.

    Over the limit, first choices go before second ones and early tokens before late ones.
    """
    count = jnp.zeros(experts + 1, jnp.int32).at[expert].add(1)
    taken = count[:-1] if limit is None else jnp.minimum(count[:-1], limit)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-taken // tile))])
    order = jnp.argsort(expert, stable=True)
    sorted_expert, rank = expert[order], jnp.arange(len(expert)) - (jnp.cumsum(count) - count)[expert[order]]
    rows = (len(expert) + experts * (tile - 1)) // tile * tile
    in_row = jnp.where(rank < jnp.append(taken, 0)[sorted_expert], first[sorted_expert] * tile + rank, rows)
    row = jnp.zeros(len(expert), jnp.int32).at[order].set(in_row, unique_indices=True)
    choice = jnp.full(rows, len(expert), jnp.int32).at[in_row].set(order, mode="drop")
    return Groups(choice, row, first)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: jax.Array, groups: Groups, tokens: int) -> jax.Array:
    """x [tokens, D] -> the rows of its choices [R, D], 0 where there is none."""
    token = jnp.where(groups.choice < len(groups.row), groups.choice % tokens, tokens)
    return jnp.take(x, token, axis=0, mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y: jax.Array, groups: Groups, tokens: int) -> jax.Array:
    """Rows [R, D] -> the sum over each token's choices [tokens, D], in float32 on the way: the transpose of `dispatch`."""
    picked = (jnp.take(y, row, axis=0, mode="fill", fill_value=0) for row in groups.row.reshape(-1, tokens))
    return functools.reduce(jnp.add, (rows.astype(jnp.float32) for rows in picked)).astype(y.dtype)


dispatch.defvjp(
    lambda x, groups, tokens: (dispatch(x, groups, tokens), groups), lambda tokens, groups, g: (combine(g, groups, tokens), None)
)
combine.defvjp(
    lambda y, groups, tokens: (combine(y, groups, tokens), groups), lambda tokens, groups, g: (dispatch(g, groups, tokens), None)
)


def grouped_matmul(x: jax.Array, kernels: jax.Array, first: jax.Array, tile: int) -> jax.Array:
    """Each row times the kernel of its expert: x [R, D], kernels [E, D, F] -> [R, F] in the dtype of x, sums in float32.

    Operands are rounded as in ops/product.py. Rows behind the last expert's tiles are undefined. The gradient of the kernels has
    their dtype and is summed in float32, expert by expert.
    """
    return _grouped(x, kernels, first, tile, operand_dtype(x))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x: jax.Array, kernels: jax.Array, first: jax.Array, tile: int, dtype: jnp.dtype) -> jax.Array:
    if kernel := _tokamax(platform()):
        return kernel(x.astype(dtype), kernels.astype(dtype), (first[1:] - first[:-1]) * tile).astype(x.dtype)
    return map_tiles(lambda rows, kernel: product("td,df->tf", rows, kernel, dtype), x, kernels, first, tile)


def _backward(tile: int, dtype: jnp.dtype, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, first = saved
    if kernel := _tokamax(platform()):
        sizes, x_cast, g_cast = (first[1:] - first[:-1]) * tile, x.astype(dtype), g.astype(dtype)
        of_x, of_kernels = kernel(g_cast, kernels.astype(dtype).swapaxes(1, 2), sizes), kernel(x_cast, g_cast, sizes)
    else:
        of_x = map_tiles(lambda rows, kernel: product("tf,df->td", rows, kernel, dtype), g, kernels, first, tile)
        of_kernels = _sum_by_expert(x, g, first, tile, dtype)
    return of_x.astype(x.dtype), of_kernels.astype(kernels.dtype), None


_grouped.defvjp(
    lambda x, kernels, first, tile, dtype: (_grouped(x, kernels, first, tile, dtype), (x, kernels, first)),
    _backward,
)


@functools.cache
def _tokamax(backend: str) -> Callable | None:
    """The kernels of tokamax, None where it is not installed or its form is XLA's own; says once which form it is.

    They take x [R, a] with kernels [E, a, b], or with g [R, b] for the sum of outer products [E, a, b], and the rows of each expert.
    """
    kinds = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}.get(backend)
    if kinds is None or importlib.util.find_spec("tokamax") is None:
        print("experts: products tile by tile" + ("; pip install tokamax for kernels of this backend" if kinds else ""), flush=True)
        return None
    print("experts: products by tokamax", flush=True)
    import tokamax

    def ragged(a, b, sizes):
        contracts = ([1], [1]) if b.ndim == 3 else ([0], [0])
        dimensions = jax.lax.RaggedDotDimensionNumbers((contracts, ([], [])), [0], [0] if b.ndim == 3 else [])
        return tokamax.ragged_dot_general(a, b, sizes, dimensions, preferred_element_type=jnp.float32, implementation=kinds)

    return ragged


def map_tiles(apply: Callable[[jax.Array, Any], jax.Array], x: jax.Array, experts: Any, first: jax.Array, tile: int) -> jax.Array:
    """`apply(rows [n, D], its expert's part of `experts`) -> [n, F]` over the filled tiles of x [R, D] -> [R, F]; 0 in all other rows."""
    width = jax.eval_shape(apply, x[:tile], jax.tree.map(lambda a: a[0], experts)).shape[1]

    def expert(out, inputs):
        mine, begin, end = inputs

        def step(at, rows, out):
            y = apply(jax.lax.dynamic_slice_in_dim(x, at, rows), mine).astype(x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)

        return _steps(step, begin, end, tile, len(x), out), None

    return jax.lax.scan(expert, jnp.zeros((len(x), width), x.dtype), (experts, first[:-1], first[1:]))[0]


def _sum_by_expert(x: jax.Array, g: jax.Array, first: jax.Array, tile: int, dtype: jnp.dtype) -> jax.Array:
    """x [R, D], g [R, F] -> float32 [E, D, F], the sum of outer products over the rows of each expert."""

    def expert(_, inputs):
        def step(at, rows, total):
            a, b = (jax.lax.dynamic_slice_in_dim(array, at, rows) for array in (x, g))
            return total + product("td,tf->df", a, b, dtype)

        return None, _steps(step, *inputs, tile, len(x), jnp.zeros((x.shape[1], g.shape[1]), jnp.float32))

    return jax.lax.scan(expert, None, (first[:-1], first[1:]))[1]


def _steps(step: Callable, begin: jax.Array, end: jax.Array, tile: int, total: int, carry: Any) -> Any:
    """`step(first row, number of rows, carry) -> carry` over the tiles begin <= i < end, many at once as long as there are many."""
    for stride in STRIDES:
        if stride * tile <= total:
            count = (end - begin) // stride
            body = lambda i, carry, begin=begin, stride=stride: step((begin + i * stride) * tile, stride * tile, carry)
            carry = jax.lax.fori_loop(0, count, body, carry)
            begin = begin + count * stride
    return carry
