"""Rotary positions as a foreign config.json says them: old keys and new, agreeing with each other,
each understood or refused by name.

Sources: modeling_rope_utils.py of transformers 5.23, and the config classes of Gemma 3 and OLMo 3,
which have positions of their own in layers with a window."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {  # by rope_type, what else is read
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
FIELDS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
)  # of config.json; and rope_local_base_freq where there are two bases

MINISTRAL3 = {  # where config.json has none
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@dataclass(frozen=True)
class Rotary:
    """What the rotary fields of a family may be."""

    theta: float = 10000.0  # transformers' default
    near: float | None = None  # that of layers with a window, where they have their own
    share: bool = False  # partial_rotary_factor is read
    scaled: bool = True  # its class knows scaled positions
    # of a class whose queries grow by position, and which needs to know how: its rope_parameters
    # where config.json has none
    queries: dict[str, Any] | None = None


class Refused(ValueError):
    """A field that cannot have its value, or one that EVLM's decoder cannot compute; without the
    name of the file."""


def rotary(path: Path, config: dict, kind: Rotary) -> dict[str, Any]:
    """rope_theta, rope_near (the base in layers with a window, None where it is rope_theta),
    rope_scaling as LLMConfig has it, rotary_share.

    Raises:
      ValueError: what is not understood, contradicts itself or is not EVLM's; named.
    """
    try:
        return _rotary(config, kind)
    except Refused as error:
        raise ValueError(
            f"{path}: config.json asks for rotary positions with {error}, which EVLM's decoder does"
            " not have"
        ) from None


def _rotary(config: dict, kind: Rotary) -> dict[str, Any]:
    top = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    old, new = (_object(config, name) for name in ("rope_scaling", "rope_parameters"))
    new = new or (kind.queries if kind.queries and not old else {})
    if kind.near is None:
        if old and new and old != new:
            raise Refused("a rope_scaling unlike rope_parameters")
        theta, share, scaling = _one(config, [top, old, new], kind)
        return {
            "rope_theta": theta,
            "rope_near": None,
            "rope_scaling": scaling,
            "rotary_share": share,
        }
    if wrong := [key for key in new if key not in ("full_attention", "sliding_attention")]:
        raise Refused(f"{wrong[0]} {new[wrong[0]]!r} for no kind of layers")
    if "type" in old and "rope_type" not in old:
        raise Refused("a rope_scaling of a type, where transformers reads rope_type alone")
    full, sliding = (_object(new, name) for name in ("full_attention", "sliding_attention"))
    # which transformers does not read beside two bases
    config = config | {"original_max_position_embeddings": None}
    theta, _, scaling = _one(config, [top, old, full], kind)
    local = {"rope_theta": config.get("rope_local_base_freq")}
    if scaling and not scaling.get("truncate", True):
        raise Refused("truncate False, which transformers reads of all layers alone")
    near, _, _ = _one({}, [local, sliding], Rotary(kind.near, scaled=False))
    return {
        "rope_theta": theta,
        "rope_near": near,
        "rope_scaling": scaling and scaling | {"layers": "full"},
        "rotary_share": 1.0,
    }


def _object(config: dict, name: str) -> dict:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise Refused(f"{name} {value!r} that is no object")
    return value


def _one(config: dict, parts: list[dict], kind: Rotary) -> tuple[float, float, dict | None]:
    """(base, share, rope_scaling) of parts that must agree."""
    said = {}
    for part in parts:
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if value is None:
                continue
            if key in said and said[key] != value:
                raise Refused(f"{key} {said[key]} and {value}")
            said[key] = value
    name = said.pop("rope_type", "default")
    theta, share = said.pop("rope_theta", kind.theta), said.pop("partial_rotary_factor", 1.0)
    _number("rope_theta", theta)
    _number("partial_rotary_factor", share)
    if share != 1 and not kind.share:
        raise Refused(f"partial_rotary_factor {share!r}")
    if not isinstance(name, str) or name not in KEYS or (name != "default" and not kind.scaled):
        raise Refused(f"rope_type {name!r}")
    query = _query(name, said) if kind.queries else {}
    if wrong := [f"{key} {value!r}" for key, value in said.items() if key not in KEYS[name]]:
        raise Refused(", ".join(wrong))
    if name == "default":
        return float(theta), float(share), None
    return float(theta), float(share), {"kind": name} | _scaling(name, said, config) | query


def _query(name: str, said: dict) -> dict[str, float]:
    """By what queries grow with their positions. Takes it from what is `said`; published, and read,
    is it beside yarn alone.
    """
    said.pop("max_position_embeddings", None)  # which nothing reads there
    if name != "yarn":
        raise Refused(f"rope_type {name!r} beside llama_4_scaling_beta")
    _number("llama_4_scaling_beta", query := said.pop("llama_4_scaling_beta", None))
    return {"query": float(query)}


def _scaling(name: str, said: dict, config: dict) -> dict[str, Any]:
    """The other fields of RopeScaling."""
    truncate = said.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise Refused(f"truncate {truncate!r}")
    for key, value in said.items():
        _number(key, value)
    if name == "linear":
        return {"factor": _needed(said, "factor")}
    if name == "dynamic":  # for which transformers reads no other length
        original = config.get("max_position_embeddings")
        _number("max_position_embeddings", original)
        return {"factor": _needed(said, "factor"), "original": original}
    own, beside = (
        one.get("original_max_position_embeddings") for one in (said, config)
    )  # what stands beside wins in transformers
    if own and beside and own != beside:
        raise Refused(f"original_max_position_embeddings {own} and {beside}")
    original = own or beside or config.get("max_position_embeddings")
    if type(original) is not int or original <= 0:
        raise Refused(f"original_max_position_embeddings {original!r}")
    if name == "llama3":
        names = {"factor": "factor", "slow": "low_freq_factor", "fast": "high_freq_factor"}
        found = {ours: _needed(said, theirs) for ours, theirs in names.items()}
        if found["slow"] >= found["fast"]:
            raise Refused(f"low_freq_factor {found['slow']}, high_freq_factor {found['fast']}")
        return found | {"original": original}
    return {
        "factor": (factor := _needed(said, "factor")),
        "original": original,
        "slow": float(said.get("beta_slow", 1)),
        "fast": float(said.get("beta_fast", 32)),
        "attention": float(said.get("attention_factor", _attention(factor, said))),
        "truncate": truncate,
    }


def _attention(factor: float, said: dict) -> float:
    """YaRN's factor on cos and sin."""

    def by(scale):
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if "mscale" in said and "mscale_all_dim" in said:
        return by(said["mscale"]) / by(said["mscale_all_dim"])
    return by(1)


def _needed(said: dict, key: str) -> float:
    if key not in said:
        raise Refused(f"no {key}")
    return float(said[key])


def _number(key: str, value: Any) -> None:
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise Refused(f"{key} {value!r}")
