"""Which matrices have adapters: those that config.lora chooses by their canonical names.

An adapter stands beside its kernel, as `llm/layers/3/attn/q/lora_a` [in, rank] and `.../lora_b`
[rank, out]; `Linear` (layers.py) adds its product. Only projections of layers can have one: not
embeddings, not the head, whose loss is computed in pieces, not a router, not experts."""

from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.chosen import chosen
from evlm_jax.models.layers import Linear
from evlm_jax.models.param_names import canonical

NAMES = ("lora_a", "lora_b")  # last piece of an adapter's names


def adapt(model: nnx.Module, cfg: EVLMConfig, rngs: nnx.Rngs) -> None:
    """Gives the projections of `model` that cfg.lora chooses their adapters.

    Raises:
      ValueError: as `chosen`, or a pattern is found in a matrix that cannot be adapted.
    """
    projections = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path != ("llm", "head")
    }
    for path in chosen(model, cfg, "lora"):
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
        projection.adapt(cfg.lora.rank, cfg.lora.scale, rngs)


def is_adapter(name: str) -> bool:
    """Whether a canonical name is an adapter's."""
    return name.endswith(NAMES)
