"""Runs a model of either kind and keeps what each step gives, for verify.py.

A checkpoint of ours is run twice in float32: its logits come from the model's own scan, its
intermediates from a plain loop over the same blocks, so that a fault of the scan shows too. A
Hugging Face directory is run by transformers, with hooks on its modules."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.checkpoint import store
from evlm_jax.convert.describe import describe_source
from evlm_jax.convert.engine import recognise
from evlm_jax.convert.readers import open_source
from evlm_jax.convert.stock import CLASSES
from evlm_jax.data.tokenizer import Tokenizer, load_tokenizer, source_of_run
from evlm_jax.models.attention import attention, text_mask, within_window
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.rotary import layer_rope, rope_tables
from evlm_jax.models.vit import stack_bounds
from evlm_jax.ops.attention_plan import attention_plan, block_pair_count
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from evlm_jax.paths import local
from evlm_jax.runs import load_trained


class Example(NamedTuple):
    """A prompt as both models read it."""

    name: str
    tokens: np.ndarray  # [T] int32
    media_slot: np.ndarray  # [T], as the next two in Batch
    visible_start: np.ndarray
    visible_stop: np.ndarray
    pixels: np.ndarray  # [I, h, w, 3] uint8
    groups: np.ndarray  # [I]; frames of one video have the same number


class Trace(NamedTuple):
    """Intermediate values of one model for one prompt."""

    seen: dict[str, np.ndarray]  # [I, S, V] of a tap, else [T, D]
    logits: np.ndarray  # [T, vocab] float32


class Side(NamedTuple):
    """A model that is not loaded yet."""

    path: str
    # True: leave the cross-attention out
    run: Callable[["Side", Sequence[Example], bool], list[Trace]]
    # vit, llm, xattn, moe, media of EVLMConfig, and media.image_token_id; llm alone of a language
    # model
    sections: dict[str, dict[str, Any]]
    tokenizer: Tokenizer


def look(where: str, folder_code: bool = False, step: int | None = None) -> Side:
    """The model at `where`, described from its configuration alone.

    Args:
      step: of a checkpoint of ours; by default the newest.
      folder_code: a Hugging Face directory is run by the code in it, instead of by transformers'
        own and this package's classes.
    Raises:
      FileNotFoundError: neither a checkpoint of ours nor a Hugging Face directory.
      ValueError: a model that has no logits, or an architecture that is not EVLM's; a baseline.
    """
    if store.steps(where):
        cfg = store.open_params(where)[1]
        if cfg.baseline:
            raise ValueError(
                f"{where} is a baseline ({cfg.baseline}): compared are EVLM and language models"
            )
        tokenizer = load_tokenizer(source_of_run(where, cfg.init.llm))
        sections = {
            name: asdict(getattr(cfg, name)) for name in ("vit", "llm", "xattn", "moe", "media")
        }
        sections["media"]["image_token_id"] = tokenizer.id(cfg.media.placeholder)
        return Side(where, partial(run_checkpoint, step=step), sections, tokenizer)
    if not (
        local(where, "a Hugging Face directory that transformers runs") / "config.json"
    ).is_file():
        raise FileNotFoundError(
            f"{where}: neither a run (steps/) nor a Hugging Face directory (config.json)"
        )
    source = open_source(Path(where))
    family, prefix = recognise(source)
    if family.name != "evlm" and source.metadata.get("model_type") not in CLASSES:
        raise ValueError(
            f"{where} holds {family.name}: compared are EVLM and language models that transformers"
            " has"
        )
    found = describe_source(source, family.name, prefix)
    run = partial(run_huggingface, "" if folder_code else source.metadata["model_type"])
    if family.tower == "llm":
        return Side(where, run, {"llm": found}, load_tokenizer(where))
    found["media"]["image_token_id"] = source.metadata["image_token_id"]
    return Side(where, run, found, load_tokenizer(where))


# -------------------------------------------------------------------------------------- checkpoints


def run_checkpoint(
    side: Side, examples: Sequence[Example], llm_only: bool, step: int | None = None
) -> list[Trace]:
    """A step of a run, all examples as rows of one batch."""
    model = in_float32(load_trained(side.path, step).model)
    for gate in model.xattn.gates().values() if llm_only else ():
        gate.close()
    batch = batch_of(examples, model.cfg.xattn.query_block, model.cfg.vit.size)
    logits = logits_of(model, batch)
    with jax.default_matmul_precision("highest"):
        seen = {name: np.asarray(a) for name, a in _loop(model, batch)}

    def trace(row: int, example: Example) -> Trace:
        own = {
            name: a[row, : len(example.pixels if name.startswith("vit/") else example.tokens)]
            for name, a in seen.items()
        }
        return Trace(
            {name: a for name, a in own.items() if a.size}, logits[row, : len(example.tokens)]
        )

    return [trace(row, example) for row, example in enumerate(examples)]


def in_float32(model: EVLM) -> EVLM:
    """The model, which from now on computes in float32."""
    exact = {"dtype": "float32", "matmul_precision": "float32"}
    model.cfg = replace(model.cfg, train=replace(model.cfg.train, **exact))
    return model


def logits_of(model: EVLM, batch: Batch) -> np.ndarray:
    """Logits [B, T, vocab] of a model `in_float32`, by the path that training takes."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(model, batch))


@jax.jit
def _logits(model: EVLM, batch: Batch) -> jax.Array:
    return model.logits(model.hidden(batch))


class Step(NamedTuple):
    """A step of `walk`: `apply(how, module, *inputs)` is its output."""

    name: str  # canonical, of the module's parameters: vit/blocks/3, xattn/3, llm/layers/3
    apply: Callable[..., jax.Array]
    how: Any  # static
    module: nnx.Module
    inputs: tuple


@partial(jax.jit, static_argnums=(0, 1))
def taken(apply: Callable, how: Any, module: nnx.Module, *inputs: Any) -> jax.Array:
    """The output of a step, compiled once for all of a kind."""
    return apply(how, module, *inputs)


def _vision(_, block, x):
    return block(x)


def _embedded(_, model, tokens, slots):
    return model.embed(tokens, slots)


def _normed(_, norm, x):
    return norm(x)


def _decoder(scales, block, x, rope, mask):
    def attend(q, k, v):
        return attention(q, k, v, mask, scales.query, scales.score_cap), None

    return block(x, rope, attend)[0]


def _cross(sinks, block, x, tap, grouping):
    k, v = block.keys_values(tap)
    return block(x, lambda q: (grouped_attention(q, k, v, grouping, sinks), None))[0]


def walk(model: EVLM, batch: Batch) -> Generator[Step, jax.Array, None]:
    """Every step of a model over a batch with pixels, in order; each is answered with its output:
    [B * I, S, V] of a block of the ViT, else [B, T, D].
    """
    cfg, vit = model.cfg, model.vit

    def layer(stack, i):
        return jax.tree.map(lambda a: a[i], stack)

    x = (batch.pixels / 255.0 - jnp.array(cfg.vit.mean)) / jnp.array(cfg.vit.std)
    x, taps = vit.embed(x.reshape(-1, *x.shape[2:])), []
    for (first, stop), blocks in zip(stack_bounds(cfg.vit), vit.stacks, strict=True):
        for i in range(first, stop):
            x = yield Step(f"vit/blocks/{i}", _vision, None, layer(blocks, i - first), (x,))
        if stop in cfg.vit.taps:
            taps.append(x.reshape(*batch.pixels.shape[:2], *x.shape[1:]))

    mask, ropes = text_mask(batch.visible_until), rope_tables(cfg.llm, batch.positions)
    grouping = AttentionPlan(
        batch.block_tokens, batch.token_place, batch.pair_block, batch.pair_image
    )
    x = yield Step("embed", _embedded, None, model, (batch.tokens, batch.media_slot))
    for i in range(cfg.llm.layers):
        if i in cfg.cross_layers:
            number = cfg.cross_layers.index(i)
            inputs = x, taps[cfg.tap_of_cross_layer[number]], grouping
            block = layer(model.xattn, number)
            x = yield Step(f"xattn/{i}", _cross, cfg.xattn.sinks, block, inputs)
        rope, seen = layer_rope(cfg.llm, ropes, i), within_window(cfg.llm, mask, batch.positions, i)
        block = layer(model.llm.layers, i)
        x = yield Step(f"llm/layers/{i}", _decoder, cfg.llm.scales, block, (x, rope, seen))
    yield Step("llm/ln_f", _normed, None, model.llm.ln_f, (x,))


def _loop(model: EVLM, batch: Batch) -> Iterator[tuple[str, jax.Array]]:
    """(name, [B, I, S, V] or [B, T, D]) of every step."""
    steps = walk(model, batch)
    taps = {f"vit/blocks/{tap - 1}": f"vit/tap {tap}" for tap in model.cfg.vit.taps}
    step = next(steps)
    while step:
        out = taken(step.apply, step.how, step.module, *step.inputs)
        if step.name in taps:
            yield taps[step.name], out.reshape(*batch.pixels.shape[:2], *out.shape[1:])
        elif not step.name.startswith("vit/"):
            yield step.name, out
        step = answered(steps, out)


def answered(steps: Generator[Step, jax.Array, None], out: jax.Array) -> Step | None:
    """The step behind the one with this output; None: that was the last."""
    try:
        return steps.send(out)
    except StopIteration:
        return None


def batch_of(examples: Sequence[Example], query_block: int, size: tuple[int, int]) -> Batch:
    """One example a row, padded to the largest; at least one image."""
    rows, length = len(examples), max(len(example.tokens) for example in examples)
    images = max(1, *(len(example.pixels) for example in examples))
    pairs = max(
        1,
        *(
            block_pair_count(example.visible_start, example.visible_stop, query_block)
            for example in examples
        ),
    )
    names = ("tokens", "media_slot", "visible_start", "visible_stop")
    arrays = {name: np.full((rows, length), -(name == "media_slot"), np.int32) for name in names}
    arrays |= {
        name: np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        for name in ("positions", "visible_until")
    }
    arrays["visible_until"] += 1
    pixels = np.zeros((rows, images, *size, 3), np.uint8)
    for row, example in enumerate(examples):
        pixels[row, : len(example.pixels)] = example.pixels
        arrays["visible_until"][row, : len(example.tokens)] = len(example.tokens)
        for name in names:
            arrays[name][row, : len(example.tokens)] = getattr(example, name)
    plans = [
        attention_plan(*ranges, query_block, pairs)
        for ranges in zip(arrays["visible_start"], arrays["visible_stop"])
    ]
    arrays |= {name: np.stack([p[name] for p in plans]) for name in AttentionPlan._fields}
    none = np.zeros((rows, 1), np.int32)
    return Batch(
        **arrays,
        target_positions=none,
        targets=none - 1,
        target_source=none,
        pixels=pixels,
        taps=None,
    )


# ------------------------------------------------------------------------------------- Hugging Face


def run_huggingface(
    model_type: str, side: Side, examples: Sequence[Example], llm_only: bool
) -> list[Trace]:
    """A directory, one example at a time, by the class of its model type: code in the directory
    does not run.

    Args:
      model_type: of stock.CLASSES, or "evlm"; empty: the class that the directory's own code
        defines.
    Raises:
      ImportError: torch or transformers is missing.
      ValueError: tensors that the model needs are missing, or some are left over.
    """
    model, torch = _torch_model(model_type, side.path)
    if llm_only and "xattn" in side.sections:
        for block in model.xattn.values():
            block.register_forward_hook(lambda _block, inputs, out: (inputs[0], *out[1:]))
    seen: dict[str, np.ndarray] = {}
    _hook(model.eval(), side.sections, seen)

    def trace(example: Example) -> Trace:
        seen.clear()
        inputs = {"input_ids": example.tokens[None].astype(np.int64)}
        if "vit" in side.sections:
            mean, std = (np.array(side.sections["vit"][name]) for name in ("mean", "std"))
            pixels = (
                ((example.pixels / 255.0 - mean) / std)
                .transpose(0, 3, 1, 2)[None]
                .astype(np.float32)
            )
            inputs |= {
                "pixel_values": pixels,
                "image_groups": example.groups[None].astype(np.int64),
            }
        with torch.no_grad():
            logits = model(
                **{name: torch.from_numpy(a) for name, a in inputs.items()}, use_cache=False
            ).logits
        return Trace(dict(seen), logits[0].numpy())

    return [trace(example) for example in examples]


def _torch_model(model_type: str, path: str) -> tuple[Any, ModuleType]:
    """The model as `run_huggingface` asks for it, with nothing missing or left over; and torch."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f'{path}: running it needs PyTorch: pip install "evlm-jax[parity]" ({error})'
        ) from error
    how = {"trust_remote_code": not model_type, "dtype": torch.float32, "output_loading_info": True}
    if model_type == "evlm":
        from evlm_jax.convert.torch_model.modeling_evlm import EVLMForCausalLM as kind
    else:
        kind = getattr(transformers, CLASSES.get(model_type, "AutoModelForCausalLM"))
    model, loading = kind.from_pretrained(path, **how)
    if wrong := sorted(
        f"{kind.removesuffix('_keys')} {key}"
        for kind in ("missing_keys", "unexpected_keys")
        for key in loading[kind]
    ):
        raise ValueError(
            f"{path}: tensors do not fit the model; export it again:\n  " + "\n  ".join(wrong)
        )
    return model, torch


def _hook(model, sections: dict[str, dict[str, Any]], seen: dict[str, np.ndarray]) -> None:
    """Every later call of the model fills `seen`."""

    def keep(name: str, out) -> None:
        out = out[0] if isinstance(out, tuple) else out
        seen[name] = (out if name.startswith("vit/") else out[0]).detach().numpy().copy()

    def after(module, name: str) -> None:
        module.register_forward_hook(lambda _module, _inputs, out: keep(name, out))

    if "vit" in sections:
        llm, norm = model.llm, model.llm.ln_f
        first = model.xattn["0"] if "0" in model.xattn else llm.layers[0]
        for tap in sections["vit"]["taps"]:
            after(model.vit.blocks[tap - 1], f"vit/tap {tap}")
        for layer, block in model.xattn.items():
            after(block, f"xattn/{layer}")
    else:
        llm, norm, first = model.model, model.model.norm, model.model.layers[0]
    first.register_forward_pre_hook(lambda _module, inputs: keep("embed", inputs[0]))
    for i, layer in enumerate(llm.layers):
        after(layer, f"llm/layers/{i}")
    after(norm, "llm/ln_f")
