"""Attention of an image's tokens by kernels, interpreted, against jax.nn's."""

import re

import jax
import numpy as np
import pytest

from evlm_jax.ops import image_attention as module
from evlm_jax.ops.image_attention import block_rows, image_attention
from tests.helpers.attention import (
    assert_close,
    compiled_text,
    needs_compiler,
    values_and_gradients,
)


@pytest.mark.parametrize(
    ("length", "width", "heads", "kv", "rows"),
    [
        pytest.param(257, 64, 1, 1, 512, marks=pytest.mark.ci),
        (65, 96, 2, 1, 512),
        (50, 112, 2, 2, 20),
        (37, 128, 1, 1, 16),
    ],
)
def test_equals_the_dense_form(monkeypatch, length, width, heads, kv, rows):
    """Forward and every gradient, of one block of queries and of several that leave places free."""
    monkeypatch.setattr(module, "ROWS", rows)
    assert length <= rows or length % block_rows(length)
    rng = np.random.default_rng(0)
    inputs = [
        2 * rng.standard_normal((2, length, count, width)).astype(np.float32)
        for count in (heads, kv, kv)
    ]
    found = values_and_gradients(image_attention, inputs)
    assert_close(found, values_and_gradients(jax.nn.dot_product_attention, inputs))


def test_blocks_are_few_and_equal():
    assert [block_rows(length) for length in (50, 257, 512, 577, 1025)] == [50, 257, 512, 304, 352]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1", "v5p:1", "v6e:1", "tpu7x:1"])
@pytest.mark.parametrize(
    ("length", "width", "heads"), [(257, 112, 16), (1025, 112, 4), (577, 64, 6), (197, 96, 3)]
)
def test_compiles_for_chips(topology, length, width, heads):
    """Three kernels, and no array of scores: none has the keys as its last dimension."""
    text = compiled_text(topology, image_attention, *[(16, length, heads, width)] * 3)
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3
    assert not re.search(rf"\[[\d,]*,{length}\]", text)
    assert not re.search(r"= \S+ sort\(", text), "the list of pairs is a constant"
