"""What `evlm plan` compiles: the real train step, the evaluation's losses, a prefill or a step of
decoding, for shapes alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.flops import Work, near_pairs
from evlm_jax.loss import losses
from evlm_jax.models.decode_weights import Weights
from evlm_jax.models.decoding import DecodeState, Prompt, prefill, read_images, read_tokens
from evlm_jax.models.image_cache import ImageCache
from evlm_jax.models.sampling import Sampling
from evlm_jax.ops.grouped_attention import AttentionPlan
from evlm_jax.optim import starts
from evlm_jax.parallel.compiler import uncached
from evlm_jax.parallel.mesh import Layout
from evlm_jax.phase import TrainPhase

WHATS = ("train", "eval", "prefill", "read", "decode", "encode")
STOPS = 8  # stop tokens of a generation


class Share(NamedTuple):
    """A part of the arguments."""

    count: int  # elements, over all devices once
    bytes: int  # on one device


class Program(NamedTuple):
    """Ready to be compiled."""

    lowered: jax.stages.Lowered
    arguments: dict[str, Share]
    work: Work  # with no row padded
    trained: set[str]  # canonical names of what trains
    steps: int = 0  # of training, in this phase
    options: Mapping[str, bool | int] = MappingProxyType({})  # what the compiler is told


def build(
    cfg: EVLMConfig, layout: Layout, what: str, phase: int = 0, video: bool = False
) -> Program:
    """One of WHATS on the mesh of `layout`, of train.batch rows; but for training every row has its
    own image slots.

    "prefill": prompts of data.length tokens with data.images images each, encoded before. "read":
    what generation runs behind the last chunk of images, prompts whose images' keys are there, and
    stay. "decode": one token a row, behind data.length others. "encode": the ViT alone. Frozen
    parameters count in train.frozen_dtype, also those that an earlier stage trained, or as they are
    quantised.

    Args:
      phase: of training.
      video: each row is a video of data.images frames and then text, which sees them all; else a
        token sees one image.
    Raises:
      ValueError: no such phase.
    """
    if not 0 <= phase < len(cfg.optim.phases):
        raise ValueError(f"--phase {phase}: the config has phases 0 to {len(cfg.optim.phases) - 1}")
    if (
        not cfg.data.sources
    ):  # without one, the step would report no loss, and XLA leave its forward part out
        cfg = dataclasses.replace(
            cfg, data=dataclasses.replace(cfg.data, sources=("all",), weights=(1.0,))
        )
    make = {
        "train": _train,
        "eval": _eval,
        "prefill": _prefill,
        "read": _read,
        "decode": _decode,
        "encode": _encode,
    }[what]
    return make(TrainPhase(cfg if what == "train" else cfg.ungrouped, phase, layout), video)


def _work(of: TrainPhase, video: bool) -> Work:
    return (Work.video if video else Work.full)(of.cfg, of.cfg.train.batch)


def phase_steps(cfg: EVLMConfig, phase: int) -> int:
    """How many steps a phase makes."""
    first = [*starts(cfg), cfg.train.steps]
    return first[phase + 1] - first[phase]


def _train(of: TrainPhase, video: bool) -> Program:
    shapes, batch = of.spec(), Batch.spec(of.cfg)
    state, batch = _put(shapes, of.layout.trained(shapes)), _put(batch, of.layout.batch(batch))
    frozen = _frozen(of)
    arguments = {
        "frozen": _share(frozen),
        "trainable": _share(state.params),
        "optimizer": _share(state.groups),
        "batch": _share(batch),
    }
    steps = phase_steps(of.cfg, of.number)
    return Program(of.lower(), arguments, _work(of, video), of.trained, steps, of.options)


def _eval(of: TrainPhase, video: bool) -> Program:
    batch = Batch.spec(of.cfg)
    params, batch = _parameters(of), _put(batch, of.layout.batch(batch))
    run = of.layout.jit(lambda params, batch: losses(nnx.merge(of.graphdef, params), batch))
    arguments = {"parameters": _share(params), "batch": _share(batch)}
    return Program(run.lower(params, batch), arguments, _work(of, video), set())


def _prefill(of: TrainPhase, video: bool) -> Program:
    cfg, rows, i = of.cfg, of.cfg.train.batch, of.cfg.data.images
    weights, prompt, random = _asked(of)
    taps = jax.ShapeDtypeStruct(
        (rows * i, len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width),
        jnp.dtype(cfg.train.dtype),
        sharding=of.layout.rows,
    )
    slots = jax.ShapeDtypeStruct((rows, i), jnp.int32, sharding=of.layout.rows)
    sizes = {"slots": cfg.data.length, "images": i if video else 1}

    def run(weights, prompt, taps, image, place, random, sampling):
        about = taps, image, place, prompt.length
        held = read_images(cfg, weights, *about) if cfg.uses_images else None
        return prefill(cfg, weights, prompt, held, random, sampling, **sizes)

    lowered = of.layout.jit(run).lower(
        weights, prompt, taps, slots, slots, random, _sampling(of.layout)
    )
    arguments = {"parameters": _share(weights), "taps": _share(taps)}
    return Program(lowered, arguments, _work(of, video)._replace(encoded=0, targets=rows), set())


def _read(of: TrainPhase, video: bool) -> Program:
    cfg, rows, i = of.cfg, of.cfg.train.batch, of.cfg.data.images
    weights, prompt, random = _asked(of)
    split = of.layout.sharding((None, "rows", "kv_heads"))
    places = ImageCache(split, split, of.layout.rows, of.layout.sharding((None, "rows")))
    with of.layout.active():
        spec = ImageCache.spec(cfg, rows, i)
    held = _put(spec, ImageCache(*(where and at for where, at in zip(spec, places))))
    sizes = {"slots": cfg.data.length, "images": i if video else 1}
    run = of.layout.jit(
        lambda weights, prompt, held, random, sampling: prefill(
            cfg, weights, prompt, held, random, sampling, **sizes
        ),
        donate_argnums=2 if cfg.cross_layers and video else (),
    )
    return Program(
        run.lower(weights, prompt, held, random, _sampling(of.layout)),
        {"parameters": _share(weights), "images": _share(held)},
        _work(of, video)._replace(images=0, encoded=0, targets=rows),
        set(),
    )


def _asked(of: TrainPhase) -> tuple[Weights, Prompt, jax.ShapeDtypeStruct]:
    """Weights, prompts and their keys of random numbers."""
    cfg, layout, rows, t = of.cfg, of.layout, of.cfg.train.batch, of.cfg.data.length

    def ints(*shape):
        return jax.ShapeDtypeStruct((rows, *shape), jnp.int32, sharding=layout.rows)

    pairs = cfg.data.block_pairs
    plan = (
        AttentionPlan(ints(pairs, cfg.query_block), ints(t), ints(pairs), ints(pairs))
        if cfg.query_block
        else None
    )
    key = jax.eval_shape(jax.random.key, 0).dtype
    random = jax.ShapeDtypeStruct((rows,), key, sharding=layout.rows)
    return _weights(of), Prompt(ints(t), ints(t), ints(), ints(t), plan, ints(), ints()), random


def _decode(of: TrainPhase, video: bool) -> Program:
    cfg, layout, rows, t = of.cfg, of.layout, of.cfg.train.batch, of.cfg.data.length
    seen = cfg.data.images if video else 1
    with layout.active():
        spec = DecodeState.spec(cfg, rows, t, seen)
    caches = dict.fromkeys(
        ("self_keys", "self_values", "cross_keys", "cross_values"),
        layout.sharding((None, "rows", "kv_heads")),
    )
    state = _put(
        spec,
        DecodeState(
            **{
                k: jax.tree.map(lambda _, k=k: caches.get(k, layout.rows), v)
                for k, v in spec._asdict().items()
            }
        ),
    )
    weights = _weights(of)
    run = layout.jit(lambda weights, state: read_tokens(cfg, weights, state), donate_argnums=1)
    work = Work(
        tokens=rows,
        attended=rows * t,
        images=0,
        encoded=0,
        visible=rows * seen,
        targets=rows,
        near=near_pairs(cfg.llm, np.full(rows, t - 1)),
    )
    return Program(
        run.lower(weights, state),
        {"parameters": _share(weights), "caches": _share(state)},
        work,
        set(),
    )


def _encode(of: TrainPhase, video: bool) -> Program:
    cfg, rows = of.cfg, of.cfg.train.batch
    shape = (rows, cfg.data.images, *cfg.vit.input_shape)
    pixels = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=of.layout.sharding(("rows", "images")))
    params = _parameters(of)
    run = of.layout.jit(lambda params, pixels: nnx.merge(of.graphdef, params).encode(pixels))
    work = Work(
        tokens=0, attended=0, images=0, encoded=rows * cfg.data.images, visible=0, targets=0
    )
    return Program(
        run.lower(params, pixels),
        {"parameters": _share(params["vit"]), "pixels": _share(pixels)},
        work,
        set(),
    )


def _frozen(of: TrainPhase) -> nnx.State:
    frozen = of.frozen_spec()
    return _put(frozen, of.layout.frozen(frozen))


def _parameters(of: TrainPhase) -> nnx.State:
    trainable = _cast(nnx.split_state(of.shapes, of.plan.trains, ...)[0], of.cfg.train.param_dtype)
    return nnx.merge_state(_put(trainable, of.layout.trained(trainable)), _frozen(of))


def _weights(of: TrainPhase) -> Weights:
    """Laid out for decoding; each array lies where XLA itself takes it from the parameters'
    places.
    """
    params = _parameters(of)
    pack = of.layout.jit(
        lambda params: Weights.of(nnx.merge(of.graphdef, params), of.cfg.train.operands)
    )
    lowered = pack.lower(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
    with uncached(of.layout.mesh.devices.flat[0]):
        return _put(shapes, lowered.compile().output_shardings)


def _sampling(layout: Layout) -> Sampling:
    def one(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.replicated)

    return Sampling(
        *[one(jnp.float32)] * 2, one(jnp.int32, STOPS), one(jnp.int32), one(jnp.float32)
    )


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def _put(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _share(tree: Any) -> Share:
    leaves = jax.tree.leaves(tree)

    def size(x):
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return Share(sum(math.prod(x.shape) for x in leaves), sum(map(size, leaves)))
