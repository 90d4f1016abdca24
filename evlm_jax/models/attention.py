"""Self-attention of the language model and the ViT. Letters: see config/__init__.py."""

import jax
import jax.numpy as jnp

from evlm_jax.config import LLMConfig
from evlm_jax.ops.matmul import product

NEGATIVE = -1e30  # finite, so that a row that sees nothing gives numbers and not NaN


@jax.named_scope("scores")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    scale: float = 0.0,
    cap: float = 0.0,
    sums: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention, in float32: q [B, T, N, H], k and v [B, S, K, H] with K dividing N, mask
    [B, T, S] -> [B, T, N, H]; `scale` and `cap` as query and score_cap of Scales.

    With `sums` also the logarithm of the sum of the exponentials of scores, float32 [B, T, N].

    Queries of one key head are stacked along T, so that both products are plain matrix products for
    each (B, K): on CPU half the time of an einsum that leaves the layout to the compiler.
    """
    b, t, n, h = q.shape
    kv, group = k.shape[2], n // k.shape[2]
    q = q.reshape(b, t, kv, group, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, group * t, h)
    scores = product("bkqh,bskh->bkqs", q, k) * (scale or h**-0.5)
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    if mask is not None:
        scores = jnp.where(jnp.tile(mask, (1, group, 1))[:, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("bkqs,bskh->bkqh", weights, v).astype(v.dtype).reshape(b, kv, group, t, h)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
    if not sums:
        return out
    total = jax.nn.logsumexp(scores, axis=-1).reshape(b, kv, group, t)
    return out, total.transpose(0, 3, 1, 2).reshape(b, t, n)


def within_window(
    cfg: LLMConfig,
    mask: jax.Array,
    positions: jax.Array,
    number: jax.Array | int,
    asking: jax.Array | None = None,
) -> jax.Array:
    """A mask [B, t, T] within the window of layer `number`, which counts `positions` [B, T] of the
    texts: neighbours in a row may be far apart where dialogs branch. `asking`: [B, t], positions of
    the queries where they are not those of all keys.
    """
    if not any(cfg.layer_windows):
        return mask
    window = jnp.array([own or mask.shape[2] for own in cfg.layer_windows])[number]
    asking = positions if asking is None else asking
    return mask & (asking[:, :, None] - positions[:, None, :] < window)


def text_mask(visible_until: jax.Array) -> jax.Array:
    """[B, T] -> [B, T, T]: query q sees key k iff k <= q < visible_until[k].

    Two documents of 2 and 3 tokens, visible_until = 2 2 5 5 5:

        q\\k  0 1 2 3 4
         0   x
         1   x x
         2       x
         3       x x
         4       x x x
    """
    index = jnp.arange(visible_until.shape[1])
    return (index[None, None, :] <= index[None, :, None]) & (
        index[None, :, None] < visible_until[:, None, :]
    )
