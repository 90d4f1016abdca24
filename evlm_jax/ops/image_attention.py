"""Attention of an image's tokens to one another by the kernels of attention_kernels.py, without a
mask. A pair is a block of an image's queries and all of its keys."""

import jax
import jax.numpy as jnp
import numpy as np

from evlm_jax.ops.attention_kernels import Form, attend, walks

ROWS = 512  # most queries of a block: scores of all of 1,025 would fill a core's memory
SUBLANES = 16  # rows of a tile of 16-bit numbers


def block_rows(length: int) -> int:
    """Queries of a block, so that blocks of an image's `length` tokens are few and equal."""
    count = -(-length // ROWS)
    return length if count == 1 else -(-length // (count * SUBLANES)) * SUBLANES


@jax.named_scope("scores")
def image_attention(q: jax.Array, k: jax.Array, v: jax.Array, width: int = 0) -> jax.Array:
    """q [B, S, N, H], k and v [B, S, K, H] of B images -> [B, S, N, H]; softmax in float32.

    `width`: of a head where zeros are behind it up to H; 0: H.
    """
    images, length, heads, lanes = q.shape
    rows = block_rows(length)
    q = jnp.pad(q, ((0, 0), (0, -length % rows), (0, 0), (0, 0)))
    blocks = np.arange(images * (q.shape[1] // rows), dtype=np.int32)
    with jax.ensure_compile_time_eval():
        owner = jnp.asarray(blocks // (q.shape[1] // rows))
        by = walks(jnp.asarray(blocks), owner, jnp.ones(len(blocks), bool), images)
    out = attend(
        q.reshape(-1, rows, heads, lanes),
        k,
        v,
        None,
        by,
        Form("image_attention", (width or lanes) ** -0.5),
    )
    return out.reshape(q.shape)[:, :length]
