"""Cross-attention over images by (query block, image) pairs, with the zero sink. The plan comes
from ops/attention_plan.py.

Every pair is a plain attention of a block's tokens over one image, without a mask but for what an
image does not have. Pairs of one block (frames of a video) are merged by log-sum-exp. n zero keys
add n to the softmax denominator and nothing to the numerator, so the sink is one factor
sigmoid(lse - log n) after the merge, and no zero is ever stored. A token that sees no image gets
exactly 0."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.ops import attention_loop
from evlm_jax.ops.attention_loop import NEGATIVE, Pairs
from evlm_jax.ops.matmul import product
from evlm_jax.ops.platform import platform

# {form of train.attention: its platform, dtypes that it takes}; "xla" is for all
FORMS = {"pallas": ("tpu", ("float32", "bfloat16")), "cudnn": ("gpu", ("bfloat16",))}


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


def attention_form(wanted: str, dtype: jnp.dtype | str) -> str:
    """What is wanted of FORMS where what is traced will run on its platform, with activations of
    one of its dtypes; "xla" elsewhere.
    """
    home, dtypes = FORMS.get(wanted, ("", ()))
    return wanted if platform() == home and jnp.dtype(dtype).name in dtypes else "xla"


@jax.named_scope("scores")
def grouped_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: AttentionPlan,
    sinks: int,
    there: jax.Array | None = None,
    form: str = "xla",
    sums: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """q [B, T, N, H], k and v [C, I, S, K, H] -> [B, T, N, H]; softmax and merge in float32. With
    `sums`, which only the form "xla" has, also the logarithm of the sum of the exponentials of
    scores, float32 [B, T, N]; NEGATIVE where a token sees no image.

    B / C neighbouring rows are an image group. `there`: bool [C, I, S], which keys an image has,
    one at least; None: all. `form` "pallas" is a kernel for TPUs, which has no `there`, "loop" is
    for CPUs.
    """
    plan = AttentionPlan(*map(jnp.asarray, plan))
    groups, tokens = q.reshape(len(k), -1, *q.shape[2:]), plan.block_tokens.reshape(len(k), -1)
    blocks = jax.vmap(permute)(groups, tokens, plan.token_place)
    blocks = blocks.reshape(*plan.block_tokens.shape, *q.shape[2:])
    if form == "pallas":
        attend = partial(_by_kernels, sinks=sinks)
    elif form == "loop":
        attend = partial(_by_loop, there, sinks=sinks)
    else:
        attend = partial(jax.vmap(partial(_group_attention, sinks=sinks, sums=sums)), there)
    found = attend(blocks, k, v, plan.pair_block, plan.pair_image)

    def back(x):  # [C, J, b, N, ...] -> [B, T, N, ...]
        rest = x.shape[3:]
        out = jax.vmap(permute)(x.reshape(*tokens.shape, *rest), plan.token_place, tokens)
        return out.reshape(*q.shape[:2], *rest)

    if not sums:
        return back(found)
    out, total = map(back, found)
    seen = (plan.token_place < tokens.shape[1]).reshape(*q.shape[:2], 1)
    return out, jnp.where(seen, total, NEGATIVE)


def _flat(
    q: jax.Array, k: jax.Array, pair_block: jax.Array, pair_image: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs of all groups [C * P] in one list: their blocks, their images, and whether they are no
    padding.
    """
    real = pair_block < q.shape[1]
    group = jnp.arange(len(q))[:, None]
    blocks = jnp.where(real, pair_block, 0) + group * q.shape[1]
    return blocks.reshape(-1), (pair_image + group * k.shape[1]).reshape(-1), real.reshape(-1)


def _by_kernels(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pair_block: jax.Array,
    pair_image: jax.Array,
    sinks: int,
) -> jax.Array:
    """All groups in one kernel: q [C, J, b, N, H], k and v [C, I, S, K, H], pairs [C, P] ->
    [C, J, b, N, H].
    """
    from evlm_jax.ops.attention_kernels import Form, attend, walks  # Pallas is slow to import

    by = walks(*_flat(q, k, pair_block, pair_image), len(k) * k.shape[1])
    arrays = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    form = Form("pair_attention", q.shape[-1] ** -0.5, sinks)
    return attend(*arrays, None, by, form).reshape(q.shape)


def _by_loop(
    there: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pair_block: jax.Array,
    pair_image: jax.Array,
    sinks: int,
) -> jax.Array:
    """As `_by_kernels`."""
    there = None if there is None else there.reshape(-1, there.shape[-1])
    pairs = Pairs(*_flat(q, k, pair_block, pair_image), there)
    arrays = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    return attention_loop.attend(*arrays, pairs, sinks).reshape(q.shape)


def _group_attention(
    there: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pair_block: jax.Array,
    pair_image: jax.Array,
    sinks: int,
    sums: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """q [J, b, N, H], k and v [I, S, K, H], pairs [P] -> [J, b, N, H]; with `sums` as
    `grouped_attention`, [J, b, N].
    """
    (blocks, block, n, h), kv = q.shape, k.shape[2]
    grouped = q.reshape(blocks, block, kv, n // kv, h)
    owner = jnp.minimum(pair_block, blocks - 1)  # padding pairs compute something that nobody reads
    scores = product("ptkgh,pskh->pkgts", grouped[owner], k[pair_image]) * h**-0.5
    if there is not None:
        scores = jnp.where(there[pair_image][:, None, None, None], scores, NEGATIVE)
    top = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = product("pkgts,pskh->pkgth", weights.astype(v.dtype), v[pair_image])

    # Merge the pairs of a block: rescale all to the block's largest score, then add. The sink joins
    # here, as `sinks` logits of 0.
    def merge(x):
        return jax.ops.segment_sum(x, pair_block, blocks, indices_are_sorted=True)

    block_top = jax.ops.segment_max(top, pair_block, blocks, indices_are_sorted=True)
    block_top = (
        jnp.maximum(block_top, 0.0) if sinks else jnp.where(jnp.isfinite(block_top), block_top, 0.0)
    )
    padding = (pair_block == blocks)[:, None, None, None]
    scale = jnp.where(padding, 0.0, jnp.exp(top - block_top[owner]))
    denominator = merge(total * scale) + (sinks * jnp.exp(-block_top) if sinks else 0.0)
    denominator = jnp.where(denominator > 0, denominator, 1.0)
    merged = merge(out * scale[..., None]) / denominator[..., None]
    out = merged.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    if not sums:
        return out
    total = block_top + jnp.log(denominator)
    return out, total.transpose(0, 3, 1, 2).reshape(q.shape[:3])
