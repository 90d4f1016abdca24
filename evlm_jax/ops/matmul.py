"""Products of matrices: operands of one dtype, sums in float32, backward as well.

Unusual: a gradient of our own. JAX's would multiply a float32 cotangent by a 16-bit operand, which
matrix units do at the speed of float32 or not at all. CPUs with AMX gain five times from bfloat16
products of this form, and nothing from others (docs/decisions.md, D-OPS-4)."""

from functools import partial

import jax
import jax.numpy as jnp

from evlm_jax.ops.platform import platform
from evlm_jax.ops.quantised import Quantised, joined, row_product


def product(
    spec: str,
    a: jax.Array,
    b: jax.Array | Quantised,
    dtype: jnp.dtype | None = None,
    result: jnp.dtype = jnp.float32,
) -> jax.Array:
    """einsum in float32, rounded to `result` at its end. Each index of an operand must occur in the
    other one or in the result; "..." in front of `a` is any number of indices.

    `b` is cast to the dtype of `a`. Under jax.default_matmul_precision("bfloat16") both are rounded
    to that: XLA does so on TPUs alone. Gradients have the dtype of their operand; that of a float32
    parameter is not rounded on its way. `dtype`: round to that instead.

    A quantised `b` becomes a matrix here, forward and once more backward, so that none is kept in
    between; it has no gradient. A single row by a matrix is `row_product` on GPUs where that is
    quantised, two rows on TPUs.
    """
    spec = spec.replace("...", "ABCDEF"[: a.ndim + 3 - spec.index(",")])
    return _product(spec, dtype or operand_dtype(a), result, a, b)


def operand_dtype(a: jax.Array) -> jnp.dtype:
    """Dtype to which the operands of a product with `a` are rounded."""
    return (
        jnp.dtype(jnp.bfloat16)
        if jax.config.jax_default_matmul_precision == "bfloat16"
        else a.dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    spec: str, dtype: jnp.dtype, result: jnp.dtype, a: jax.Array, b: jax.Array | Quantised
) -> jax.Array:
    a, (of_a, of_b, out) = a.astype(dtype), spec.replace("->", ",").split(",")
    # one row by a matrix
    single = a.size == a.shape[-1] and len(of_b) == 2 and out[:-1] == of_a[:-1] != ""
    if platform() == "tpu":
        made = _two_rows(spec, a, b) if single else _on_tpu(spec, a, b, result)
        return made.astype(result)
    if platform() == "gpu" and single and isinstance(b, Quantised) and of_a[-1] == of_b[b.axis]:
        return row_product(a.ravel(), b).reshape(*a.shape[:-1], -1).astype(result)
    return _multiplied(spec, a, b.astype(dtype)).astype(result)


def _multiplied(
    spec: str, a: jax.Array, b: jax.Array, result: jnp.dtype = jnp.float32
) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=result)


def _two_rows(spec: str, a: jax.Array, b: jax.Array | Quantised) -> jax.Array:
    """A single row with one of zeros below it: libtpu multiplies one row by its vector unit, two by
    its matrix unit, which is faster. Without the barriers XLA would find out.
    """
    a = jnp.pad(a, ((0, 1), *((0, 0),) * (a.ndim - 1)))
    rows = _on_tpu(spec, jax.lax.optimization_barrier(a), b)
    return jax.lax.optimization_barrier(rows)[:1]


def _on_tpu(
    spec: str, a: jax.Array, b: jax.Array | Quantised, result: jnp.dtype = jnp.float32
) -> jax.Array:
    """A product of plain matrices ends in `result`: what devices have to add up travels so
    (D-OPS-25). What is quantised comes in parts, even and odd places, for libtpu would join them in
    float32. Of a and the matrix the smaller one is laid out anew: the parts are joined, or a is
    split as they are and a product made of each, or those are joined.
    """
    if not isinstance(b, Quantised):
        return _multiplied(spec, a, b.astype(a.dtype), result)
    of_a, of_b, out = spec.replace("->", ",").split(",")
    tiled, parts = of_b[b.axis], b.parts(a.dtype)
    if a.size // a.shape[-1] > parts[0].shape[-3 - b.axis]:
        return _multiplied(spec, a, joined(parts, parts[0].ndim + b.axis))
    if tiled not in of_a:
        return joined([_multiplied(spec, a, part) for part in parts], out.index(tiled))
    axis = of_a.index(tiled)
    split = a.reshape(*a.shape[:axis], -1, len(parts), *a.shape[axis + 1 :])
    pieces = (jax.lax.index_in_dim(split, i, axis + 1, False) for i in range(len(parts)))
    return sum(_multiplied(spec, piece, part) for piece, part in zip(pieces, parts))


def _backward(
    spec: str,
    dtype: jnp.dtype,
    result: jnp.dtype,
    operands: tuple[jax.Array, jax.Array | Quantised],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    (a, b), (of_a, of_b, out) = operands, spec.replace("->", ",").split(",")
    da = _product(f"{out},{of_b}->{of_a}", dtype, a.dtype, g, b)
    if isinstance(b, Quantised):
        return da, None
    # in float32, for of 16-bit products libtpu does not scatter the sums
    return da, _product(f"{of_a},{out}->{of_b}", dtype, jnp.float32, a, g).astype(b.dtype)


_product.defvjp(lambda *given: (_product(*given), given[-2:]), _backward)
