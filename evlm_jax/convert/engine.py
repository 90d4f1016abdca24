"""Foreign checkpoints <-> canonical tensors, by the tables of tables.py.

Two steps: `conversion_plan` (and `foreign_plan`, its inverse) decides from names, shapes and dtypes
alone what becomes what and refuses everything that does not fit, with every name. Only then are
tensors read, one at a time, when the `Tensor` that needs them is."""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import einops
import jax
import numpy as np
from flax import nnx

from evlm_jax import assets
from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, Tensors, read_all
from evlm_jax.checkpoint.safetensors_file import FLOATS, finite
from evlm_jax.config import EVLMConfig
from evlm_jax.convert import idefics, mllama
from evlm_jax.convert.describe import describe_source
from evlm_jax.convert.inert import check_dropped
from evlm_jax.convert.interpolate import resized_positions
from evlm_jax.convert.naming import Family, NameRow
from evlm_jax.convert.readers import open_source
from evlm_jax.convert.recognise import recognise
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import canonical, is_stacked

log = logging.getLogger(__name__)
Shapes = dict[str, tuple[int, ...]]
PARTS = {  # how canonical names begin, of each part of the model that a checkpoint may hold
    "vit": ("vit/",),
    "llm": ("llm/",),
    "evlm": ("",),
    "xattn": ("xattn/", "bridge/", "llm/embed"),
    "whole": ("vit/", "llm/", "xattn/", "bridge/"),  # all but media embeddings
}


WHOLE = {"idefics": idefics, "mllama": mllama}  # whose layers have other numbers in their files


class ConversionStep(NamedTuple):
    """One foreign tensor and the canonical names it fills."""

    foreign: str
    row: NameRow
    names: tuple[str, ...]


def open_towers(cfg: EVLMConfig) -> dict[str, Tensor]:
    """Canonical tensors of vit/* (blocks up to the highest tap, positions at vit.image_size) and
    llm/*, in the checkpoint's dtype, read lazily.

    Raises:
      ValueError: the checkpoint has another architecture than the config (every field), or tensors
        do not fit (every name).
    """
    places = {"vit": cfg.init.vision, "llm": cfg.init.llm}
    towers = [
        open_tower(cfg, open_source(assets.locate(where)), tower) for tower, where in places.items()
    ]
    return towers[0].tensors | towers[1].tensors


def load_towers(cfg: EVLMConfig) -> dict[str, np.ndarray]:
    """`open_towers` as arrays in memory."""
    return read_all(open_towers(cfg))


def describe(where: str) -> dict:
    """Fields of ViTConfig or LLMConfig that a checkpoint (asset, directory or file) fixes."""
    source = open_source(assets.locate(where))
    family, prefix = recognise(source)
    return describe_source(source, family.name, prefix)


def parameter_shapes(cfg: EVLMConfig) -> Shapes:
    """{canonical name: shape} of the whole model, without making it."""
    state = nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    leaves = [(path, jax.tree.leaves(leaf)[0].shape) for path, leaf in nnx.to_flat_state(state)]
    return {
        name: shape[is_stacked(path) :] for path, shape in leaves for name in canonical(cfg, path)
    }


class Tower(NamedTuple):
    """A part of the model as a foreign checkpoint has it."""

    family: str
    tensors: dict[str, Tensor]  # by canonical name
    dropped: list[str]  # foreign names without a place in EVLM, on purpose
    prefix: str  # in front of its names, taken off


def open_tower(cfg: EVLMConfig, source: Source, tower: str) -> Tower:
    """The part `tower` of the model, one of PARTS. Raises ValueError as load_towers.

    Reads nothing but what it drops, where that may say something.
    """
    family, prefix = recognise(source)
    if family.tower != tower:
        raise ValueError(
            f"{source.path} holds {family.name}, which is no {tower}; check init.vision and"
            " init.llm"
        )
    facts = describe_source(source, family.name, prefix)
    check_fields(cfg, source, facts, tower)
    expected = {
        name: shape
        for name, shape in parameter_shapes(cfg.merged).items()
        if name.startswith(PARTS[tower])
    }
    steps, dropped = conversion_plan(source, family, prefix, expected, cfg)
    check_dropped(source, family, prefix, dropped, facts.get("llm", facts))
    log.info(
        "%s: %s, %d tensors read, %d dropped on purpose: %s",
        source.path,
        family.name,
        len(steps),
        len(dropped),
        ", ".join(dropped),
    )
    tensors = to_canonical(source, steps, sizes(cfg, tower))
    if "vit/pos" in tensors and tower in ("vit", "whole"):
        vit, side = cfg.vit, cfg.vit.pretrained_size // cfg.vit.patch
        tensors["vit/pos"] = resized_positions(
            tensors["vit/pos"], (side, side), vit.table_grid, vit.interpolation
        )
    if wrong := [
        f"{source.spelled(step.foreign)} gives {name} {tensors[name].shape}, the config needs"
        f" {expected[name]}"
        for step in steps
        for name in step.names
        if tensors[name].shape != expected[name]
    ]:
        raise ValueError(f"{source.path}: shapes do not fit:\n  " + "\n  ".join(wrong))
    return Tower(family.name, tensors, dropped, prefix)


def check_fields(cfg: EVLMConfig, source: Source, stored: dict, tower: str) -> None:
    """Raises ValueError listing every field of the config that the checkpoint contradicts."""
    sections = {tower: stored} if tower in ("vit", "llm") else stored
    if wrong := differences(cfg, sections, "the checkpoint"):
        raise ValueError(
            f"{source.path} does not fit the config; change the config:\n  " + "\n  ".join(wrong)
        )


def differences(cfg: EVLMConfig, sections: dict[str, dict], whose: str) -> list[str]:
    """Every field of the config that differs from `sections`, in words."""
    return [
        f"{name}.{key} is {have[key]}, {whose} has {value}"
        for name, said in sections.items()
        for have in [dataclasses.asdict(getattr(cfg, name))]
        for key, value in said.items()
        if have[key] != value
    ]


def sizes(cfg: EVLMConfig, tower: str) -> dict[str, int]:
    """Axis lengths of the tables' patterns that cannot be derived from shapes."""
    if tower != "llm":
        return {"two": 2}
    llm, keys = cfg.llm, cfg.llm.kv_heads * cfg.llm.head_dim
    widths = {"q": llm.heads * llm.head_dim, "k": keys, "v": keys}
    return {"two": 2, "heads": llm.heads, "kv_heads": llm.kv_heads} | widths


def conversion_plan(
    source: Source, family: Family, prefix: str, expected: Shapes, cfg: EVLMConfig
) -> tuple[list[ConversionStep], list[str]]:
    """Steps that fill every expected name exactly once, and the tensors dropped on purpose. Reads
    nothing.

    Blocks above the highest tap are dropped: the model does not have them.

    Args:
      cfg: of the model, whose numbers of layers are those of the names in messages.
    Raises:
      ValueError: listing every tensor without a place and every name that nothing fills, or more
        than one.
    """
    steps, dropped, unmatched = [], [], []
    top = len({name.split("/")[2] for name in expected if name.startswith("vit/blocks/")})
    for foreign in source.tensors:
        short = foreign.removeprefix(prefix)
        row, names = next(
            ((row, names) for row in family.rows if (names := row.match(short))), (None, ())
        )
        above = family.tower == "vit" and any(
            name.startswith("vit/blocks/") and int(name.split("/")[2]) >= top for name in names
        )
        outside = family.drop_outside and not foreign.startswith(prefix)
        if row and not outside and expected.keys() >= set(names):
            steps.append(ConversionStep(foreign, row, names))
        elif above or outside or any(re.fullmatch(pattern, short) for pattern in family.drop):
            dropped.append(foreign)
        else:
            unmatched.append(foreign)
    by: dict[str, list[str]] = {name: [] for name in sorted(expected)}
    for step in steps:
        for name in step.names:
            by[name].append(step.foreign)
    problems = [f"no place for {source.spelled(name)}" for name in unmatched]
    problems += [
        f"{' and '.join(map(source.spelled, foreign))} fill {name}"
        if foreign
        else f"nothing fills {name}: {_missing(family, prefix, name, cfg)} is missing"
        for name, foreign in by.items()
        if len(foreign) != 1
    ]
    dtypes = {step.foreign: source.tensors[step.foreign].dtype for step in steps}
    problems += [
        f"{source.spelled(name)} is {dtype}; weights are {', '.join(map(str, FLOATS))}"
        for name, dtype in dtypes.items()
        if dtype not in FLOATS
    ]
    if problems:
        raise ValueError(
            f"{source.path} ({family.name}) does not fit the config:\n  " + "\n  ".join(problems)
        )
    return steps, dropped


def _missing(family: Family, prefix: str, name: str, cfg: EVLMConfig) -> str:
    """What a checkpoint of the family calls the tensor that fills a canonical name."""
    parts = (
        row.foreign.format(*found.groups())
        for row in family.rows
        for path in row.paths * row.written
        if (found := re.fullmatch(re.escape(path).replace(r"\{\}", r"(\d+)"), name))
    )
    foreign = next(parts, "a tensor")
    if family.name in WHOLE:
        (foreign,) = WHOLE[family.name].written({foreign: None}, cfg)
    return f"{prefix}{foreign}"


def to_canonical(
    source: Source, steps: Sequence[ConversionStep], lengths: dict[str, int]
) -> dict[str, Tensor]:
    """The canonical tensors of `conversion_plan`'s steps.

    Raises ValueError naming a tensor that its pattern does not fit; when one is read, that it holds
    NaN or infinity.
    """
    read_from = [finite(source.path, step.foreign, source.tensors[step.foreign]) for step in steps]

    @functools.lru_cache(maxsize=1)  # the parts of a fused tensor are read one after another
    def parts(number: int) -> list[np.ndarray]:
        return _parts(steps[number], read_from[number].read(), lengths)

    tensors = {}
    for number, (step, foreign) in enumerate(zip(steps, read_from)):
        try:
            none = np.broadcast_to(np.zeros((), foreign.dtype), foreign.shape)
            shapes = [part.shape for part in _parts(step, none, lengths)]
        except einops.EinopsError as error:
            raise ValueError(
                f"{source.path}: {source.spelled(step.foreign)} has shape {foreign.shape}, which"
                f" does not fit {step.row.pattern!r}"
            ) from error
        if len(step.names) == 1:

            def read(step=step, foreign=foreign):
                return _parts(step, foreign.read(), lengths)[0]

            tensors[step.names[0]] = Tensor(shapes[0], foreign.dtype, read)
            continue
        for i, (name, shape) in enumerate(zip(step.names, shapes, strict=True)):
            tensors[name] = Tensor(
                shape, foreign.dtype, lambda number=number, i=i: parts(number)[i]
            )
    return tensors


def foreign_plan(family: Family, names: Iterable[str]) -> list[ConversionStep]:
    """The inverse of `conversion_plan`: steps that use every canonical name exactly once.

    Raises ValueError listing those without a place.
    """
    names = set(names)
    found = (
        ConversionStep(foreign, row, filled)
        for name in sorted(names)
        for row in family.rows
        for foreign, filled in [row.unmatch(name) or ("", ())]
    )
    steps = [step for step in found if step.names and names >= set(step.names)]
    if homeless := sorted(names - {name for step in steps for name in step.names}):
        raise ValueError(f"{family.name} has no place for:\n  " + "\n  ".join(homeless))
    return steps


def to_foreign(family: Family, tensors: Tensors, lengths: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of `ours`: all of `tensors` in the names and layouts of a family.

    Raises ValueError as `foreign_plan`.
    """

    def made(step: ConversionStep, arrays: list[np.ndarray]) -> np.ndarray:
        if not step.row.pattern:
            return arrays[0] + arrays[0].dtype.type(step.row.less) if step.row.less else arrays[0]
        foreign, canonical = step.row.pattern.split(" -> ")
        back = f"{canonical} -> {foreign}"
        if step.row.sizes:
            return np.concatenate([einops.rearrange(array, back) for array in arrays])
        fused = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        return einops.rearrange(fused, back, **_lengths(step, lengths))

    out = {}
    for step in foreign_plan(family, tensors):
        parts = [tensors[name] for name in step.names]
        shape = made(
            step, [np.broadcast_to(np.zeros((), part.dtype), part.shape) for part in parts]
        ).shape
        out[step.foreign] = Tensor(
            shape,
            parts[0].dtype,
            lambda step=step, parts=parts: made(step, [part.read() for part in parts]),
        )
    return out


def _parts(step: ConversionStep, array: np.ndarray, lengths: dict[str, int]) -> list[np.ndarray]:
    """What a foreign array holds, in our layouts."""
    if step.row.sizes:
        ends = np.cumsum([lengths[name] for name in step.row.sizes])
        if array.shape[0] != ends[-1]:
            raise einops.EinopsError(f"{array.shape[0]} rows, not {ends[-1]}")
        return [einops.rearrange(part, step.row.pattern) for part in np.split(array, ends[:-1])]
    if step.row.pattern:
        array = einops.rearrange(array, step.row.pattern, **_lengths(step, lengths))
    if step.row.less:
        array = array - array.dtype.type(step.row.less)
    return list(array) if len(step.names) > 1 else [array]


def _lengths(step: ConversionStep, lengths: dict[str, int]) -> dict[str, int]:
    """Those of `lengths` whose axis stands in the pattern, and `n` of a fused tensor."""
    named = lengths | {"n": len(step.names)}
    return {
        axis: length
        for axis, length in named.items()
        if re.search(rf"\b{axis}\b", step.row.pattern)
    }
