"""Cross-attention over images by (query block, image) pairs, with the zero sink. The plan comes
from ops/attention_plan.py.

Every pair is a plain attention of a block's tokens over one image, without a mask. Pairs of one
block (frames of a video) are merged by log-sum-exp. n zero keys add n to the softmax denominator
and nothing to the numerator, so the sink is one factor sigmoid(lse - log n) after the merge, and no
zero is ever stored. A token that sees no image gets exactly 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.ops.matmul import product


class AttentionPlan(NamedTuple):
    """The plan's fields of Batch; shapes and padding as documented there."""

    block_tokens: jax.Array
    token_place: jax.Array
    pair_block: jax.Array
    pair_image: jax.Array


@jax.custom_vjp
def permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [A, ...] -> `x[index]` [C, ...], 0 where index is out of range.

    `inverse` makes the gradient a gather as well.
    """
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


permute.defvjp(
    lambda x, index, inverse: (permute(x, index, inverse), inverse),
    lambda inverse, g: (jnp.take(g, inverse, axis=0, mode="fill", fill_value=0), None, None),
)


@jax.named_scope("scores")
def grouped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: AttentionPlan, sinks: int
) -> jax.Array:
    """q [B, T, N, H], k and v [C, I, S, K, H] -> [B, T, N, H]; softmax and merge in float32.

    B / C neighbouring rows are an image group.
    """
    groups = q.reshape(len(k), -1, *q.shape[2:])
    return jax.vmap(lambda q, k, v, *plan: _group_attention(q, k, v, AttentionPlan(*plan), sinks))(
        groups, k, v, *map(jnp.asarray, plan)
    ).reshape(q.shape)


def _group_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: AttentionPlan, sinks: int
) -> jax.Array:
    (n, h), (blocks, block), kv = q.shape[1:], plan.block_tokens.shape, k.shape[2]
    grouped = permute(q, plan.block_tokens.reshape(-1), plan.token_place).reshape(
        blocks, block, kv, n // kv, h
    )
    owner = jnp.minimum(
        plan.pair_block, blocks - 1
    )  # padding pairs compute something that nobody reads
    scores = product("ptkgh,pskh->pkgts", grouped[owner], k[plan.pair_image]) * h**-0.5
    top = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = product("pkgts,pskh->pkgth", weights.astype(v.dtype), v[plan.pair_image])

    # Merge the pairs of a block: rescale all to the block's largest score, then add. The sink joins
    # here, as `sinks` logits of 0.
    def merge(x):
        return jax.ops.segment_sum(x, plan.pair_block, blocks, indices_are_sorted=True)

    block_top = jax.ops.segment_max(top, plan.pair_block, blocks, indices_are_sorted=True)
    block_top = (
        jnp.maximum(block_top, 0.0) if sinks else jnp.where(jnp.isfinite(block_top), block_top, 0.0)
    )
    padding = (plan.pair_block == blocks)[:, None, None, None]
    scale = jnp.where(padding, 0.0, jnp.exp(top - block_top[owner]))
    denominator = merge(total * scale) + (sinks * jnp.exp(-block_top) if sinks else 0.0)
    merged = merge(out * scale[..., None]) / jnp.where(denominator > 0, denominator, 1.0)[..., None]
    merged = merged.transpose(0, 3, 1, 2, 4).reshape(blocks * block, n, h).astype(q.dtype)
    return permute(merged, plan.token_place, plan.block_tokens.reshape(-1))
