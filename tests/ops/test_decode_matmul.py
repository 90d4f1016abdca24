"""Products of packed kernels against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax.ops import decode_matmul
from evlm_jax.ops.matmul import product
from evlm_jax.ops.platform import compile_for
from evlm_jax.ops.quantised import Quantised, dequantise, quantise


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_products(platform, rows, dtype):
    """Every form of the product is the plain one with weights of that dtype; with several rows, and
    on accelerators, rows of that dtype too.
    """
    with compile_for(platform):
        _packed(platform, rows, dtype)


def _packed(platform, rows, dtype):
    kernel = jax.random.normal(jax.random.key(0), (3, 24, 40))
    x = jax.random.normal(jax.random.key(1), (rows, 24))

    def rounded(x, is_rounded=True):
        return x.astype(dtype).astype(jnp.float32) if is_rounded else x

    wanted = rounded(x, rows > 1 or platform != "cpu") @ rounded(kernel[1])
    found = decode_matmul.Packed(decode_matmul.pack(kernel, dtype), None, 1)(x)
    assert jnp.abs(found - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
    head = decode_matmul.pack_head(
        jnp.concatenate([kernel[1]] * 210, 1), dtype
    )  # several pieces, the last one padded
    found = decode_matmul.logits(head, x, 8400)
    assert jnp.abs(found - jnp.tile(wanted, (1, 210))).max() <= 1e-5 * jnp.abs(wanted).max()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_quantised_products(rows, kind):
    """Every form of the product is the plain one with the matrix that the bytes stand for; a head
    comes by its rows of words.
    """
    pytest.importorskip("qwix")
    stack = np.random.default_rng(0).standard_normal((3, 96, 40), np.float32)
    bits, scales = zip(*(quantise(matrix, kind, 32, -2) for matrix in stack))
    kernel = Quantised(jnp.stack(bits), jnp.stack(scales), kind, -2)
    x = jax.random.normal(jax.random.key(1), (rows, 96))
    wanted = x @ dequantise(bits[1], scales[1], kind, -2)
    found = decode_matmul.Packed(kernel, None, 1)(x)
    assert jnp.abs(found - wanted).max() <= 1e-6 * jnp.abs(wanted).max()
    table = Quantised(
        *map(jnp.asarray, quantise(np.tile(stack[1].T, (210, 1)), kind, 32, -1)), kind, -1
    )
    head = decode_matmul.pack_head(table.T, "float32")
    assert head.pieces > 1
    found = decode_matmul.logits(head, x, 8400)
    assert jnp.abs(found - jnp.tile(wanted, (1, 210))).max() <= 1e-6 * jnp.abs(wanted).max()


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_quantised_matrices_on_tpus(kind, axis, rows):
    """The products by parts are that with the whole matrix, and so are their gradients; beside few
    rows the matrix is nowhere put together.
    """
    pytest.importorskip("qwix")
    matrix = np.random.default_rng(0).standard_normal((96, 64), np.float32)
    bits, scale = quantise(matrix, kind, 32, axis)
    held = Quantised(jnp.asarray(bits), jnp.asarray(scale), kind, axis)
    whole = jnp.asarray(dequantise(bits, scale, kind, axis))
    for spec, width in (("...x,xy->...y", 96), ("...x,yx->...y", 64)):
        x = jax.random.normal(jax.random.key(1), (1, rows, width))
        out, transpose = jax.vjp(lambda x, spec=spec: product(spec, x, whole), x)
        g = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        with compile_for("tpu"):
            found, back = jax.vjp(lambda x, spec=spec: product(spec, x, held), x)
            (of_x,) = back(g)
            text = str(jax.make_jaxpr(lambda x, spec=spec: product(spec, x, held))(x))
        assert kind == "int8" or ("[96,64]" in text) == (rows == 200)
        for mine, wanted in ((found, out), (of_x, *transpose(g))):
            assert mine.shape == wanted.shape
            assert jnp.abs(mine - wanted).max() <= 1e-5 * jnp.abs(wanted).max()


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_row_by_a_quantised_matrix_on_gpus(kind, axis):
    """As sums of scaled rows it is the product with the matrix; with the other axis, as in a
    backward pass, the matrix is made.
    """
    pytest.importorskip("qwix")
    matrix = np.random.default_rng(0).standard_normal((96, 64), np.float32)
    bits, scale = quantise(matrix, kind, 32, axis)
    held = Quantised(jnp.asarray(bits), jnp.asarray(scale), kind, axis)
    whole = dequantise(bits, scale, kind, axis)
    x = jax.random.normal(jax.random.key(1), (1, 1, 64 if axis == -1 else 96))
    y = jax.random.normal(jax.random.key(2), (1, 1, 96 if axis == -1 else 64))
    forward = "...x,yx->...y" if axis == -1 else "...x,xy->...y"
    back = "...x,xy->...y" if axis == -1 else "...x,yx->...y"
    for spec, row in ((forward, x), (back, y)):
        with compile_for("gpu"):
            text = str(jax.make_jaxpr(lambda row, spec=spec: product(spec, row, held))(row))
            found = product(spec, row, held)
        assert ("dot_general" in text) == (spec == back)
        wanted = jnp.einsum(spec, row, whole, precision="highest")
        assert found.shape == wanted.shape
        assert jnp.abs(found - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
