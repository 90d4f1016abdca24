"""Attention of pairs of blocks, for CPUs: a loop over the pairs, one after the other.

What a pair reads and computes stays in a core's caches: neither are the keys of all pairs gathered,
nor is anything of all of them laid out again. Scores are kept for the backward pass, which makes
four products a pair. Letters as in attention_kernels.py, and P pairs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.ops.matmul import operand_dtype, product

NEGATIVE = -1e30  # finite: its gradients are numbers


class Pairs(NamedTuple):
    """What is computed; a pair that is not real counts nothing."""

    queries: jax.Array  # [P] int32, number of the block, in range
    keys: jax.Array  # [P] int32
    real: jax.Array  # [P] bool
    there: jax.Array | None = None  # [Y, S] bool, keys that a block has; None: all


def attend(q: jax.Array, k: jax.Array, v: jax.Array, pairs: Pairs, sinks: int) -> jax.Array:
    """q [X, b, N, H], k and v [Y, S, K, H] -> [X, b, N, H]; zeros in blocks without a pair."""
    return _attend(q, k, v, pairs, sinks, operand_dtype(q))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, pairs, sinks, dtype) -> jax.Array:
    return _forward(q, k, v, pairs, sinks, dtype)[0]


def _by_heads(x: jax.Array, kv: int) -> jax.Array:
    """[X, b, N, H] -> [X, K, N / K, b, H]."""
    return x.reshape(*x.shape[:2], kv, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _by_rows(x: jax.Array) -> jax.Array:
    """[X, K, N / K, b, H] -> [X, b, N, H]."""
    return x.transpose(0, 3, 1, 2, 4).reshape(len(x), x.shape[3], -1, x.shape[4])


def _put(x: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)


def _at(x: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, at, 0, keepdims=False)


def _forward(q, k, v, pairs, sinks, dtype) -> tuple[jax.Array, tuple]:
    times = partial(product, dtype=dtype)
    queries, keys, width = _by_heads(q, k.shape[2]), k.shape[1], q.shape[-1]
    rows, count = queries.shape[:-1], len(pairs.queries)

    def step(i, carry):
        top, total, out, kept = carry
        block, image, real = pairs.queries[i], pairs.keys[i], pairs.real[i]
        scores = times("kgbh,skh->kgbs", _at(queries, block), _at(k, image)) * width**-0.5
        seen = real if pairs.there is None else real & _at(pairs.there, image)
        scores, before = jnp.where(seen, scores, NEGATIVE), _at(top, block)
        now = jnp.where(real, jnp.maximum(before, scores.max(-1)), before)
        weights = jnp.where(real, jnp.exp(scores - now[..., None]), 0.0)
        shrink = jnp.exp(before - now)
        added = times("kgbs,skh->kgbh", weights, _at(v, image))
        return (
            _put(top, now, block),
            _put(total, _at(total, block) * shrink + weights.sum(-1), block),
            _put(out, _at(out, block) * shrink[..., None] + added, block),
            _put(kept, scores, i),
        )

    top = jnp.full(rows, 0.0 if sinks else NEGATIVE, jnp.float32)
    total = jnp.full(rows, sinks, jnp.float32)
    kept = jnp.zeros((count, *rows[1:], keys), jnp.float32)
    carry = top, total, jnp.zeros(queries.shape, jnp.float32), kept
    top, total, out, kept = jax.lax.fori_loop(0, count, step, carry)
    total = jnp.where(total > 0, total, 1.0)  # of a block without a pair
    out = _by_rows(out / total[..., None]).astype(q.dtype)
    return out, (q, k, v, pairs, out, top + jnp.log(total), kept)


def _backward(sinks: int, dtype: jnp.dtype, saved: tuple, g: jax.Array) -> tuple:
    times = partial(product, dtype=dtype)
    q, k, v, pairs, out, lse, kept = saved
    queries, weighed = _by_heads(q, k.shape[2]), _by_heads(g, k.shape[2])
    # what the gradient of a row's weights has too much, the sum over its outputs
    spare = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True)
    spare = _by_heads(spare, k.shape[2])

    def step(i, carry):
        dq, dk, dv = carry
        block, image = pairs.queries[i], pairs.keys[i]
        weights = jnp.exp(_at(kept, i) - _at(lse, block)[..., None])
        weights = jnp.where(pairs.real[i], weights, 0.0)
        into = times("kgbh,skh->kgbs", _at(weighed, block), _at(v, image)) - _at(spare, block)
        into = weights * into * q.shape[-1] ** -0.5
        of_q = times("kgbs,skh->kgbh", into, _at(k, image))
        of_k = times("kgbs,kgbh->skh", into, _at(queries, block))
        of_v = times("kgbs,kgbh->skh", weights, _at(weighed, block))
        return (
            _put(dq, _at(dq, block) + of_q, block),
            _put(dk, _at(dk, image) + of_k, image),
            _put(dv, _at(dv, image) + of_v, image),
        )

    carry = [jnp.zeros(x.shape, jnp.float32) for x in (queries, k, v)]
    dq, dk, dv = jax.lax.fori_loop(0, len(pairs.queries), step, tuple(carry))
    return _by_rows(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
