"""Seconds of EVLM and its baselines on this machine, with the config's own towers: prefill,
answering, and the ViT before both.
"""

import os
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.checkpoint.initialize import begin_with, initialize
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.engine import load_towers
from evlm_jax.costs.cases import case, counterparts
from evlm_jax.evals.results import device
from evlm_jax.models.decoding import Prompt, Weights, decode, prefill, read_images
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.sampling import Sampling
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan
from evlm_jax.parallel.mesh import make_layout

NEW = 32  # tokens of an answer
REPEATS = 3  # of which the fastest counts; models take turns


def measure(cfg: EVLMConfig, frames: list[int], text: int) -> dict:
    """{"frames": {F: {kind: {"prefill": seconds, "decode": seconds a token}, "encode": seconds}}}
    and on what machine.

    Raises:
      ValueError, AssetError: no towers, or others than the config says.
    """
    towers = load_towers(cfg)
    models = {kind: _model(model, towers) for kind, model in counterparts(cfg).items()}
    pack = jax.jit(Weights.of, static_argnums=1)
    weights = {kind: pack(model, cfg.train.matmul_precision) for kind, model in models.items()}
    encode, seconds = jax.jit(EVLM.encode), {}
    for count in frames:
        runs = {
            kind: runner(case(model.cfg, count, text), weights[kind])
            for kind, model in models.items()
        }
        pixels = np.random.default_rng(0).integers(0, 256, (count, *cfg.vit.input_shape), np.uint8)
        runs["encode"] = lambda pixels=pixels: {
            "encode": _seconds(lambda: encode(models["evlm"], pixels))[0]
        }
        rounds = [{kind: run() for kind, run in runs.items()} for _ in range(1 + REPEATS)][
            1:
        ]  # the first one compiles
        best = {
            kind: {part: min(r[kind][part] for r in rounds) for part in rounds[0][kind]}
            for kind in runs
        }
        seconds[str(count)] = best | best.pop("encode")
        print(f"measured {count} frames: {seconds[str(count)]}", flush=True)
    return {
        "frames": seconds,
        "text": text,
        "new": NEW,
        "device": device(),
        "load": os.getloadavg()[0],
    }


def _model(cfg: EVLMConfig, towers: dict[str, np.ndarray]) -> EVLM:
    layout = make_layout(cfg)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    tensors = begin_with(cfg, shapes, towers, frozenset())
    return nnx.merge(graphdef, initialize(cfg, shapes, layout.frozen, tensors))


def runner(cfg: EVLMConfig, weights: Weights) -> Callable[[], dict[str, float]]:
    """A function that answers a case once and returns the seconds of its parts."""
    go_on = jax.jit(partial(decode, cfg), donate_argnames="state")
    how = Sampling(jnp.float32(0), jnp.float32(1), jnp.full(1, -1))
    shown, taps = prompt(cfg), _taps(cfg)
    random = jax.random.split(jax.random.key(0), 1)
    image = np.arange(cfg.data.images)[None]
    about = image, image * cfg.media.tokens, shown.length
    sizes = {"slots": cfg.data.length + NEW, "images": cfg.data.images}

    @jax.jit
    def read(weights, shown, taps, random):
        held = read_images(cfg, weights, taps, *about) if cfg.uses_images else None
        return prefill(cfg, weights, shown, held, random, how, **sizes)

    def run() -> dict[str, float]:
        took, state = _seconds(lambda: read(weights, shown, taps, random))
        answer, _ = _seconds(lambda: go_on(weights, state, how, jnp.int32(NEW)))
        return {"prefill": took, "decode": answer / NEW}

    return run


def prompt(cfg: EVLMConfig) -> Prompt:
    """A case as one prompt: the media tokens of each frame, then random words."""
    frames, media, length = cfg.data.images, cfg.media.tokens, cfg.data.length
    text = length - frames * media
    slot = np.concatenate([np.tile(np.arange(media), frames), np.full(text, -1)])
    start = np.concatenate([np.arange(frames).repeat(media), np.zeros(text, int)])
    stop = np.concatenate([np.arange(frames).repeat(media) + 1, np.full(text, frames)])
    grouped = (
        AttentionPlan(
            **{
                k: v[None]
                for k, v in attention_plan(
                    start, stop, cfg.query_block, cfg.data.block_pairs
                ).items()
            }
        )
        if cfg.query_block
        else None
    )

    def row(values):
        return np.asarray(values, np.int32)[None]

    words = np.random.default_rng(0).integers(0, cfg.llm.vocab, length)
    return Prompt(
        row(words),
        row(slot),
        row(length),
        row(start),
        grouped,
        row(0),
        row(frames),
    )


def _taps(cfg: EVLMConfig) -> jax.Array:
    shape = (cfg.data.images, len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _seconds(call: Callable) -> tuple[float, object]:
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - begin, result
