"""Products of packed kernels against plain ones."""

import jax
import jax.numpy as jnp
import pytest

from evlm_jax.ops import decode_matmul


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_products(rows, dtype):
    """Every form of the product is the plain one with weights of that dtype; with several rows,
    rows of that dtype too.
    """
    kernel = jax.random.normal(jax.random.key(0), (3, 24, 40))
    x = jax.random.normal(jax.random.key(1), (rows, 24))

    def rounded(x, is_rounded=True):
        return x.astype(dtype).astype(jnp.float32) if is_rounded else x

    wanted = rounded(x, rows > 1) @ rounded(kernel[1])
    found = decode_matmul.Packed(decode_matmul.pack(kernel, dtype), None, 1)(x)
    assert jnp.abs(found - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
    head = decode_matmul.pack_head(
        jnp.concatenate([kernel[1]] * 210, 1), dtype
    )  # several pieces, the last one padded
    found = decode_matmul.logits(head, x, 8400)
    assert jnp.abs(found - jnp.tile(wanted, (1, 210))).max() <= 1e-5 * jnp.abs(wanted).max()
