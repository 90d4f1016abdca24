"""Which matrices have adapters: those that config.lora chooses by their canonical names.

An adapter stands beside its kernel, as `llm/layers/3/attn/q/lora_a` [in, rank] and `.../lora_b`
[rank, out]; `Linear` (layers.py) adds its product. Only projections of layers can have one: not
embeddings, not the head, whose loss is computed in pieces, not a router, not experts."""

import re
from collections.abc import Iterable

import jax
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.layers import Linear
from evlm_jax.models.param_names import canonical, is_stacked

NAMES = ("lora_a", "lora_b")  # last piece of an adapter's names


def adapt(model: nnx.Module, cfg: EVLMConfig, rngs: nnx.Rngs) -> None:
    """Gives the projections of `model` that cfg.lora chooses their adapters.

    Raises:
      ValueError: a pattern is found in no matrix, in one that cannot be adapted, or in some layers
        of a stack and not in others; names it and the mend.
    """
    if not cfg.lora.patterns:
        return
    matrices = [
        path
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if len(jax.tree.leaves(leaf)[0].shape) - is_stacked(path) > 1
    ]
    chosen = [path for path in matrices if _chosen(cfg, canonical(cfg, path))]
    names = [name for path in matrices for name in canonical(cfg, path)]
    for pattern in cfg.lora.patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"config: lora.patterns has {pattern!r}, which is found in the name of no matrix;"
                " names are like llm/layers/0/attn/q/kernel"
            )
    projections = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path != ("llm", "head")
    }
    for path in chosen:
        projection = projections.get(tuple(map(str, path[:-1])))
        if projection is None:
            raise ValueError(
                f"config: lora.patterns choose {canonical(cfg, path)[0]}, which is no projection of"
                " a layer and cannot be adapted: narrow them, as to '^llm/layers/.*/attn/[qv]/'"
            )
        if path[0] == "vit" and cfg.data.cache_features:
            raise ValueError(
                "config: lora.patterns choose matrices of the vision tower, cached taps would not"
                " follow: set data.cache_features=False"
            )
        projection.adapt(cfg.lora.rank, cfg.lora.alpha / cfg.lora.rank, rngs)


def is_adapter(name: str) -> bool:
    """Whether a canonical name is an adapter's."""
    return name.endswith(NAMES)


def _chosen(cfg: EVLMConfig, names: Iterable[str]) -> bool:
    """Whether the layers of a stack with these names are adapted.

    Raises ValueError where some are and some are not.
    """
    found = {name: any(re.search(p, name) for p in cfg.lora.patterns) for name in names}
    if len(set(found.values())) > 1:
        one, other = (next(n for n in found if found[n] is given) for given in (True, False))
        mend = "its layers are one stack: choose all or none"
        if one.startswith("vit/"):
            mend = "let vit.cuts separate their blocks"
        raise ValueError(f"config: lora.patterns choose {one} and not {other}: {mend}")
    return all(found.values())
