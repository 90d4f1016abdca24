"""Foreign checkpoints -> canonical arrays, by the tables of tables.py.

Two steps: `plan` decides from names alone what becomes what and refuses everything that does not fit, with every name; only
then are tensors read, one at a time.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import einops
import jax
import numpy as np
from flax import nnx

from evlm_jax import assets
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.describe import describe_source
from evlm_jax.convert.interpolate import resize_positions
from evlm_jax.convert.readers import Source, open_source
from evlm_jax.convert.tables import FAMILIES, Family, Row
from evlm_jax.models.evlm import EVLM
from evlm_jax.names import canonical, is_stacked

log = logging.getLogger(__name__)
Shapes = dict[str, tuple[int, ...]]


class Step(NamedTuple):
    """One foreign tensor and the canonical names it fills."""

    foreign: str
    row: Row
    names: tuple[str, ...]


def load_towers(cfg: EVLMConfig) -> dict[str, np.ndarray]:
    """Canonical arrays of vit/* (blocks up to the highest tap, positions at vit.image_size) and llm/*, in the checkpoint's dtype.

    Raises:
      ValueError: the checkpoint is of another architecture than the config says (every field), or tensors do not fit (every name).
    """
    shapes, towers = parameter_shapes(cfg), {}
    for tower, where in (("vit", cfg.init.vision), ("llm", cfg.init.llm)):
        source = open_source(assets.locate(where))
        expected = {name: shape for name, shape in shapes.items() if name.startswith(tower)}
        towers |= convert(cfg, source, tower, expected)
    return towers


def describe(where: str) -> dict:
    """Fields of ViTConfig or LLMConfig that a checkpoint (asset, directory or file) fixes."""
    source = open_source(assets.locate(where))
    family, prefix = recognise(source)
    return describe_source(source, family.name, prefix)


def parameter_shapes(cfg: EVLMConfig) -> Shapes:
    """{canonical name: shape} of the whole model, without making it."""
    state = nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    leaves = [(path, jax.tree.leaves(leaf)[0].shape) for path, leaf in nnx.to_flat_state(state)]
    return {name: shape[is_stacked(path) :] for path, shape in leaves for name in canonical(cfg, path)}


def convert(cfg: EVLMConfig, source: Source, tower: str, expected: Shapes) -> dict[str, np.ndarray]:
    """One tower. Raises ValueError as load_towers."""
    family, prefix = recognise(source)
    if family.tower != tower:
        raise ValueError(f"{source.path} holds {family.name}, which is no {tower}; check init.vision and init.llm")
    section = getattr(cfg, tower)
    stored = describe_source(source, family.name, prefix)
    if wrong := [f"{tower}.{k} is {getattr(section, k)}, the checkpoint has {v}" for k, v in stored.items() if getattr(section, k) != v]:
        raise ValueError(f"{source.path} does not fit the config; change the config:\n  " + "\n  ".join(wrong))
    steps, dropped = plan(source, family, prefix, expected)
    log.info("%s: %s, %d tensors read, %d dropped on purpose: %s", source.path, family.name, len(steps), len(dropped), ", ".join(dropped))
    arrays = dict(read(source, steps, {"heads": stored["heads"], "kv_heads": stored.get("kv_heads"), "two": 2}))
    if tower == "vit":
        vit = cfg.vit
        arrays["vit/pos"] = resize_positions(arrays["vit/pos"], vit.pretrained_size // vit.patch, vit.grid, vit.interpolation)
    if wrong := [f"{n} {arrays[n].shape}, the config needs {shape}" for n, shape in expected.items() if arrays[n].shape != shape]:
        raise ValueError(f"{source.path}: shapes do not fit:\n  " + "\n  ".join(wrong))
    return arrays


def recognise(source: Source) -> tuple[Family, str]:
    """The one family, and the prefix of its names, whose signature tensor is there. Raises ValueError if none or several fit."""
    found = [(family, prefix) for family in FAMILIES for prefix in family.prefixes if prefix + family.signature in source.tensors]
    if len(found) != 1:
        names = ", ".join(f"{family.name} (as {prefix!r})" for family, prefix in found) or "none of " + ", ".join(f.name for f in FAMILIES)
        raise ValueError(
            f"{source.path}: cannot tell the family from the names: {names}; first names are {', '.join(list(source.tensors)[:3])}"
        )
    return found[0]


def plan(source: Source, family: Family, prefix: str, expected: Shapes) -> tuple[list[Step], list[str]]:
    """Steps that fill every expected name exactly once, and the tensors dropped on purpose. Reads nothing.

    Blocks above the highest tap are dropped: the model does not have them.

    Raises:
      ValueError: listing every tensor without a place and every name that nothing fills.
    """
    steps, dropped, unmatched = [], [], []
    top = len({name.split("/")[2] for name in expected if name.startswith("vit/blocks/")})
    for foreign in source.tensors:
        short = foreign.removeprefix(prefix)
        row, names = next(((row, names) for row in family.rows if (names := row.match(short))), (None, ()))
        above = family.tower == "vit" and any(name.startswith("vit/blocks/") and int(name.split("/")[2]) >= top for name in names)
        outside = family.drop_outside and not foreign.startswith(prefix)
        if row and not outside and expected.keys() >= set(names):
            steps.append(Step(foreign, row, names))
        elif above or outside or any(re.fullmatch(pattern, short) for pattern in family.drop):
            dropped.append(foreign)
        else:
            unmatched.append(foreign)
    unfilled = expected.keys() - {name for step in steps for name in step.names}
    problems = [f"no place for {name}" for name in unmatched] + [f"nothing fills {name}" for name in sorted(unfilled)]
    if problems:
        raise ValueError(f"{source.path} ({family.name}) does not fit the config:\n  " + "\n  ".join(problems))
    return steps, dropped


def read(source: Source, steps: list[Step], sizes: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Runs the steps, one tensor at a time. Raises ValueError naming a tensor that its pattern does not fit."""
    for foreign, row, names in steps:
        array = source.tensors[foreign].read()
        if row.pattern:
            lengths = _lengths(row.pattern, sizes | {"n": len(names)})
            try:
                array = einops.rearrange(array, row.pattern, **lengths)
            except einops.EinopsError as error:
                raise ValueError(
                    f"{source.path}: {foreign} has shape {array.shape}, which does not fit {row.pattern!r} with {lengths}"
                ) from error
        yield from zip(names, array if len(names) > 1 else (array,), strict=True)


def unplan(family: Family, names: Iterable[str]) -> list[Step]:
    """The inverse of `plan`: steps that use every canonical name exactly once. Raises ValueError listing those without a place."""
    names = set(names)
    found = (
        Step(foreign, row, filled) for name in sorted(names) for row in family.rows for foreign, filled in [row.unmatch(name) or ("", ())]
    )
    steps = [step for step in found if step.names and names >= set(step.names)]
    if homeless := sorted(names - {name for step in steps for name in step.names}):
        raise ValueError(f"{family.name} has no place for:\n  " + "\n  ".join(homeless))
    return steps


def unread(step: Step, arrays: Sequence[np.ndarray], sizes: dict[str, int]) -> np.ndarray:
    """The foreign tensor of one step of `unplan`, from the arrays of its canonical names."""
    array = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    if not step.row.pattern:
        return array
    foreign, ours = step.row.pattern.split(" -> ")
    return einops.rearrange(array, f"{ours} -> {foreign}", **_lengths(step.row.pattern, sizes | {"n": len(arrays)}))


def _lengths(pattern: str, sizes: dict[str, int]) -> dict[str, int]:
    """Those of `sizes` whose axis stands in the pattern."""
    return {axis: length for axis, length in sizes.items() if re.search(rf"\b{axis}\b", pattern)}
