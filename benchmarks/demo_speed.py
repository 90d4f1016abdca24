"""Speed of the demo's model against peers, all in one run: `python -m benchmarks.demo_speed`.

Generation: SmolLM2-135M from one GGUF file, ours against transformers and, where llama-cpp-python
is installed, llama.cpp. Training: the demo's step against a plain PyTorch loop on the same batch.
Other programs share the machine: read the ratios."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import parser, step_profile
from benchmarks.peers import Run, llama_cpp_run, transformers_run
from evlm_jax import assets
from evlm_jax.batch import Batch
from evlm_jax.checkpoint.lazy_tensors import opened, read_all
from evlm_jax.config import EVLMConfig, QuantConfig, from_config_dict
from evlm_jax.config.model import TOWER_MATRICES
from evlm_jax.convert.engine import load_towers, parameter_shapes
from evlm_jax.data.pack import assemble
from evlm_jax.data.samples import ImageRef, Sample, question
from evlm_jax.data.text import encode
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.models import decoding
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.quant import quantised
from evlm_jax.ops.grouped_attention import AttentionPlan
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from evlm_jax.runs import model_of
from experiments import demo


class Size(NamedTuple):
    """What is measured."""

    shapes: tuple[tuple[int, int], ...] = ((1, 64), (1, 512), (8, 64))  # rows, prompt length
    new: int = 32  # tokens
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    rows: int | None = None  # of a train step; the demo's where None
    repeats: int = 3  # of which the fastest counts
    peers: bool = True


TILE = 32  # values of a scale, as in llama.cpp's formats
SMOKE = Size(((1, 16),), 4, ("float32",), 1, 1, False)


def load(cfg: EVLMConfig) -> EVLM:
    """The towers with closed gates."""
    whole = cfg.merged
    arrays = {
        name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(whole).items()
    } | load_towers(whole)
    return model_of(cfg, read_all(quantised(cfg, parameter_shapes(cfg), opened(arrays))))[0]


def our_run(model: EVLM, dtype: str, images: int) -> Run:
    """Prefill and decode; every token sees `images` images."""
    cfg, vit = model.cfg, model.cfg.vit
    weights = jax.jit(lambda model: decoding.Weights.of(model, dtype))(model)

    @partial(jax.jit, static_argnames="slots")
    def prefill(weights, prompt, taps, random, slots):
        first = np.zeros((len(prompt.length), 1), np.int32)
        held = decoding.read_images(cfg, weights, taps, first, first, prompt.length)
        return decoding.prefill(cfg, weights, prompt, held, random, how, slots, images=1)

    decode = jax.jit(partial(decoding.decode, cfg), donate_argnames="state")
    how = decoding.Sampling(jnp.float32(0), jnp.float32(1), jnp.full(8, -1))
    taps = jnp.zeros((1, len(vit.taps), vit.tokens, vit.width))

    def run(tokens, new):
        rows, length = tokens.shape

        def full(*shape, value=0):
            return np.full(shape, value, np.int32)

        blocks = -(-length // cfg.xattn.query_block)
        index = np.arange(length)
        order = np.pad(
            index, (0, blocks * cfg.xattn.query_block - length), constant_values=length
        ).reshape(blocks, -1)

        def each(a):
            return np.tile(a, (rows,) + (1,) * a.ndim).astype(np.int32)

        plan = AttentionPlan(
            each(order),
            each(index),
            each(np.arange(blocks) if images else np.full(blocks, blocks)),
            full(rows, blocks),
        )
        prompt = decoding.Prompt(
            tokens=tokens,
            media_slot=full(rows, length, value=-1),
            length=full(rows, value=length),
            image_slot=full(rows, length),
            plan=plan,
            visible_start=full(rows),
            visible=full(rows, value=images),
        )
        random = jax.random.split(jax.random.key(0), rows)
        start = time.perf_counter()
        state = jax.block_until_ready(prefill(weights, prompt, taps, random, slots=length + new))
        read = time.perf_counter()
        jax.block_until_ready(decode(weights, state, how, jnp.int32(new)))
        return read - start, time.perf_counter() - read

    return run


def generation(cfg: EVLMConfig, size: Size) -> None:
    """Prints a line an engine: tokens/s of prefill and decode for each shape, beside the first
    one's.
    """
    gguf = assets.path(cfg.init.llm)
    alone = demo.get_config()
    alone.xattn.update(
        every=cfg.llm.layers, ffn=16
    )  # one closed block is left: within 1% of the language model alone
    alone = from_config_dict(alone)
    llm = load(alone)
    engines = {"ours float32": lambda: our_run(llm, "float32", 0)}
    if size.peers:
        whole = load(cfg)
        engines |= {
            "ours bfloat16": lambda: our_run(llm, "bfloat16", 0),
            "ours float32, with cross-attention": lambda: our_run(whole, "float32", 1),
            "ours bfloat16, with cross-attention": lambda: our_run(whole, "bfloat16", 1),
        }
    if size.peers and importlib.util.find_spec("qwix"):
        engines |= {
            f"ours {kind}, products in {dtype}": partial(quantised_run, alone, kind, dtype)
            for kind in ("int8", "int4")
            for dtype in ("float32", "bfloat16")
        }
    if size.peers and importlib.util.find_spec("transformers"):
        engines |= {
            f"transformers {dtype}": partial(transformers_run, gguf, dtype)
            for dtype in ("float32", "bfloat16")
        }
    if size.peers and importlib.util.find_spec("llama_cpp"):
        engines |= {
            f"llama.cpp {kind}": partial(llama_cpp_run, gguf, kind)
            for kind in ("f32", "f16", "q8_0", "q4_1", "as stored")
        }
    tokens = np.random.default_rng(0).integers(1000, 40000, (8, 512)).astype(np.int32)
    columns = [
        f"{rows} x {length} {what}"
        for rows, length in size.shapes
        for what in ("prefill", f"+{size.new}")
    ]
    print(f"{'tokens/s':<37}" + "".join(f"{column:>17}" for column in columns))
    first = None
    for name, engine in engines.items():
        run = engine()
        speeds = np.array(
            [_speed(run, tokens[:rows, :length], size) for rows, length in size.shapes]
        ).ravel()
        first = speeds if first is None else first
        print(
            f"{name:<37}"
            + "".join(f"{speed:9.0f} ({speed / base:4.2f}x)" for speed, base in zip(speeds, first)),
            flush=True,
        )


def quantised_run(cfg: EVLMConfig, kind: str, dtype: str) -> Run:
    """As `our_run`, of a language model that is held in `kind`."""
    quant = QuantConfig(TOWER_MATRICES, kind, TILE)
    return our_run(load(replace(cfg, quant=quant)), dtype, 0)


def _speed(run: Run, tokens: np.ndarray, size: Size) -> tuple[float, float]:
    run(tokens, size.new)  # compiles
    seconds = np.min([run(tokens, size.new) for _ in range(size.repeats)], axis=0)
    return tokens.size / seconds[0], len(tokens) * size.new / seconds[1]


def demo_batch(cfg: EVLMConfig) -> Batch:
    """Rows full of images with several questions each, as easy-vqa has them, and random taps."""
    tokenizer = load_tokenizer(cfg.init.llm)
    colours, shapes = ("red", "blue", "green", "brown"), ("circle", "triangle", "rectangle")
    asked = [("what is the color of the shape?", c) for c in colours[:1]] + [
        ("what shape is in the image?", s) for s in shapes[:1]
    ]
    asked += [(f"is there a {c} {s}?", "no") for c in colours for s in shapes][
        : cfg.data.dialogs or None
    ]
    dialogs = tuple(question("<image>" + q, a) for q, a in asked[:8])
    rows = []
    for row in range(cfg.train.batch):
        documents = [
            encode(Sample(f"{row}/{i}", "", ((ImageRef(f"{i}.png"),),), dialogs), tokenizer, cfg)
            for i in range(cfg.data.images)
        ]
        size = np.cumsum(
            [(len(d.tokens), len(d.targets), d.block_pairs) for d in documents], axis=0
        )
        fits = (size <= (cfg.data.length, cfg.data.targets, cfg.data.block_pairs)).all(1)
        rows.append([document for document, fit in zip(documents, fits) if fit])
    fields = assemble(rows, cfg)
    shape = Batch.spec(cfg).taps.shape
    return Batch(
        **fields,
        pixels=None,
        taps=np.random.default_rng(0).standard_normal(shape, np.float32).astype(jnp.bfloat16),
    )


def training(size: Size) -> None:
    """Prints tokens (positions that are not padding) per second of one optimizer step, with
    products of each precision, and where the time goes.
    """
    first = None
    for precision in size.precisions:
        config = demo.get_config()
        config.train.batch = size.rows or config.train.batch
        config.train.matmul_precision = precision
        cfg = from_config_dict(config)
        batch = demo_batch(cfg)
        used = int((batch.visible_until > np.arange(cfg.data.length) + 1).sum())
        if first is None:
            print(
                f"train step of {len(batch.tokens)} x {cfg.data.length} positions: {used} used,"
                f" {int((batch.targets >= 0).sum())} targets"
            )
        steps = {"ours": (our_step, step_profile.of_jax)}
        if size.peers and importlib.util.find_spec("torch"):
            from benchmarks.torch_step import make_step

            steps |= {"PyTorch": (make_step, step_profile.of_torch)}
        for name, (made, profiled) in steps.items():
            step = made(cfg, batch)
            speed = used / _fastest(step, size.repeats)
            first = first or speed
            print(
                f"{name + ', products in ' + precision:<37}{speed:9.0f} ({speed / first:4.2f}x)",
                flush=True,
            )
            print(f"    seconds of threads: {step_profile.line(profiled(step))}", flush=True)


def our_step(cfg: EVLMConfig, batch: Batch) -> Callable[[], None]:
    """A function that does one optimizer step on the batch."""
    layout = make_layout(cfg)
    phase = TrainPhase(cfg, 0, layout)
    state, on_device = (
        phase.enter(0, nnx.state(load(cfg)), {}),
        layout.put_groups(batch, range(cfg.image_groups), cfg.image_groups),
    )

    def step() -> None:
        nonlocal state
        state, report = phase.update(state, on_device)
        jax.block_until_ready(report)

    return step


def _fastest(step, repeats: int) -> float:
    seconds = []
    for _ in range(1 + repeats):  # the first one compiles
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    """Measures and prints."""
    size = SMOKE if parser(__doc__).parse_args().smoke else Size()
    generation(from_config_dict(demo.get_config()), size)
    training(size)


if __name__ == "__main__":
    main()
