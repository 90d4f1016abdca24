"""The family of tables.py that a checkpoint is of, by its config.json and its names."""

import re

from evlm_jax.checkpoint.lazy_tensors import Source
from evlm_jax.convert.config_json import kind_of
from evlm_jax.convert.families import Kind
from evlm_jax.convert.naming import Family
from evlm_jax.convert.readers import WRAPPERS, wrappers
from evlm_jax.convert.tables import FAMILIES

FRONTS = (*WRAPPERS, "model.")  # the last is Lightning's
QUANTISED = re.compile(
    r".*\.(qweight|qzeros|g_idx|weight_scale(_inv)?|weight_packed|absmax|quant_map|quant_state\..*|SCB|scales)"
)
LARGER = (
    "language_model.",
    "model.language_model.",
    "vision_tower.",
    "model.vision_tower.",
    "thinker.",
    "base_model.model.",
)


def recognise(source: Source) -> tuple[Family, str]:
    """The family, and the prefix of its names, whose signature tensor is in the source and which
    agrees with config.json, if there is one.

    Raises:
      ValueError: none or several fit; config.json has a model type that is not supported, or
        another one; the weights are quantised.
    """
    kind = kind_of(source.path, source.metadata)
    if name := next(filter(QUANTISED.fullmatch, source.tensors), None):
        raise ValueError(
            f"{source.path}: {name} belongs to quantised weights: give the model in bfloat16,"
            " float16 or float32"
        )
    found = next(
        filter(None, (_fitting(source, wrapper) for wrapper in wrappers(source, FRONTS))), []
    )
    found = [one for one in found if _said(source, *one, kind)] or found
    if len(found) != 1:
        names = ", ".join(
            f"{family.name} (as {prefix!r})" for family, prefix in found
        ) or "none of " + ", ".join(f.name for f in FAMILIES)
        larger = [part for part in LARGER if any(name.startswith(part) for name in source.tensors)]
        hint = (
            f"; {' and '.join(larger)} are parts of a larger model or an adapter: save the part"
            " alone, merged"
            if larger
            else ""
        )
        first = ", ".join(list(source.tensors)[:3])
        raise ValueError(
            f"{source.path}: cannot tell the family from the names: {names}; first names are"
            f" {first}{hint}"
        )
    family, prefix = found[0]
    if kind and not _is(family, kind.family):
        raise ValueError(
            f"{source.path} says that it holds {kind.family}, the names of its tensors are"
            f" {family.name}'s"
        )
    return family, prefix


def _said(source: Source, family: Family, prefix: str, kind: Kind | None) -> bool:
    """Whether it is the family that config.json says; where nothing says one, whether it has a
    place for every tensor of a decoder, whose families have names in common.
    """
    if kind:
        return _is(family, kind.family)
    names = (name.removeprefix(prefix) for name in source.tensors)
    return all(
        any(row.match(name) for row in family.rows)
        or any(re.fullmatch(pattern, name) for pattern in family.drop)
        for name in names
    )


def _is(family: Family, name: str) -> bool:
    """Whether a family has a name of families.py; names that changed in transformers 5 apart."""
    return family.name.removesuffix("-transformers5") == name


def _fitting(source: Source, wrapper: str) -> list[tuple[Family, str]]:
    """Families, and what stands before their names, with `wrapper` in front of it."""
    every = [(family, wrapper + prefix) for family in FAMILIES for prefix in family.prefixes]
    return [
        (family, prefix) for family, prefix in every if prefix + family.signature in source.tensors
    ]
