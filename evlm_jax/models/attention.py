"""Self-attention of the language model and the ViT. Letters: see config.py."""

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that a row that sees nothing gives numbers and not NaN


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H] with K dividing N, mask [B, T, S] -> [B, T, N, H]. Softmax in float32."""
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * h**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def text_mask(seen_until: jax.Array) -> jax.Array:
    """[B, T] -> [B, T, T]: query q sees key k iff k <= q < seen_until[k].

    Two documents of 2 and 3 tokens, seen_until = 2 2 5 5 5:

        q\\k  0 1 2 3 4
         0   x
         1   x x
         2       x
         3       x x
         4       x x x
    """
    index = jnp.arange(seen_until.shape[1])
    return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < seen_until[:, None, :])
