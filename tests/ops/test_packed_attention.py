"""Self-attention of packed rows by kernels, interpreted, against the masked dense form; the blocks
that are visited, against the mask itself."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from evlm_jax.models.attention import attention, text_mask
from evlm_jax.ops.packed_attention import block_tokens, packed_attention, visible_blocks
from evlm_jax.ops.platform import compile_for
from evlm_jax.parallel.compiler import uncached
from evlm_jax.planning import chips

needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason='pip install -e ".[plan]"'
)


def packed_row(rng: np.random.Generator, length: int) -> np.ndarray:
    """`until` [T] of documents of random lengths: a trunk and dialogs behind it that do not see one
    another; padding at the end.
    """
    until, at = np.arange(length) + 1, 0
    while at < length - length // 10:
        trunk, *dialogs = rng.integers(1, max(2, length // 4), rng.integers(1, 4))
        end = min(at + trunk + sum(dialogs), length)
        until[at : min(at + trunk, end)] = end
        begin = at + trunk
        for dialog in dialogs:
            until[begin : begin + dialog] = min(begin + dialog, end)
            begin += dialog
        at = end
    return until.astype(np.int32)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 9))
def test_blocks_are_visited_iff_a_pair_in_them_is_visible(seed, block, count):
    rng = np.random.default_rng(seed)
    until = np.stack([packed_row(rng, block * count) for _ in range(2)])
    index = np.arange(block * count)
    mask = (index <= index[:, None]) & (index[:, None] < until[:, None])
    tiles = mask.reshape(2, count, block, count, block).any((2, 4))
    queries, keys, seen = visible_blocks(until, block)
    assert (queries // count == keys // count).all()
    visited = np.zeros_like(tiles)
    visited[queries // count, queries % count, keys % count] = seen
    assert (visited == tiles).all()


@pytest.mark.parametrize("length", [2048, 4096, 8192])
def test_a_row_of_one_document_visits_little_more_than_it_sees(length):
    block = block_tokens(length)
    visited = visible_blocks(np.full((1, length), length), block)[2].sum() * block**2
    assert 1 < visited / (length * (length + 1) / 2) <= 1.1


@pytest.mark.parametrize(("heads", "kv", "cap"), [(2, 2, 0.0), (4, 2, 5.0)])
def test_equals_the_masked_dense_form(heads, kv, cap):
    """Forward and every gradient, of rows that no block divides."""
    rng, length, width = np.random.default_rng(0), 300, 16
    until = jnp.asarray(np.stack([packed_row(rng, length) for _ in range(2)]))
    q, k, v, weight = (
        jnp.asarray(2 * rng.standard_normal((2, length, count, width)), jnp.float32)
        for count in (heads, kv, kv, heads)
    )

    def run(attend):
        def weighed(*arrays):
            out = attend(*arrays)
            return (out * weight).sum(), out

        step = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))
        with jax.default_matmul_precision("highest"):
            (_, out), gradients = step(q, k, v)
        return [np.asarray(x) for x in (out, *gradients)]

    found = run(lambda q, k, v: packed_attention(q, k, v, until, cap=cap))
    expected = run(lambda q, k, v: attention(q, k, v, text_mask(until), cap=cap))
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, 0, 1e-5 * np.abs(theirs).max(), name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1", "v5p:1", "v6e:1", "tpu7x:1"])
@pytest.mark.parametrize(("width", "length"), [(128, 2048), (64, 4096)])
def test_compiles_for_chips(topology, width, length):
    """Three kernels, and no array [T, T]."""
    device = chips.devices(topology)[0][0]

    def spec(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    q, k = (spec("bfloat16", 2, length, count, width) for count in (4, 2))

    def step(q, k, v, until):
        def total(*arrays):
            return packed_attention(*arrays, until).astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    with compile_for("tpu"), uncached(device):
        lowered = jax.jit(step).lower(q, k, k, spec("int32", 2, length))
        text = lowered.compile().as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3
    assert not re.search(rf"\[[\d,]*{length},{length}\]", text)
