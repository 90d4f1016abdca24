"""Which matrices of a model a section of the config chooses, by patterns that are searched in their
canonical names."""

import re
from collections.abc import Container, Sequence

import jax
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.param_names import canonical, is_stacked


def chosen(
    model: nnx.Module, cfg: EVLMConfig, section: str, besides: Container[str] = ()
) -> list[tuple]:
    """Paths of the matrices in whose names a pattern of config.`section` is found.

    Args:
      besides: last pieces of names that are no matrices of the model's own.
    Raises:
      ValueError: a pattern is found in no matrix, or in some layers of a stack and not in others;
        names it and the mend.
    """
    if not (patterns := getattr(cfg, section).patterns):
        return []
    matrices = [
        path
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if len(jax.tree.leaves(leaf)[0].shape) - is_stacked(path) > 1 and path[-1] not in besides
    ]
    what = "matrix; names are like llm/layers/0/attn/q/kernel"
    return among(matrices, cfg, f"{section}.patterns", patterns, what)


def among(
    paths: Sequence[tuple], cfg: EVLMConfig, field: str, patterns: Sequence[str], what: str
) -> list[tuple]:
    """Those of `paths` in whose names a pattern of `field` is found.

    Args:
      what: `paths` are, in the singular.
    Raises:
      ValueError: as `chosen`.
    """
    found = [path for path in paths if _all(field, patterns, canonical(cfg, path))]
    names = [name for path in paths for name in canonical(cfg, path)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"config: {field} has {pattern!r}, which is found in the name of no {what}"
            )
    return found


def _all(field: str, patterns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether the layers of a stack with these names are chosen.

    Raises ValueError where some are and some are not.
    """
    found = {name: any(re.search(p, name) for p in patterns) for name in names}
    if len(set(found.values())) > 1:
        one, other = (next(n for n in found if found[n] is given) for given in (True, False))
        mend = "its layers are one stack: choose all or none"
        if one.startswith("vit/"):
            mend = "let vit.cuts separate their blocks"
        raise ValueError(f"config: {field} choose {one} and not {other}: {mend}")
    return all(found.values())
