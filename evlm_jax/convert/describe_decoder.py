"""What the config.json of a language model says about it, in the words of LLMConfig."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evlm_jax.config import LLMConfig
from evlm_jax.config.schema import build
from evlm_jax.convert.config_json import fields_of
from evlm_jax.convert.families import KINDS

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"
)
SLIDING, FULL = "sliding_attention", ("full_attention", "attention")


def describe_decoder(path: Path, config: dict) -> dict[str, Any]:
    """All fields of LLMConfig.

    Raises:
      ValueError: the config asks for something that EVLM's decoder does not have; named.
    """
    name, found = config["model_type"], fields_of(path, config)
    said = (_qwen if name == "qwen" else _decoder)(path, name, found)
    return dataclasses.asdict(build(LLMConfig, said | KINDS[name].choices, "llm"))


def _decoder(path: Path, name: str, found: dict) -> dict:
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    windows = _windows(path, name, found)
    return {
        "vocab": found["vocab_size"],
        "hidden": hidden,
        "layers": found["num_hidden_layers"],
        "heads": heads,
        "kv_heads": found["num_key_value_heads"] or heads,
        "head_dim": found["head_dim"] or hidden // heads,
        "mlp": found["intermediate_size"],
        "rope_theta": found["rope_theta"],
        "eps": float(found["rms_norm_eps"]),
        "qkv_bias": False,
        "tied": found["tie_word_embeddings"],
        "dynamic_ntk": 0,
        "logn": 0,
        "window": cycle(windows),
        "rope": _ropes(path, found, windows),
        "rope_scaling": found["rope_scaling"],
        "rotary_share": found["rotary_share"],
        "activation": _activation(path, name, found),
        "scales": _scales(name, found),
    }


def cycle(values: Sequence) -> tuple:
    """The shortest tuple that, taken again and again, gives the values."""
    count = next(
        n
        for n in range(1, len(values) + 1)
        if all(v == values[i % n] for i, v in enumerate(values))
    )
    return tuple(values[:count])


def _windows(path: Path, name: str, found: dict) -> list[int]:
    """The window of each layer; 0 sees all."""
    layers, window = found["num_hidden_layers"], found.get("sliding_window")
    if "layer_types" not in found:
        return [window or 0] * layers
    slides = found.get("use_sliding_window", True)
    types = found["layer_types"]
    if types is None:
        types = [SLIDING if slides and _slides(name, found, i) else FULL[0] for i in range(layers)]
    if (
        len(types) != layers
        or set(types) - {SLIDING, *FULL}
        or (SLIDING in types and not (slides and window))
    ):
        raise ValueError(
            f"{path}: config.json asks for layer_types {types} in {layers} layers with"
            f" sliding_window {window}, which EVLM's decoder does not have"
        )
    return [window if one == SLIDING else 0 for one in types]


def _slides(name: str, found: dict, layer: int) -> bool:
    """Whether a layer has the window, where config.json leaves layer_types out."""
    every = found.get("sliding_window_pattern", {"gemma2": 2, "olmo3": 4}.get(name))
    if every is not None:
        return (layer + 1) % every != 0
    if found["sliding_window"] is None:
        return False
    if "max_window_layers" in found:
        return layer >= found["max_window_layers"]
    return "no_rope_layers" not in found or not _turns(found)[layer]


def _turns(found: dict) -> list[int]:
    """For each layer of SmolLM3, 1 where it has rotary positions, else 0."""
    every = found["no_rope_layer_interval"]
    return found["no_rope_layers"] or [
        int((i + 1) % every != 0) for i in range(found["num_hidden_layers"])
    ]


def _ropes(path: Path, found: dict, windows: list[int]) -> tuple[float, ...]:
    """The rotary bases, where they are not the same in all layers."""
    theta, near = found["rope_theta"], found["rope_near"]
    bases = [near if window and near else theta for window in windows]
    if "no_rope_layers" in found:
        turns = _turns(found)
        if len(turns) != len(bases) or set(turns) - {0, 1}:
            raise ValueError(
                f"{path}: config.json has no_rope_layers {turns}, which must be {len(bases)} times"
                " 0 or 1"
            )
        bases = [base * one for base, one in zip(bases, turns, strict=True)]
    return () if set(bases) == {theta} else cycle(bases)


def _activation(path: Path, name: str, found: dict) -> str:
    field = "hidden_activation" if "hidden_activation" in found else "hidden_act"
    if found[field] not in ACTIVATIONS:
        raise ValueError(
            f"{path}: config.json asks for {field} {found[field]!r}; EVLM's decoder has"
            f" {', '.join(ACTIVATIONS)}"
        )
    if name == "gemma" and found[field] == "gelu":  # an old name of what it is
        return "gelu_tanh"
    return ACTIVATIONS[found[field]]


def _scales(name: str, found: dict) -> dict[str, float]:
    if name == "granite":
        return {
            "embedding": found["embedding_multiplier"],
            "residual": found["residual_multiplier"],
            "query": found["attention_multiplier"],
            "logits": found["logits_scaling"],
        }
    if not name.startswith("gemma"):
        return {}
    scalar = found.get("query_pre_attn_scalar")
    return {
        "embedding": found["hidden_size"] ** 0.5,
        "query": scalar**-0.5 if scalar else 0.0,
        "score_cap": found.get("attn_logit_softcapping") or 0.0,
        "logit_cap": found.get("final_logit_softcapping") or 0.0,
    }


def _qwen(path: Path, name: str, found: dict) -> dict:
    """Qwen 1.0's `intermediate_size` counts both halves of the gated MLP."""
    return {
        "vocab": found["vocab_size"],
        "hidden": found["hidden_size"],
        "layers": found["num_hidden_layers"],
        "heads": found["num_attention_heads"],
        "kv_heads": found["num_attention_heads"],
        "head_dim": found["kv_channels"],
        "mlp": found["intermediate_size"] // 2,
        "rope_theta": float(found["rotary_emb_base"]),
        "eps": found["layer_norm_epsilon"],
        "tied": found["tie_word_embeddings"],
        "dynamic_ntk": found["seq_length"] if found["use_dynamic_ntk"] else 0,
        "logn": found["seq_length"] if found["use_logn_attn"] else 0,
    }
