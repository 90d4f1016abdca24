"""Products of tokens with the kernels of the experts they chose: rows sorted by expert into blocks,
one expert a block.

    choices   token    0 0 1 1 2 2 3 3     top 2 of 3 experts, block = 2; token 3 is padding: it
              expert   0 2 0 1 2 0 - -     chooses nobody
    rows               0 1 | 2 . | 1 . | 0 2 | . .
    first              0 = expert 0, 2 = expert 1, 3 = expert 2, 4 = the end; the number of blocks
                       is static

Unusual: two forms, chosen once and said. Where tokamax is installed and the backend has its
kernels, those; else a loop over each expert's own blocks, which reads a kernel once, computes no
block that is not filled, picks its tokens and adds to them block by block, so that no array [R, D]
is ever stored. Backward, one loop makes both gradients: a block's tokens are picked once, its two
products run side by side, and the gradient of a kernel is added up in place. No form multiplies all
tokens by all experts, as XLA's own ragged_dot does on CPU (docs/decisions.md, D-OPS-5 to D-OPS-7).
Letters: N tokens, R rows of all blocks, A choices, k a token."""

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.ops.matmul import operand_dtype, product
from evlm_jax.ops.platform import platform

STRIDES = (16, 8, 4, 2, 1)  # blocks that are multiplied together where an expert has so many


class Groups(NamedTuple):
    """Assignment of choices to rows. Choices are numbered choice by choice, not token by token:
    number i of token t is i * tokens + t.
    """

    choice: jax.Array  # [R] int32, A in a row without one
    row: jax.Array  # [A] int32, R for a choice that has none
    first: jax.Array  # [E + 1] int32, first block of each expert, and the end of the last one

    def token(self, tokens: int) -> jax.Array:
        """[R] int32, `tokens` in a row without one."""
        return jnp.where(self.choice < len(self.row), self.choice % tokens, tokens)

    def sizes(self, block: int) -> jax.Array:
        """Rows of each expert [E] int32, filled blocks counted whole."""
        return (self.first[1:] - self.first[:-1]) * block


def group(expert: jax.Array, experts: int, block: int, limit: jax.Array | None = None) -> Groups:
    """Assigns rows to choices, sorted by expert.

    Args:
      expert: int32 [A], the expert of each choice; `experts` for a choice that gets no row.
      block: rows of a block; each expert's rows are filled up to whole blocks.
      limit: most choices of an expert. Beyond it, first choices go before second ones and early
        tokens before late ones.
    """
    count = jnp.zeros(experts + 1, jnp.int32).at[expert].add(1)
    taken = count[:-1] if limit is None else jnp.minimum(count[:-1], limit)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-taken // block))])
    order = jnp.sort(expert * len(expert) + jnp.arange(len(expert))) % len(
        expert
    )  # a stable argsort, at a quarter of its time on CPU
    sorted_expert, rank = (
        expert[order],
        jnp.arange(len(expert)) - (jnp.cumsum(count) - count)[expert[order]],
    )
    rows = (len(expert) + experts * (block - 1)) // block * block
    in_row = jnp.where(
        rank < jnp.append(taken, 0)[sorted_expert], first[sorted_expert] * block + rank, rows
    )
    row = jnp.zeros(len(expert), jnp.int32).at[order].set(in_row, unique_indices=True)
    choice = jnp.full(rows, len(expert), jnp.int32).at[in_row].set(order, mode="drop")
    return Groups(choice, row, first)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: jax.Array, groups: Groups, tokens: int) -> jax.Array:
    """x [tokens, D] -> the rows of its choices [R, D], 0 where there is none."""
    return _take(x, groups.token(tokens))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y: jax.Array, groups: Groups, tokens: int) -> jax.Array:
    """Rows [R, D] -> the sum over each token's choices [tokens, D], in float32 on the way: the
    transpose of `dispatch`.
    """
    picked = (_take(y, row) for row in groups.row.reshape(-1, tokens))
    return functools.reduce(jnp.add, (rows.astype(jnp.float32) for rows in picked)).astype(y.dtype)


dispatch.defvjp(
    lambda x, groups, tokens: (dispatch(x, groups, tokens), groups),
    lambda tokens, groups, g: (combine(g, groups, tokens), None),
)
combine.defvjp(
    lambda y, groups, tokens: (combine(y, groups, tokens), groups),
    lambda tokens, groups, g: (dispatch(g, groups, tokens), None),
)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of x, 0 behind its end."""
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def dispatch_matmul(x: jax.Array, kernels: jax.Array, groups: Groups, block: int) -> jax.Array:
    """The token of each row times the kernel of its expert: x [N, D], kernels [E, D, F] -> [R, F]
    in the dtype of x, sums in float32.

    Operands are rounded as in ops/matmul.py. Rows without a choice are undefined. The gradient of
    the kernels has their dtype and is summed in float32, expert by expert.
    """
    return _dispatch(x, kernels, groups, block, operand_dtype(x))


def combine_matmul(
    y: jax.Array, kernels: jax.Array, groups: Groups, tokens: int, block: int
) -> jax.Array:
    """Each row times the kernel of its expert, summed over a token's choices: y [R, F], kernels
    [E, F, D] -> [tokens, D] in the dtype of y.

    With transposed kernels it is the transpose of `dispatch_matmul`; all else as there.
    """
    return _combine(y, kernels, groups, tokens, block, operand_dtype(y))


def blocks_matmul(x: jax.Array, kernels: jax.Array, first: jax.Array, block: int) -> jax.Array:
    """Rows that are in their blocks already times the kernels of their experts: x [R, D], kernels
    [E, D, F], first [E + 1] as in Groups -> [R, F] in the dtype of x.

    Rows behind the last block are undefined; all else as in `dispatch_matmul`.
    """
    return _blocks(x, kernels, first, block, operand_dtype(x))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocks(
    x: jax.Array, kernels: jax.Array, first: jax.Array, block: int, dtype: jnp.dtype
) -> jax.Array:
    if ragged := _tokamax(platform()):
        sizes = jnp.diff(first) * block
        return ragged(x.astype(dtype), kernels.astype(dtype), sizes).astype(x.dtype)

    def apply(rows, kernel):
        return product("nd,df->nf", rows, kernel, dtype).astype(x.dtype)

    return map_blocks(apply, x, kernels, first, block)


def _blocks_backward(
    block: int, dtype: jnp.dtype, saved: tuple, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, first = saved
    if ragged := _tokamax(platform()):
        sizes, g = jnp.diff(first) * block, g.astype(dtype)
        of_x = ragged(g, kernels.swapaxes(1, 2).astype(dtype), sizes)
        of_kernels = ragged(x.astype(dtype), g, sizes)
        return of_x.astype(x.dtype), of_kernels.astype(kernels.dtype), None

    def step(at, rows, expert, carry):
        (ours, mine), (number, kernel), (of_x, of_kernels) = _rows(at, rows, x, g), expert, carry
        back = product("nf,df->nd", mine, kernel, dtype).astype(x.dtype)
        of_x = jax.lax.dynamic_update_slice_in_dim(of_x, back, at, 0)
        return of_x, of_kernels.at[number].add(product("nf,nd->fd", mine, ours, dtype))

    zeros = jnp.zeros_like(x), jnp.zeros(kernels.swapaxes(1, 2).shape, jnp.float32)
    of_x, of_kernels = _over_blocks(
        step, zeros, (jnp.arange(len(kernels)), kernels), first, block, len(x)
    )
    return of_x, of_kernels.swapaxes(1, 2).astype(kernels.dtype), None


_blocks.defvjp(
    lambda x, kernels, first, *static: (_blocks(x, kernels, first, *static), (x, kernels, first)),
    _blocks_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dispatch(
    x: jax.Array, kernels: jax.Array, groups: Groups, block: int, dtype: jnp.dtype
) -> jax.Array:
    if ragged := _tokamax(platform()):
        rows = dispatch(x.astype(dtype), groups, len(x))
        return ragged(rows, kernels.astype(dtype), groups.sizes(block)).astype(x.dtype)

    def apply(token, kernel):
        return product("nd,df->nf", _take(x, token), kernel, dtype).astype(x.dtype)

    return map_blocks(apply, groups.token(len(x)), kernels, groups.first, block)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _combine(
    y: jax.Array, kernels: jax.Array, groups: Groups, tokens: int, block: int, dtype: jnp.dtype
) -> jax.Array:
    if ragged := _tokamax(platform()):
        return combine(
            ragged(y.astype(dtype), kernels.astype(dtype), groups.sizes(block)), groups, tokens
        ).astype(y.dtype)
    token = groups.token(tokens)

    def step(at, rows, kernel, out):
        here, mine = _rows(at, rows, token, y)
        return out.at[here].add(product("nf,fd->nd", mine, kernel, dtype), mode="drop")

    return _over_blocks(
        step,
        jnp.zeros((tokens, kernels.shape[2]), jnp.float32),
        kernels,
        groups.first,
        block,
        len(y),
    ).astype(y.dtype)


def _dispatch_backward(
    block: int, dtype: jnp.dtype, saved: tuple, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, groups = saved
    if ragged := _tokamax(platform()):
        rows, g, sizes = (
            dispatch(x.astype(dtype), groups, len(x)),
            g.astype(dtype),
            groups.sizes(block),
        )
        of_x = combine(ragged(g, kernels.swapaxes(1, 2).astype(dtype), sizes), groups, len(x))
        return of_x.astype(x.dtype), ragged(rows, g, sizes).astype(kernels.dtype), None
    token = groups.token(len(x))

    def step(at, rows, expert, carry):
        (here, mine), (number, kernel), (of_x, of_kernels) = (
            _rows(at, rows, token, g),
            expert,
            carry,
        )
        of_x = of_x.at[here].add(product("nf,df->nd", mine, kernel, dtype), mode="drop")
        # a kernel's gradient is added up as [F, D]: twice as fast on CPU as [D, F]
        return of_x, of_kernels.at[number].add(product("nf,nd->fd", mine, _take(x, here), dtype))

    zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros(kernels.swapaxes(1, 2).shape, jnp.float32)
    of_x, of_kernels = _over_blocks(
        step, zeros, (jnp.arange(len(kernels)), kernels), groups.first, block, len(g)
    )
    return of_x.astype(x.dtype), of_kernels.swapaxes(1, 2).astype(kernels.dtype), None


def _combine_backward(
    tokens: int, block: int, dtype: jnp.dtype, saved: tuple, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y, kernels, groups = saved
    if ragged := _tokamax(platform()):
        rows, sizes = dispatch(g.astype(dtype), groups, tokens), groups.sizes(block)
        of_y = ragged(rows, kernels.swapaxes(1, 2).astype(dtype), sizes)
        return (
            of_y.astype(y.dtype),
            ragged(y.astype(dtype), rows, sizes).astype(kernels.dtype),
            None,
        )
    token = groups.token(tokens)

    def step(at, rows, expert, carry):
        (here, mine), (number, kernel), (of_y, of_kernels) = (
            _rows(at, rows, token, y),
            expert,
            carry,
        )
        picked = _take(g, here)
        of_y = jax.lax.dynamic_update_slice_in_dim(
            of_y, product("nd,fd->nf", picked, kernel, dtype).astype(y.dtype), at, 0
        )
        return of_y, of_kernels.at[number].add(product("nf,nd->fd", mine, picked, dtype))

    zeros = jnp.zeros_like(y), jnp.zeros(kernels.shape, jnp.float32)
    of_y, of_kernels = _over_blocks(
        step, zeros, (jnp.arange(len(kernels)), kernels), groups.first, block, len(y)
    )
    return of_y, of_kernels.astype(kernels.dtype), None


_dispatch.defvjp(
    lambda x, kernels, groups, *static: (
        _dispatch(x, kernels, groups, *static),
        (x, kernels, groups),
    ),
    _dispatch_backward,
)
_combine.defvjp(
    lambda y, kernels, groups, *static: (
        _combine(y, kernels, groups, *static),
        (y, kernels, groups),
    ),
    _combine_backward,
)


def _rows(at: jax.Array, rows: int, *arrays: jax.Array) -> list[jax.Array]:
    """`rows` rows of each array, from `at` on."""
    return [jax.lax.dynamic_slice_in_dim(array, at, rows) for array in arrays]


@functools.cache
def _tokamax(backend: str) -> Callable | None:
    """The kernels of tokamax, None where it is not installed or its form is XLA's own; says once
    which form it is.

    They take x [R, a] with kernels [E, a, b], or with g [R, b] for the sum of outer products
    [E, a, b], and the rows of each expert."""
    kinds = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}.get(backend)
    if kinds is None or importlib.util.find_spec("tokamax") is None:
        print(
            "experts: products block by block"
            + ("; pip install tokamax for kernels of this backend" if kinds else ""),
            flush=True,
        )
        return None
    print("experts: products by tokamax", flush=True)
    import tokamax

    def ragged(a, b, sizes):
        contracts = ([1], [1]) if b.ndim == 3 else ([0], [0])
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            (contracts, ([], [])), [0], [0] if b.ndim == 3 else []
        )
        return tokamax.ragged_dot_general(
            a, b, sizes, dimensions, preferred_element_type=jnp.float32, implementation=kinds
        )

    return ragged


def map_blocks(
    apply: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    experts: Any,
    first: jax.Array,
    block: int,
) -> jax.Array:
    """`apply(rows [n, ...], its expert's part of `experts`) -> [n, F]` over the filled blocks of x
    [R, ...] -> [R, F]; 0 elsewhere.
    """
    like = jax.eval_shape(apply, x[:block], jax.tree.map(lambda a: a[0], experts))

    def step(at, rows, mine, out):
        return jax.lax.dynamic_update_slice_in_dim(
            out, apply(jax.lax.dynamic_slice_in_dim(x, at, rows), mine), at, 0
        )

    return _over_blocks(
        step, jnp.zeros((len(x), like.shape[1]), like.dtype), experts, first, block, len(x)
    )


def _over_blocks(
    step: Callable, carry: Any, experts: Any, first: jax.Array, block: int, total: int
) -> Any:
    """`step(first row, number of rows, its expert's part of `experts`, carry) -> carry` over all
    filled blocks.
    """

    def expert(carry, inputs):
        mine, begin, end = inputs
        return (
            _steps(
                lambda at, rows, carry: step(at, rows, mine, carry), begin, end, block, total, carry
            ),
            None,
        )

    return jax.lax.scan(expert, carry, (experts, first[:-1], first[1:]))[0]


def _steps(
    step: Callable, begin: jax.Array, end: jax.Array, block: int, total: int, carry: Any
) -> Any:
    """`step(first row, number of rows, carry) -> carry` over the blocks begin <= i < end, many at
    once as long as there are many.
    """
    for stride in STRIDES:
        if stride * block <= total:
            count = (end - begin) // stride

            def body(i, carry, begin=begin, stride=stride):
                return step((begin + i * stride) * block, stride * block, carry)

            carry = jax.lax.fori_loop(0, count, body, carry)
            begin = begin + count * stride
    return carry
