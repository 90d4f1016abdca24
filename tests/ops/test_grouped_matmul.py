"""Blocks by expert against a loop over tokens, for every load: empty experts, all tokens on one,
padding, a limit.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.ops import grouped_matmul as ops

WIDTH, HIDDEN, EXPERTS = 6, 5, 4


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1e-30))


BLOCK = 4


def there(x, kernels, groups, block):
    """Sum over its choices of each token times their kernels [tokens, F], multiplied on the way
    into rows.
    """
    return ops.combine(ops.dispatch_matmul(x, kernels, groups, block), groups, len(x))


def back(x, kernels, groups, block):
    """The same, multiplied on the way back."""
    return ops.combine_matmul(ops.dispatch(x, groups, len(x)), kernels, groups, len(x), block)


@jax.jit
def ours(x, kernels, expert, weight):
    """The sums of both ways, and the gradients of their products with `weight`."""
    groups = ops.group(expert, len(kernels), BLOCK)

    def loss(x, kernels, way):
        out = way(x, kernels, groups, BLOCK)
        return (out * weight).sum(), out

    found = [
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernels, way)
        for way in (there, back)
    ]
    return [(out, *gradients) for (_, out), gradients in found]


def check(found, wanted):
    for way in found:
        for mine, other in zip(way, wanted, strict=True):
            close(mine, other)


def loop(x, kernels, expert, weight):
    """The same in NumPy, choice by choice."""
    out, of_x, of_kernels = (
        np.zeros((len(x), kernels.shape[2])),
        np.zeros(x.shape),
        np.zeros(kernels.shape),
    )
    for i, e in enumerate(expert):
        token = i % len(x)
        if e < len(kernels):
            out[token] += x[token] @ kernels[e]
            of_x[token] += kernels[e] @ weight[token]
            of_kernels[e] += np.outer(x[token], weight[token])
    return out, of_x, of_kernels


def operands(tokens, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (tokens, WIDTH), (EXPERTS, WIDTH, HIDDEN), (tokens, HIDDEN)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, EXPERTS), min_size=42, max_size=42))
def test_any_load_equals_a_loop_over_tokens(expert):
    """21 tokens, two choices each; expert 4 is nobody.

    One choice of an expert twice by a token adds up as well.
    """
    x, kernels, weight = operands(21)
    check(ours(x, kernels, np.array(expert, np.int32), weight), loop(x, kernels, expert, weight))


@pytest.mark.parametrize(
    "load", [(42, 0, 0, 0), (0, 0, 0, 42), (0, 21, 21, 0), (41, 1, 0, 0), (0, 0, 0, 0)]
)
def test_skewed_loads(load):
    x, kernels, weight = operands(21)
    expert = np.repeat([*range(EXPERTS), EXPERTS], [*load, 42 - sum(load)]).astype(np.int32)
    check(ours(x, kernels, expert, weight), loop(x, kernels, expert, weight))


@pytest.mark.parametrize("block", [1, 3, 8])
def test_many_blocks_at_once(block):
    """Enough rows of one expert for every stride, and a rest."""
    x, kernels, weight = operands(200)
    expert = np.where(np.arange(200) < 170, 2, np.arange(200) % EXPERTS).astype(np.int32)
    groups = ops.group(expert, EXPERTS, block)
    for way in (there, back):
        close(way(x, jnp.asarray(kernels), groups, block), loop(x, kernels, expert, weight)[0])


def test_rows_of_the_drawing():
    """The example of the module's docstring."""
    expert = np.array(
        [0, 0, 2, 3, 2, 1, 0, 3], np.int32
    )  # first choices of the tokens, then second ones
    groups = ops.group(expert, experts=3, block=2)
    np.testing.assert_array_equal(groups.first, [0, 2, 3, 4])
    tokens = np.where(groups.choice < 8, groups.choice % 4, -1)
    np.testing.assert_array_equal(tokens, [0, 1, 2, -1, 1, -1, 2, 0, -1, -1])


def test_over_the_limit_first_choices_stay():
    expert = np.array([0, 0, 0, 1, 1, 0], np.int32)  # three tokens: first choices, then second ones
    groups = ops.group(expert, experts=2, block=2, limit=2)
    rows = len(groups.choice)
    assert (np.asarray(groups.row) == rows).tolist() == [False, False, True, False, False, True]


def test_no_wide_row_is_stored_and_no_kernel_copied_for_each_block():
    """Temporaries of both passes are less than the rows of all choices [R, D]; the gradient of a
    kernel is held once, not once a block.
    """
    tokens, width, hidden, k, block = 512, 256, 16, 4, 4
    x, fc1, fc2 = (
        jnp.zeros(shape)
        for shape in ((tokens, width), (EXPERTS, width, hidden), (EXPERTS, hidden, width))
    )

    def loss(x, fc1, fc2, expert):
        groups = ops.group(expert, EXPERTS, block)
        return ops.combine_matmul(
            jnp.square(ops.dispatch_matmul(x, fc1, groups, block)), fc2, groups, tokens, block
        ).sum()

    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        .lower(x, fc1, fc2, jnp.zeros(k * tokens, jnp.int32))
        .compile()
    )
    rows, blocks = k * tokens * x[0].nbytes, k * tokens // block * fc1[0].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < rows < blocks


def test_kernel_form(monkeypatch):
    """The form for tokamax, with XLA's ragged_dot in place of its kernels: what is passed and what
    comes out.
    """

    def ragged_dot_general(a, b, sizes, dimensions, preferred_element_type, implementation):
        assert implementation == ("mosaic", "triton") and a.dtype == b.dtype
        return jax.lax.ragged_dot_general(
            a, b, sizes, dimensions, preferred_element_type=preferred_element_type
        )

    x, kernels, weight = operands(21)
    expert = np.random.default_rng(1).integers(0, EXPERTS + 1, 42).astype(np.int32)
    monkeypatch.setitem(
        sys.modules,
        "tokamax",
        types.SimpleNamespace(ragged_dot_general=ragged_dot_general, __spec__=object()),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ops._tokamax.cache_clear()
    try:
        found = ours.__wrapped__(x, kernels, expert, weight)
    finally:
        ops._tokamax.cache_clear()
    check(found, loop(x, kernels, expert, weight))


@pytest.mark.parametrize("way", [there, back])
def test_gradient_of_a_kernel_is_summed_in_float32(way):
    """Under "bfloat16" operands are rounded, sums and the gradient of a float32 kernel are not."""
    x, kernels, weight = operands(21)
    expert = np.zeros(42, np.int32)

    def rounded(a):
        return np.asarray(jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32))

    groups = ops.group(expert, EXPERTS, BLOCK)

    def loss(kernels):
        with jax.default_matmul_precision("bfloat16"):
            return (way(x, kernels, groups, BLOCK) * weight).sum()

    close(
        jax.grad(loss)(jnp.asarray(kernels)), loop(rounded(x), kernels, expert, rounded(weight))[2]
    )
