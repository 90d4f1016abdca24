"""Self-attention of packed rows by kernels, interpreted, against the masked dense form; the blocks
that are visited, against the mask itself."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.models.attention import attention, text_mask
from evlm_jax.ops.packed_attention import block_tokens, packed_attention, visible_blocks
from tests.helpers.attention import (
    assert_close,
    compiled_text,
    needs_compiler,
    values_and_gradients,
)


def packed_row(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`until` [T], and positions in their texts, of documents of random lengths: a trunk and
    dialogs behind it that do not see one another; padding at the end.
    """
    until, positions, at = np.arange(length) + 1, np.zeros(length, int), 0
    while at < length - length // 10:
        trunk, *dialogs = rng.integers(1, max(2, length // 4), rng.integers(1, 4))
        end = min(at + trunk + sum(dialogs), length)
        until[at : min(at + trunk, end)] = end
        positions[at:end] = np.arange(end - at)
        begin = at + trunk
        for dialog in dialogs:
            until[begin : begin + dialog] = min(begin + dialog, end)
            positions[begin : min(begin + dialog, end)] = (trunk + np.arange(dialog))[
                : max(end - begin, 0)
            ]
            begin += dialog
        at = end
    return until.astype(np.int32), positions.astype(np.int32)


def packed_rows(rng: np.random.Generator, length: int) -> list[np.ndarray]:
    """Of two rows."""
    return [np.stack(own) for own in zip(*(packed_row(rng, length) for _ in range(2)))]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 9), st.integers(0, 20))
def test_blocks_are_visited_iff_a_pair_in_them_is_visible(seed, block, count, window):
    until, place = packed_rows(np.random.default_rng(seed), block * count)
    index = np.arange(block * count)
    mask = (index <= index[:, None]) & (index[:, None] < until[:, None])
    if window:
        mask &= place[:, :, None] - place[:, None] < window
    tiles = mask.reshape(2, count, block, count, block).any((2, 4))
    queries, keys, seen = visible_blocks(until, block, place, window)
    assert (queries // count == keys // count).all()
    visited = np.zeros_like(tiles)
    visited[queries // count, queries % count, keys % count] = seen
    assert (visited == tiles).all()


@pytest.mark.parametrize("length", [2048, 4096, 8192])
def test_a_row_of_one_document_visits_little_more_than_it_sees(length):
    block = block_tokens(length)
    visited = visible_blocks(np.full((1, length), length), block)[2].sum() * block**2
    assert 1 < visited / (length * (length + 1) / 2) <= 1.1


@pytest.mark.parametrize(
    ("heads", "kv", "cap", "window"), [(2, 2, 0.0, 0), (4, 2, 5.0, 0), (2, 1, 0.0, 40)]
)
def test_equals_the_masked_dense_form(heads, kv, cap, window):
    """Forward and every gradient, of rows that no block divides, and of the second of two kinds of
    layers.
    """
    rng, length, width = np.random.default_rng(0), 300, 16
    until, place = packed_rows(rng, length)
    inputs = [
        2 * rng.standard_normal((2, length, count, width)).astype(np.float32)
        for count in (heads, kv, kv)
    ]
    mask = text_mask(jnp.asarray(until))
    if window:
        near = mask & (place[:, :, None] - place[:, None] < window)
        assert (near != mask).any()
        mask = near
    found = values_and_gradients(
        lambda q, k, v: packed_attention(
            q, k, v, jnp.asarray(until), jnp.asarray(place), 1, (7, window), cap=cap
        ),
        inputs,
    )
    expected = values_and_gradients(lambda q, k, v: attention(q, k, v, mask, cap=cap), inputs)
    assert_close(found, expected)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1", "v5p:1", "v6e:1", "tpu7x:1"])
@pytest.mark.parametrize(("width", "length", "windows"), [(128, 2048, (0,)), (64, 4096, (0, 512))])
def test_compiles_for_chips(topology, width, length, windows):
    """Three kernels, and no array [T, T]."""
    shapes = [(2, length, count, width) for count in (4, 2, 2)]
    text = compiled_text(
        topology,
        lambda q, k, v, until, place, number: packed_attention(
            q, k, v, until, place, number, windows
        ),
        *shapes,
        rest=((2, length), (2, length), ()),
    )
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3
    assert not re.search(rf"\[[\d,]*{length},{length}\]", text)
