"""Grouped attention against a dense NumPy oracle with materialised zero keys:
values and gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.ops.attention_plan import attention_plan, block_pair_count
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from tests.helpers.attention import values_and_gradients

T, IMAGES, S, N, KV, H, QUERY_BLOCK, PAIRS = 14, 5, 7, 4, 2, 8, 4, 40


def dense(q, k, v, start, stop, sinks):
    """Every token by itself: softmax over the keys it sees and `sinks` zero keys with zero values;
    0 where it sees none.
    """
    out = []
    for t in range(q.shape[0]):
        keys, values = (
            k[start[t] : stop[t]].reshape(-1, KV, H),
            v[start[t] : stop[t]].reshape(-1, KV, H),
        )
        zeros = jnp.zeros((sinks, KV, H))
        keys, values = (
            jnp.repeat(jnp.concatenate([a, zeros]), N // KV, axis=1) for a in (keys, values)
        )
        if not len(keys):
            out.append(jnp.zeros((N, H)))
            continue
        weights = jax.nn.softmax(jnp.einsum("nh,snh->ns", q[t], keys) * H**-0.5, axis=-1)
        out.append(jnp.einsum("ns,snh->nh", weights, values))
    return jnp.stack(out)


def arrays(seed: int):
    """q [T, N, H], k and v [IMAGES, S, KV, H], with scores large enough that a wrong maximum
    shows.
    """
    rng = np.random.default_rng(seed)
    shapes = (T, N, H), (IMAGES, S, KV, H), (IMAGES, S, KV, H)
    return [jnp.array(3 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def ranges(seed: int):
    """Random visible ranges: none, one image, or several (a video)."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, IMAGES, T)
    stop = np.minimum(start + rng.choice([0, 1, 1, 1, 3], T), IMAGES)
    return start.astype(np.int32), stop.astype(np.int32)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.pinned)])
@pytest.mark.parametrize("form", ["xla", "loop"])
def test_equals_dense_oracle_forward_and_gradient(sinks, seed, form):
    q, k, v = arrays(seed)
    start, stop = ranges(seed)
    grouping = AttentionPlan(
        **{
            name: jnp.array(x)[None]
            for name, x in attention_plan(start, stop, QUERY_BLOCK, PAIRS).items()
        }
    )
    weight = jnp.array(np.random.default_rng(9).standard_normal((T, N, H)), jnp.float32)

    @jax.jit
    def ours(q, k, v):
        return grouped_attention(q[None], k[None], v[None], grouping, sinks, form=form)[0]

    with jax.default_matmul_precision("highest"):
        oracle = jax.jit(lambda q, k, v: dense(q, k, v, start, stop, sinks))
        expected, got = oracle(q, k, v), ours(q, k, v)
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())

        def gradient(f):
            return jax.jit(jax.grad(lambda *a: (f(*a) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)

        for mine, theirs in zip(gradient(ours), gradient(oracle), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())
    blind = start >= stop
    assert blind.any() and not np.asarray(got)[blind].any(), (
        "a token that sees no image gets exactly 0"
    )
    assert not np.asarray(gradient(ours)[0])[blind].any(), "and its query gets exactly no gradient"


@pytest.mark.parametrize("sinks", [0, 1])
def test_forms_agree_on_keys_that_are_not_there(sinks):
    """Two image groups, in bfloat16 products as well."""
    q, k, v = (np.stack([own, own[::-1]]) for own in arrays(3))
    plans = [attention_plan(*ranges(seed), QUERY_BLOCK, PAIRS) for seed in (3, 4)]
    plan = AttentionPlan(*(np.stack([p[name] for p in plans]) for name in AttentionPlan._fields))
    there = np.random.default_rng(0).random((2, IMAGES, S)) < 0.5
    there[..., 0] = True
    for precision, bound in (("highest", 1e-5), ("bfloat16", 0.02)):
        loop, xla = (
            values_and_gradients(
                lambda *qkv, form=form: grouped_attention(*qkv, plan, sinks, there, form),
                [q, k, v],
                precision,
            )
            for form in ("loop", "xla")
        )
        for mine, theirs in zip(loop, xla, strict=True):
            np.testing.assert_allclose(mine, theirs, 0, bound * np.abs(theirs).max())


@pytest.mark.parametrize("form", ["xla", "loop"])
def test_other_images_change_no_bit(form):
    q, k, v = arrays(2)
    start, stop = ranges(2)
    grouping = AttentionPlan(
        **{
            name: jnp.array(x)[None]
            for name, x in attention_plan(start, stop, QUERY_BLOCK, PAIRS).items()
        }
    )
    run = jax.jit(
        lambda k, v: grouped_attention(q[None], k[None], v[None], grouping, 1, form=form)[0]
    )
    before = run(k, v)
    for image in range(IMAGES):
        after = run(k.at[image].add(1.0), v.at[image].multiply(-2.0))
        sees = (start <= image) & (image < stop)
        assert (np.asarray(after)[~sees] == np.asarray(before)[~sees]).all()
        assert (np.asarray(after)[sees] != np.asarray(before)[sees]).any(axis=(1, 2)).all()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=40),
    st.integers(1, 8),
)
def test_plan_puts_every_seeing_token_in_one_block_of_its_range(spans, query_block):
    start = np.array([a for a, _ in spans])
    stop = np.array([a + n for a, n in spans])
    need = block_pair_count(start, stop, query_block)
    grouping = attention_plan(start, stop, query_block, max(need, 1))
    flat = grouping["block_tokens"].reshape(-1)
    for token in range(len(spans)):
        places = np.flatnonzero(flat == token)
        assert len(places) == (stop[token] > start[token])
        if len(places):
            assert grouping["token_place"][token] == places[0]
            images = grouping["pair_image"][grouping["pair_block"] == places[0] // query_block]
            assert images.tolist() == list(range(start[token], stop[token]))
        else:
            assert grouping["token_place"][token] == len(flat)
    assert (np.diff(grouping["pair_block"]) >= 0).all()
    if need:
        with pytest.raises(ValueError, match="data.block_pairs"):
            attention_plan(start, stop, query_block, need - 1)
