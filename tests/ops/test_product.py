"""Products and their gradients against einsum and its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax.ops.matmul import product
from evlm_jax.ops.platform import compile_for

CASES = {
    "...x,xy->...y": ((2, 5, 8), (8, 6)),
    "...d,vd->...v": ((7, 8), (6, 8)),
    "btkgh,bskh->bkgts": ((2, 5, 3, 2, 8), (2, 7, 3, 8)),
}


def _operands(spec: str, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in CASES[spec]]


def _with_gradients(function, *operands):
    out = function(*operands)
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return out, *jax.grad(
        lambda *o: (function(*o).astype(jnp.float32) * weight).sum(), argnums=(0, 1)
    )(*operands)


@pytest.mark.parametrize("spec", CASES)
def test_equals_einsum_with_its_gradients(spec):
    operands = _operands(spec)
    with jax.default_matmul_precision("highest"):
        ours = _with_gradients(lambda a, b: product(spec, a, b), *operands)
        theirs = _with_gradients(lambda a, b: jnp.einsum(spec, a, b), *operands)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("spec", CASES)
def test_rounds_operands_and_cotangent_only(spec):
    """Under "bfloat16", what is computed is the float32 product of rounded operands: nothing else
    is rounded.
    """
    operands = _operands(spec)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in operands]
    with jax.default_matmul_precision("bfloat16"):
        out, of_a, of_b = _with_gradients(lambda a, b: product(spec, a, b), *operands)
    assert out.dtype == of_a.dtype == of_b.dtype == jnp.float32
    with jax.default_matmul_precision("highest"):
        expected = jnp.einsum(spec, *rounded)
        weight = (
            jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
            .reshape(out.shape)
            .astype(jnp.bfloat16)
            .astype(jnp.float32)
        )
        _, transpose = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), *rounded)
    for mine, other in zip((out, of_a, of_b), (expected, *transpose(weight)), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


def test_gradients_have_the_dtype_of_their_operand():
    x, kernel = (
        a.astype(dtype)
        for a, dtype in zip(_operands("...x,xy->...y"), ("bfloat16", "float32"), strict=True)
    )
    out, of_x, of_kernel = _with_gradients(lambda a, b: product("...x,xy->...y", a, b), x, kernel)
    assert (out.dtype, of_x.dtype, of_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert not np.array_equal(
        of_kernel, of_kernel.astype(jnp.bfloat16).astype(jnp.float32)
    )  # it was summed, and stays, in float32


@pytest.mark.parametrize("where", ["cpu", "tpu"])
@pytest.mark.parametrize("spec", CASES)
def test_a_result_in_16_bits_is_rounded_once(spec, where):
    """Within half a step of bfloat16 of the float32 product, also where the product itself ends in
    16 bits; what is given back for operands likewise.
    """
    operands = _operands(spec, "bfloat16")
    with compile_for(where):
        ours = _with_gradients(lambda a, b: product(spec, a, b, result=jnp.bfloat16), *operands)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in operands]
        expected, transpose = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), *wide)
        weight = jnp.cos(jnp.arange(expected.size, dtype=jnp.float32)).reshape(expected.shape)
        rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    for mine, other in zip(ours, (expected, *transpose(rounded)), strict=True):
        assert mine.dtype == jnp.bfloat16
        error = np.abs(mine.astype(jnp.float32) - other)
        assert (error <= 2**-8 * np.abs(other) + 1e-5 * np.abs(other).max()).all()
