"""IDEFICS: a CLIP and a Llama, with gated cross-attention and a resampler or without. What its
config.json says, and the places where its tensors are not one for one ours.

Words beyond the language model's lie in a table of their own, and gated blocks are numbered by
themselves: `plain` joins the one and numbers the others by their layers, before tables.py."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, Tensors
from evlm_jax.config import EVLMConfig
from evlm_jax.config.xattn import PLAIN
from evlm_jax.convert.config_json import fields_of, settled_part
from evlm_jax.convert.config_rope import FIELDS as ROTARY
from evlm_jax.convert.describe_vision import agree, shapes_of
from evlm_jax.convert.families import IMAGES, INERT

BLOCK = r"model\.gated_cross_attn_layers\.(\d+)\.(.*)"
WORDS = {  # two tables of words, or of a head, that are one
    "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
    "lm_head.weight": "lm_head.additional_fc.weight",
}
VISION = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
PERCEIVER = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}
NAME, BRIDGES = "IDEFICS", ("routed", "flamingo")
TOWER = "model.vision_model."
NORMED = {False: "none", True: "head"}


def plain(source: Source) -> Source:
    """The tensors with words in one table and blocks numbered by the layer behind them; any other
    model as it is.

    Raises ValueError where the words of two tables have other widths.
    """
    if source.metadata.get("model_type") != "idefics":
        return source
    every = source.metadata.get("cross_layer_interval", 1)
    tensors = {}
    for name, tensor in source.tensors.items():
        found = re.fullmatch(BLOCK, name)
        tensors[_numbered(found, every) if found and type(every) is int else name] = tensor
    for first, more in WORDS.items():
        if first in tensors and more in tensors:
            tensors[first] = _joined(source.path, tensors[first], tensors.pop(more))
    return source._replace(tensors=tensors)


def _numbered(found: re.Match, every: int) -> str:
    return f"model.gated_cross_attn_layers.{int(found[1]) * every}.{found[2]}"


def _joined(path: Path, *parts: Tensor) -> Tensor:
    """The rows of one tensor behind those of another. Raises ValueError for rows of other kinds."""
    if {len(part.shape) for part in parts} != {2} or len({part.shape[1] for part in parts}) > 1:
        shapes = " and ".join(f"{part.origin} {part.shape}" for part in parts)
        raise ValueError(f"{path}: {shapes} must be rows of one table; copy the model again")
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = np.result_type(*(part.dtype for part in parts))
    origin = " and ".join(part.origin for part in parts)
    return Tensor(
        shape, dtype, lambda: np.concatenate([part.read() for part in parts]), origin=origin
    )


def parts(source: Source) -> tuple[Source, dict[str, Any], dict[str, dict[str, Any]]]:
    """What a config.json is made of: its vision tower as a CLIP, the config.json of its Llama, and
    the sections of EVLMConfig that connect them.

    Raises ValueError naming a field that is not understood.
    """
    path, config = source.path, source.metadata
    found = fields_of(path, config)
    heads, layers, every = (
        found[name] for name in ("num_attention_heads", "num_hidden_layers", "cross_layer_interval")
    )
    if layers % every:
        raise ValueError(
            f"{path}: config.json has cross_layer_interval {every}, which must divide"
            f" num_hidden_layers {layers}"
        )
    same = ("hidden_size", "intermediate_size", "rms_norm_eps", "tie_word_embeddings")
    text = {name: found[name] for name in same} | {
        "model_type": "llama",
        "vocab_size": found["vocab_size"] + found["additional_vocab_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    text |= {name: config[name] for name in ROTARY if name in config}
    block = {"heads": heads, "kv_heads": heads, "head_dim": found["hidden_size"] // heads}
    block |= {"ffn": found["intermediate_size"], "every": every, "first": 0, "sinks": 0}
    block |= {"eps": found["rms_norm_eps"], "kv_norm": False, "norm_kind": "rms", "gated": True}
    block |= PLAIN | {"qk_norm": NORMED[found["qk_layer_norms"]]}
    media = {"tokens": 1, "sight": "last"}
    sections = {"xattn": block, "media": media, "moe": {"copies": 0}}
    sections["bridge"] = _resampler(source) if found["use_resampler"] else {"kind": "routed"}
    return _clip(source), text, sections


def _clip(source: Source) -> Source:
    """The vision tower as that of a CLIP, whose names begin with TOWER.

    Raises ValueError where `embed_dim`, which is CLIP's hidden_size, is not that of the tensors.
    """
    inert = INERT | {"tie_word_embeddings", "vision_model_name"}
    found = settled_part(source.path, source.metadata, "vision_config", VISION, IMAGES, inert)
    found["hidden_size"] = width = found.pop("embed_dim")
    has = shapes_of(source, TOWER)("embeddings.patch_embedding.weight", 4)[0]
    agree(source, "vision_config of config.json", embed_dim=(width, has))
    return source._replace(metadata={"model_type": "clip", "vision_config": found})


def _resampler(source: Source) -> dict[str, Any]:
    name, inert = "perceiver_config", INERT | {"use_resampler", "tie_word_embeddings"}
    found = settled_part(source.path, source.metadata, name, PERCEIVER, {}, inert)
    return {
        "kind": "flamingo",
        "latents": found["resampler_n_latents"],
        "depth": found["resampler_depth"],
        "heads": found["resampler_n_heads"],
        "head_dim": found["resampler_head_dim"],
        "ffn": 4,
        "prefix": True,
        "eps": 1e-5,
        "activation": "relu",
        "qk_norm": NORMED[found["qk_layer_norms_perceiver"]],
    }


def pixels(cfg: EVLMConfig) -> dict[str, Any]:
    """preprocessor_config.json beside the normalisation."""
    return {"image_size": cfg.vit.image_size, "image_processor_type": "IdeficsImageProcessor"}


def stock(cfg: EVLMConfig, ids: dict[str, Any]) -> dict[str, Any]:
    """The config.json that comes nearest to `cfg`; whether it says all is for `parts` to find.
    `ids` are those of special tokens.
    """
    vit, llm, xattn, bridge = cfg.vit, cfg.llm, cfg.xattn, cfg.bridge
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(vit.activation, vit.activation)
    vision = (vit.width, vit.image_size, vit.mlp, vit.patch, vit.depth, vit.heads, activation)
    resampler = (bridge.latents, bridge.depth, bridge.heads, bridge.head_dim)
    uses = bridge.kind == "flamingo"
    return ids | {
        "model_type": "idefics",
        "architectures": ["IdeficsForVisionText2Text"],
        "vocab_size": llm.vocab,
        "additional_vocab_size": 0,
        "hidden_size": llm.hidden,
        "intermediate_size": llm.mlp,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "hidden_act": "silu",
        "rms_norm_eps": llm.eps,
        "tie_word_embeddings": llm.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},
        "alpha_type": "float",
        "cross_layer_interval": xattn.every,
        "qk_layer_norms": xattn.qk_norm == "head",
        "use_resampler": uses,
        "vision_config": dict(zip(VISION, (*vision, vit.eps), strict=True)),
        "perceiver_config": dict(
            zip(PERCEIVER, (*resampler, bridge.qk_norm == "head"), strict=True)
        )
        if uses
        else {},
    }


def written(tensors: Tensors, cfg: EVLMConfig) -> dict[str, Tensor]:
    """The inverse of `plain`, all words in the first table."""
    return {
        f"model.gated_cross_attn_layers.{int(found[1]) // cfg.xattn.every}.{found[2]}"
        if (found := re.fullmatch(BLOCK, name))
        else name: tensor
        for name, tensor in tensors.items()
    }
