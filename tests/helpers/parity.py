"""Helpers of the parity tests: our towers from a foreign checkpoint, run through the main path of
the model.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax import assets
from evlm_jax.batch import Batch
from evlm_jax.checkpoint.lazy_tensors import read_all
from evlm_jax.config import EVLMConfig
from evlm_jax.convert import engine
from evlm_jax.convert.readers import open_source
from evlm_jax.models import decoding
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import unflatten
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan
from tests.helpers.tiny import tiny_config

needs_transformers = (
    pytest.mark.parity
)  # tests/conftest.py skips what bears it where they are missing


def open_flamingo(module: str):
    """A module of open_flamingo's model, without the package around it, which imports far more."""
    package = importlib.util.find_spec("open_flamingo")
    if package is None:
        pytest.skip(
            "needs open_flamingo, which pins an old torch: pip install --no-deps"
            " open_flamingo==2.0.1"
        )
    if "open_flamingo_src" not in sys.modules:
        alone = ModuleType("open_flamingo_src")
        alone.__path__ = [f"{package.submodule_search_locations[0]}/src"]
        sys.modules[alone.__name__] = alone
    return importlib.import_module(f"open_flamingo_src.{module}")


def open_flamingo_helpers():
    """open_flamingo's blocks."""
    return open_flamingo("helpers")


def needs_asset(name: str):
    """Skips where the asset cache lacks `name`."""
    return pytest.mark.skipif(
        not assets.available(name),
        reason=f"asset {name} is not in the cache: run `evlm fetch {name}`",
    )


def config_for(where: str, tower: str, **changes) -> EVLMConfig:
    """The tiny config with one tower as the checkpoint describes it."""
    section = engine.describe(where)
    return tiny_config(**{tower: section | changes})


def load(cfg: EVLMConfig, where: str, tower: str) -> EVLM:
    """An EVLM with one tower from a checkpoint; everything else is 0."""
    shapes = engine.parameter_shapes(cfg)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    arrays |= read_all(engine.open_tower(cfg, open_source(assets.locate(where)), tower).tensors)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, unflatten(cfg, arrays, state)))


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.logits(model.hidden(batch))


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, state, pixels: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).encode(pixels)


def text_logits(cfg: EVLMConfig, model: EVLM, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of a row that is one document without images."""
    length, data = len(tokens), cfg.data
    none = np.zeros(length, np.int32)
    row = {
        "tokens": tokens,
        "positions": np.arange(length),
        "visible_until": np.full(length, length),
        "media_slot": none - 1,
        "visible_start": none,
        "visible_stop": none,
        "target_positions": none,
        "targets": none - 1,
        "target_source": none,
        **attention_plan(none, none, cfg.xattn.query_block, data.block_pairs),
    }
    pixels = np.zeros((1, data.images, *cfg.vit.size, 3), np.uint8)
    batch = Batch(
        **{name: jnp.asarray(value, jnp.int32)[None] for name, value in row.items()},
        pixels=pixels,
        taps=None,
    )
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(*nnx.split(model), batch))[0]


def answer_logits(
    model: EVLM, prompts: Sequence[np.ndarray], answers: np.ndarray | None = None
) -> np.ndarray:
    """Logits [B, 1 + n, vocab] by the caches: behind the prompts, texts of any lengths, and behind
    each token of `answers` [B, n].
    """
    cfg, rows, length = model.cfg, len(prompts), max(map(len, prompts))
    answers = np.zeros((rows, 0), np.int32) if answers is None else answers
    tokens = np.stack([np.pad(prompt, (0, length - len(prompt))) for prompt in prompts])
    none = np.zeros((rows, length), np.int32)
    grouped = AttentionPlan(
        *(
            np.stack([array] * rows)
            for array in attention_plan(none[0], none[0], cfg.xattn.query_block, 1).values()
        )
    )
    prompt = decoding.Prompt(
        tokens,
        none - 1,
        np.array([*map(len, prompts)]),
        none,
        grouped,
        none[:, 0],
        none[:, 0],
    )
    taps, random = (
        np.zeros((1, len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width)),
        jax.random.split(jax.random.key(0), rows),
    )

    @jax.jit
    def read_prompts(weights, taps, random):
        held = decoding.read_images(cfg, weights, taps, none[:, :1], none[:, :1], prompt.length)
        slots = length + answers.shape[1]
        return decoding.read_prompts(cfg, weights, prompt, held, random, slots, images=1)

    read_tokens = jax.jit(partial(decoding.read_tokens, cfg))
    with jax.default_matmul_precision("highest"):
        weights = decoding.Weights.of(model, "float32")
        first, state = read_prompts(weights, taps, random)
        found = [first]
        for token in answers.T:
            logits, state = read_tokens(
                weights, state._replace(token=jnp.asarray(token), position=state.position + 1)
            )
            found.append(logits)
    return np.stack(found, 1)


def encode(model: EVLM, pixels: np.ndarray) -> np.ndarray:
    """Taps [G, S, V] of one uint8 image."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_encode(*nnx.split(model), pixels[None]))[0]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
