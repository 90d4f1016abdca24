"""Attention by cuDNN, through jax.nn, on GPUs: scores stay out of HBM, forward and backward."""

import jax
import jax.numpy as jnp

from evlm_jax.ops.platform import platform


@jax.named_scope("scores")
def fused_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    scale: float = 0.0,
) -> jax.Array:
    """As `models.attention.attention`, without its cap and sums: q [B, T, N, H], k and v
    [B, S, K, H] in bfloat16, mask [B, T, S] -> [B, T, N, H]. Off GPUs jax.nn computes it by XLA.

    Raises ValueError where cuDNN is missing or does not take heads of this width.
    """
    (rows, asking, _, width), keys = q.shape, k.shape[1]
    # cuDNN's backward pass takes even lengths alone; 257 tokens of a ViT become 258
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = None
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, asking % 2), (0, keys % 2)))[:, None]
    elif keys % 2:
        lengths = jnp.full(rows, keys, jnp.int32)
    try:
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale or width**-0.5,
            key_value_seq_lengths=lengths,
            implementation="cudnn" if platform() == "gpu" else "xla",
        )
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"train.attention = 'cudnn': {error} Take 'xla'.") from error
    return out[:, :asking]
