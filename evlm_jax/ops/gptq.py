"""Matrices in 8 or 4 bits whose roundings make up for each other: GPTQ (arXiv 2210.17323).

Of a matrix its rows, one for each number that it is multiplied with, are rounded in turn. What a
row's rounding adds to the outputs for inputs that were seen is taken from the rows behind it, which
are not rounded yet. Rows of a tile are rounded one after the other, then those behind the tile
change at once. Tiles have the scales of qwix, which are taken when their turn comes.

Unusual: qwix has the algorithm for integers alone, row by row in Python; this one is a compiled
loop, and has NF4."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from evlm_jax.ops.quantised import NF4, coded, number_of, packed

DAMPING = 0.01  # as the paper has it


def rounded(
    matrix: np.ndarray, gram: np.ndarray, kind: str, tile: int, damping: float = DAMPING
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a matrix [in, out], and its scales, as ops.quantised.quantise gives them.

    Args:
      gram: [in, in], the sum of x x^T of inputs x [in].
      damping: what other inputs count, in means of the squares of those that were seen.
    Raises:
      ValueError: `gram` has numbers that are not finite.
    """
    made = _rounded(matrix, _spread(gram, damping), kind, tile)
    return tuple(map(np.asarray, made))


def _spread(gram: np.ndarray, damping: float) -> np.ndarray:
    """[in, in] float32, upper triangular: the transposed Cholesky factor of the inverse of `gram`
    with damping. Row i, over its diagonal, is how the error of i is spread.
    """
    if not np.isfinite(gram).all():
        raise ValueError("inputs are not finite")
    damping = damping * np.trace(gram) / len(gram) or 1.0
    damped = gram.astype(np.float64) + damping * np.eye(len(gram))
    # the factor of the reversed matrix, reversed, is an upper one: its inverse is what is wanted
    upper = scipy.linalg.cholesky(damped[::-1, ::-1], lower=True)[::-1, ::-1]
    return scipy.linalg.solve_triangular(upper, np.eye(len(gram))).astype(np.float32)


@partial(jax.jit, static_argnums=(2, 3))
def _rounded(
    matrix: jax.Array, spread: jax.Array, kind: str, tile: int
) -> tuple[jax.Array, jax.Array]:
    def one_tile(number, carry):
        matrix, codes, scales = carry
        first = number * tile
        own = jax.lax.dynamic_slice_in_dim(matrix, first, tile)
        ahead = jax.lax.dynamic_slice_in_dim(spread, first, tile)
        among = jax.lax.dynamic_slice_in_dim(ahead, first, tile, 1)
        scale = coded(own, kind, tile, 0)[1]

        def one_row(i, carry):
            own, errors, codes = carry
            code = _nearest(own[i] / scale[0], kind)
            error = (own[i] - number_of(code, kind) * scale[0]) / among[i, i]
            # rows in front of i have zeros in `among`
            return own - jnp.outer(among[i], error), errors.at[i].set(error), codes.at[i].set(code)

        carry = own, jnp.zeros_like(own), jnp.zeros(own.shape, jnp.uint8)
        _, errors, new = jax.lax.fori_loop(0, tile, one_row, carry)
        matrix = matrix - jnp.matmul(ahead.T, errors, precision="highest")
        return (
            matrix,
            jax.lax.dynamic_update_slice_in_dim(codes, new, first, 0),
            scales.at[number].set(scale[0]),
        )

    tiles, matrix = len(matrix) // tile, matrix.astype(jnp.float32)
    carry = matrix, jnp.zeros(matrix.shape, jnp.uint8), jnp.zeros((tiles, matrix.shape[1]))
    _, codes, scales = jax.lax.fori_loop(0, tiles, one_tile, carry)
    return packed(codes, kind, -2), scales


def _nearest(x: jax.Array, kind: str) -> jax.Array:
    """The byte, in 4 bits half a byte, of the number next to each."""
    if kind == "nf4":
        numbers = jnp.array(NF4, jnp.float32)
        return jnp.searchsorted((numbers[1:] + numbers[:-1]) / 2, x).astype(jnp.uint8)
    most = {"int8": 127, "int4": 7}[kind]
    code = jnp.clip(jnp.round(x), -most - 1, most).astype(jnp.int8)
    code = jax.lax.bitcast_convert_type(code, jnp.uint8)
    return code if kind == "int8" else code & 15
