"""Products of matrices: operands of one dtype, sums in float32, backward as well.

Unusual: a gradient of our own. JAX's would multiply a float32 cotangent by a 16-bit operand, which
matrix units do at the speed of float32 or not at all. CPUs with AMX gain five times from bfloat16
products of this form, and nothing from others (docs/decisions.md, D-OPS-4)."""

from functools import partial

import jax
import jax.numpy as jnp

from evlm_jax.ops.platform import platform
from evlm_jax.ops.quantised import Quantised, row_product


def product(
    spec: str, a: jax.Array, b: jax.Array | Quantised, dtype: jnp.dtype | None = None
) -> jax.Array:
    """einsum in float32. Each index of an operand must occur in the other one or in the result;
    "..." in front of `a` is any number of indices.

    `b` is cast to the dtype of `a`. Under jax.default_matmul_precision("bfloat16") both are rounded
    to that: XLA does so on TPUs alone. Gradients have the dtype of their operand; that of a float32
    parameter is not rounded on its way. `dtype`: round to that instead.

    A quantised `b` becomes a matrix here, forward and once more backward, so that none is kept in
    between; it has no gradient. A single row by one of two dimensions is `row_product` on GPUs.
    """
    spec = spec.replace("...", "ABCDEF"[: a.ndim + 3 - spec.index(",")])
    return _product(spec, dtype or operand_dtype(a), a, b)


def operand_dtype(a: jax.Array) -> jnp.dtype:
    """Dtype to which the operands of a product with `a` are rounded."""
    return (
        jnp.dtype(jnp.bfloat16)
        if jax.config.jax_default_matmul_precision == "bfloat16"
        else a.dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, dtype: jnp.dtype, a: jax.Array, b: jax.Array | Quantised) -> jax.Array:
    if isinstance(b, Quantised) and a.size == a.shape[-1] and platform() == "gpu":
        of_a, of_b = spec.partition("->")[0].split(",")
        if len(of_b) == 2 and of_a[-1] == of_b[b.axis]:
            return row_product(a.astype(dtype).ravel(), b).reshape(*a.shape[:-1], -1)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _backward(
    spec: str, dtype: jnp.dtype, operands: tuple[jax.Array, jax.Array | Quantised], g: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    (a, b), (of_a, of_b, out) = operands, spec.replace("->", ",").split(",")
    da = _product(f"{out},{of_b}->{of_a}", dtype, g, b).astype(a.dtype)
    if isinstance(b, Quantised):
        return da, None
    return da, _product(f"{of_a},{out}->{of_b}", dtype, a, g).astype(b.dtype)


_product.defvjp(lambda spec, dtype, a, b: (_product(spec, dtype, a, b), (a, b)), _backward)
