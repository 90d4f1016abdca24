"""Forms of self-attention in the model: by kernels, interpreted, in chunks and in parts, against
the masked square; the memory of long rows."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.models import evlm, text_attention, vit
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.layers import Fill
from evlm_jax.models.text_attention import text_attention_op
from evlm_jax.models.vit import image_attention_op
from tests.helpers.attention import assert_close, values_and_gradients
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_batch, tiny_config

WINDOWS = {"window": (0, 4), "layers": 2}


@pytest.fixture
def kernels(monkeypatch):
    """Asks for a form of kernels where it is not that of the platform."""
    return lambda form="pallas": [
        monkeypatch.setattr(module, "attention_form", lambda wanted, dtype: form)
        for module in (evlm, text_attention, vit)
    ]


@pytest.mark.parametrize("form", ["chunks", "kernels", "parts"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_and_without_a_window(kernels, monkeypatch, form, layer):
    """Of two rows of 50 tokens: a text with two dialogs and padding; two texts."""
    monkeypatch.setattr(text_attention, "ASKING", 8)
    cfg, rng = tiny_config(llm=WINDOWS), np.random.default_rng(0)
    inputs = [2 * rng.standard_normal((2, 50, heads, 16)).astype(np.float32) for heads in (4, 2, 2)]
    until = np.array([[40] * 20 + [30] * 10 + [40] * 10 + [*range(41, 51)], [25] * 25 + [50] * 25])
    place = np.array([[*range(30), *range(20, 30)] + [0] * 10, [*range(25), *range(25)]], np.int32)
    wanted = values_and_gradients(
        lambda *qkv: text_attention_op(cfg, jnp.asarray(until), jnp.asarray(place))(layer, *qkv),
        inputs,
    )
    if form == "kernels":
        kernels()
    monkeypatch.setattr(text_attention, "SHORT", 50 if form == "parts" else 64)
    found = values_and_gradients(
        lambda *qkv: text_attention_op(
            cfg, jnp.asarray(until, jnp.int32), jnp.asarray(place), long=50 * (form == "parts")
        )(layer, *qkv),
        inputs,
    )
    assert_close(found, wanted)


@pytest.mark.ci
@pytest.mark.parametrize("form", ["pallas", "cudnn"])
def test_hidden_states_and_gradients(kernels, form):
    """Pictures, text with windows, cross-attention."""
    cfg = tiny_config(llm=WINDOWS)
    batch = jax.tree.map(jnp.asarray, tiny_batch(cfg, 0))
    graph, params = nnx.split(random_model(cfg, seed=0))

    def run():
        def total(params):
            hidden = EVLM.hidden(nnx.merge(graph, params), batch)
            return (hidden**2).sum(), hidden

        (_, hidden), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return [np.asarray(x) for x in (hidden, *jax.tree.leaves(gradients))]

    wanted = run()
    kernels(form)
    for mine, theirs in zip(run(), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, 0, 1e-4 * np.abs(theirs).max() + 1e-5)


@pytest.mark.ci
def test_projections_fill_heads():
    """Heads of 112 by kernels, interpreted, against XLA's form: outputs, every gradient. Adapted
    projections do not.
    """
    cfg, rng = tiny_config(vit={"width": 224, "heads": 2}).vit, np.random.default_rng(0)
    layer = vit.SelfAttention(cfg, nnx.Rngs(0))
    fill = layer.fill
    assert fill == Fill(112, 128)
    graph, params = nnx.split(layer)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), params)
    x = rng.standard_normal((2, 7, 224), np.float32)

    def run(*how):
        def total(params, x):
            out = nnx.merge(graph, params)(x, *how)
            return (out**2).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)
        return [np.asarray(x) for x in (out, *jax.tree.leaves(gradients))]

    wanted = run()
    least = 1e-6 * max(np.abs(x).max() for x in wanted)  # a bias of keys has no gradient
    for mine, theirs in zip(
        run(image_attention_op("pallas", None, fill), fill), wanted, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, 0, 1e-5 * np.abs(theirs).max() + least)
    layer.q.adapt(2, 1.0, nnx.Rngs(0))
    assert layer.fill is None


LONG_ROW = """
import resource
import jax, jax.numpy as jnp
from evlm_jax.models.text_attention import text_attention_op
from evlm_jax.models.vit import image_attention_op
from tests.helpers.tiny import tiny_config
shapes = (1, 8192, 8, 128), (1, 8192, 2, 128), (1, 8192, 2, 128)
positions = jnp.arange(8192)[None]
attend = text_attention_op(tiny_config(), jnp.full((1, 8192), 8192), positions)
step = jax.jit(jax.grad(lambda *qkv: attend(0, *qkv).sum(), argnums=(0, 1, 2)))
jax.block_until_ready(step(*(jnp.ones(shape) for shape in shapes)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_row_of_8192_tokens_takes_less_than_1_gb():
    """Forward and backward, of a process that does nothing else."""
    asked = [sys.executable, "-c", LONG_ROW]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout.split()[-1])
    assert kilobytes < 1_000_000, f"{kilobytes} kB resident"
