"""Experts that are spread over eight devices, against one device; in the process of
tests/parallel/test_eight_devices.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.models import moe
from evlm_jax.models.moe import Experts
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.mesh import Layout
from evlm_jax.planning.hlo import Module
from tests.mesh.devices import config, layout_of

TOKENS, WIDTH, HIDDEN, TOP = 512, 24, 8, 4
ALONE, ALL, SOME = (1, 1, 1, 1), (1, 1, 8, 1), (1, 2, 4, 1)
NOBODY = 16  # the number of experts


def experts(mesh: tuple) -> tuple[Experts, Layout]:
    """Random ones, 16 of them."""
    cfg, rng = config(mesh, experts=True), np.random.default_rng(0)
    shapes = nnx.eval_shape(lambda: Experts(WIDTH, HIDDEN, cfg.moe, nnx.Rngs(0)))

    def fill(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) * leaf.shape[-2] ** -0.5, jnp.float32)

    return jax.tree.map(fill, shapes), layout_of(cfg)


def loads() -> dict[str, np.ndarray]:
    """{name: experts that each token chose [N, k]}."""
    rng = np.random.default_rng(1)
    even = rng.permuted(np.tile(np.arange(16), (TOKENS, 1)), axis=1)[:, :TOP]
    padded = even.copy()
    padded[rng.random(TOKENS) < 0.5] = NOBODY
    padded[: TOKENS // 4] = NOBODY  # all that the first devices have
    skewed = np.minimum(rng.geometric(0.3, even.shape) - 1, 15)
    return {
        "even": even,
        "skewed": skewed,
        "one expert": np.full_like(even, 5),
        "the experts of one device": rng.integers(2, 4, even.shape),
        "every other expert": even // 2 * 2,
        "half a batch of padding": padded,
        "padding alone": np.full_like(even, NOBODY),
        # of the devices with low numbers all for the last expert, and the other way round
        "across": np.where(np.arange(TOKENS)[:, None] < TOKENS // 2, 15, 0) + 0 * even,
    }


def documented(operand, output, at, send, place, receive, *, axis_name):
    """jax.lax.ragged_all_to_all as its documentation has it, which XLA on CPU has not; NaN where
    the sizes of senders and receivers differ.
    """
    devices, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    slices = len(at) // devices  # to each device

    def theirs(x):
        every = jax.lax.all_gather(x, axis_name)
        return jax.lax.dynamic_slice_in_dim(every, me * slices, slices, 1).reshape(-1)

    at, send, place = map(theirs, (at, send, place))
    row = jnp.arange(len(output))
    inside = (row >= place[:, None]) & (row < (place + send)[:, None])
    which, sender = inside.argmax(0), jnp.repeat(jnp.arange(devices), slices)
    found = jax.lax.all_gather(operand, axis_name)[sender[which], at[which] + row - place[which]]
    out = jnp.where(inside.any(0)[:, None], found, output)
    return jnp.where((send == receive).all(), out, jnp.nan)


@functools.cache
def compiled(mesh: tuple, ragged: bool = False) -> tuple[jax.stages.Compiled, Experts]:
    """Outputs, the number of dropped choices and the gradients with respect to experts, tokens and
    gates; and the experts.
    """
    model, layout = experts(mesh)

    def loss(model, x, gates, chosen, weight):
        out, dropped = model(x, gates, chosen)
        return (out * weight).sum(), (out, dropped)

    run = layout.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    tokens, choices = jnp.zeros((TOKENS, WIDTH)), jnp.zeros((TOKENS, TOP))
    with jax.default_matmul_precision("highest"), pytest.MonkeyPatch.context() as patch:
        if ragged:
            patch.setattr(moe, "platform", lambda: "tpu")
            patch.setattr(jax.lax, "ragged_all_to_all", documented)
            patch.setattr(jax.lax, "empty", lambda *like: jnp.full(*like[:1], jnp.nan, *like[1:]))
        lowered = run.lower(model, tokens, choices, choices.astype(jnp.int32), tokens)
    return lowered.compile(), model


def answer(chosen: np.ndarray, *form):
    """(gradients, (outputs, dropped)) on the host."""
    rng = np.random.default_rng(2)
    x, weight = (rng.standard_normal((TOKENS, WIDTH)).astype(np.float32) for _ in range(2))
    gates = rng.random((TOKENS, TOP)).astype(np.float32)
    run, model = compiled(*form)
    inputs = model, x, gates, chosen.astype(np.int32), weight
    return fetch_to_host(run(*jax.device_put(inputs, run.input_shardings[0])))


@pytest.mark.parametrize("form", [(SOME,), (ALL, True)], ids=["ring", "ragged"])
@pytest.mark.parametrize("load", loads())
def test_experts_equal_those_of_one_device(load, form):
    found, wanted = (answer(loads()[load], *one) for one in (form, (ALONE,)))
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6 * np.abs(other).max())


def test_nothing_has_room_for_more_than_two_rounds_of_rows():
    """Of the rows that a device sends: neither what it receives nor anything else is larger."""
    run, _ = compiled(SOME)
    rows = TOKENS * TOP // 8
    shapes = {
        leaf.dims
        for computation in Module(run.as_text()).computations.values()
        for instruction in computation.instructions
        for leaf in instruction.leaves
    }
    assert (2 * rows, WIDTH) in shapes  # received rows
    assert max(map(math.prod, shapes)) <= 2.2 * rows * WIDTH
