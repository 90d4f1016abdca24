"""Which matrices are held in 8 or 4 bits: those that config.quant chooses by their canonical names.

Such a matrix keeps its name, `llm/layers/3/attn/q/kernel`, and is bytes (ops/quantised.py); beside
it stand the scales of its tiles, `.../kernel_scale`. `Linear` (layers.py) and the word embeddings
(llm.py) hand both to the product, which alone makes a matrix of them. What is held so is frozen:
values come from tensors, never from training."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors
from evlm_jax.config import EVLMConfig
from evlm_jax.models import lora
from evlm_jax.models.chosen import among, chosen
from evlm_jax.models.layers import Linear
from evlm_jax.models.param_names import canonical
from evlm_jax.ops.quantised import dequantise, quantise, shapes

NAMES = ("kernel_scale", "embed_scale")  # last piece of the names of scales
TABLE = "llm/embed"


def hold(model: nnx.Module, cfg: EVLMConfig) -> None:
    """Gives the matrices of `model` that cfg.quant chooses their form, without values.

    Raises:
      ValueError: as `chosen`; a pattern is found in a matrix that cannot be quantised; tiles do not
        divide one; a pattern of quant.int8 is found in none of those, or as `chosen`.
    """
    paths = chosen(model, cfg, "quant", lora.NAMES)
    projections = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    for path in paths:
        name, place = canonical(cfg, path)[0], tuple(map(str, path))
        holder = model.llm if name == TABLE else projections.get(place[:-1])
        if holder is None:
            raise ValueError(
                f"config: quant.patterns choose {name}, which is no projection and no table of"
                " words and cannot be quantised: narrow them, as to '^llm/layers/.*/kernel'"
            )
        matrix = jax.tree.leaves(getattr(holder, place[-1]))[0]
        if matrix.shape[_axis(name)] % cfg.quant.tile:
            raise ValueError(
                f"config: quant.tile = {cfg.quant.tile} does not divide the"
                f" {matrix.shape[_axis(name)]} of {name}: give another, or leave it out"
            )
        holder.hold(cfg.quant.kind_of(name), cfg.quant.tile)
    among(paths, cfg, "quant.int8", cfg.quant.int8, "matrix that quant.patterns choose")


def is_quantised(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the leaf of a model at `path` belongs to a quantised matrix."""
    return path[-1] in NAMES or leaf.dtype == np.uint8


def plain(names: Collection[str]) -> set[str]:
    """Those of a model's canonical names that are of no quantised matrix."""
    return {n for n in names if not n.endswith(NAMES) and f"{n}_scale" not in names}


def parameters(cfg: EVLMConfig, path: tuple, variable: nnx.Variable) -> int:
    """How many parameters a leaf of a model holds: two a byte in 4 bits; a scale is none."""
    leaf = jax.tree.leaves(variable)[0]
    if path[-1] in NAMES:
        return 0
    paired = leaf.dtype == np.uint8 and cfg.quant.kind_of(canonical(cfg, path)[0]) != "int8"
    return math.prod(leaf.shape) * (1 + paired)


def quantised(cfg: EVLMConfig, names: Iterable[str], tensors: Tensors) -> dict[str, Tensor]:
    """`tensors`, and in place of each matrix that cfg.quant chooses its bytes and scales, unless
    they are there.

    Args:
      names: canonical ones of the model's parameters.
    Raises:
      ValueError: nothing gives the values of such a matrix.
    """
    scales = {n.removesuffix("_scale"): n for n in names if n.endswith(NAMES) and n not in tensors}
    if name := min(scales.keys() - tensors.keys(), default=""):
        raise ValueError(
            f"config: quant.patterns choose {name}, which begins anew: train it first, then"
            " `evlm convert quantize`"
        )
    out = dict(tensors)
    for name, scale in scales.items():
        how = cfg.quant.kind_of(name), cfg.quant.tile, _axis(name)
        out[name], out[scale] = _quantised(tensors[name], *how)
    return out


def _quantised(tensor: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """Bytes and scales. The scales that come with bytes wait until they are read, so that a start
    reads and quantises each matrix once.
    """
    waiting: list[np.ndarray] = []
    of_bits, of_scales = shapes(tensor.shape, *how)

    def bits() -> np.ndarray:
        made, scale = quantise(tensor.read(), *how)
        waiting[:] = [scale]
        return made

    def scales() -> np.ndarray:
        return waiting.pop() if waiting else quantise(tensor.read(), *how)[1]

    return Tensor(of_bits, np.dtype(np.uint8), bits), Tensor(
        of_scales, np.dtype(np.float32), scales
    )


def whole(cfg: EVLMConfig, tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` with float32 matrices in place of quantised ones."""
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith(NAMES)}
    for scale in filter(lambda name: name.endswith(NAMES), tensors):
        name = scale.removesuffix("_scale")
        out[name] = _whole(tensors[name], tensors[scale], cfg.quant.kind_of(name), _axis(name))
    return out


def _whole(bits: Tensor, scale: Tensor, kind: str, axis: int) -> Tensor:
    shape = list(bits.shape)
    shape[axis] *= 1 if kind == "int8" else 2

    def read() -> np.ndarray:
        return dequantise(bits.read(), scale.read(), kind, axis)

    return Tensor(tuple(shape), np.dtype(np.float32), read)


def check_taken_up(
    cfg: EVLMConfig, before: EVLMConfig, init: str, names: Mapping[str, tuple[int, ...]], params
) -> None:
    """Raises ValueError where matrices that an earlier stage's run `init` holds quantised, among
    its `params`, are held otherwise by a model with these `names`.
    """
    for scale in sorted(name for name in params if name.endswith(NAMES)):
        name = scale.removesuffix("_scale")
        own, other = ((quant.kind_of(name), quant.tile) for quant in (before.quant, cfg.quant))
        if scale not in names or own != other:
            raise ValueError(
                f"{init} holds {name} in {own[0]} by {own[1]}: give its quant section, patterns"
                f" {before.quant.patterns} and int8 {before.quant.int8}, or make it whole with"
                " `evlm convert merge`"
            )


def _axis(name: str) -> int:
    """The axis of a matrix that products sum over."""
    return -1 if name == TABLE else -2
