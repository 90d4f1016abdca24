"""A foreign config.json held against the table of families.py: what is not understood is refused by
name."""

import math
from pathlib import Path
from typing import Any

from evlm_jax.convert.config_rope import FIELDS as ROTARY
from evlm_jax.convert.config_rope import rotary
from evlm_jax.convert.families import GGUF, INERT, KINDS, NEEDED, OFF, WHOLE, Kind

LISTS = {"layer_types": str, "no_rope_layers": int}  # one value a layer, or null
LISTS |= {"cross_attention_layers": int, "intermediate_layers_indices": int}
LISTS |= {"supported_aspect_ratios": list}
SIDES = ("image_size", "patch_size")  # a number, or two that are equal
MOST = 2**31 - 1  # of whole numbers
SOFT = ("attn_logit_softcapping", "final_logit_softcapping")  # numbers, or null


def kind_of(path: Path, config: dict) -> Kind | None:
    """Kind of model in config.json or in a GGUF file; None where neither names one: no config.json,
    or one with EVA's fields.

    Raises:
      ValueError: a model type that is not supported, or one whose weights are quantised; named.
    """
    if "general.architecture" in config:
        return _kind_of_gguf(path, config)
    method = config.get("quantization_config") or config.get("compression_config")
    if method:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(
            f"{path}: config.json says that the weights are quantised ({name}): give the model in"
            " bfloat16, float16 or float32"
        )
    name = config.get("model_type")
    if name == "evlm":
        return Kind("evlm", "evlm", {})
    if name is None:
        if not config or {"vision_cfg", "architecture"} & config.keys():
            return None
        raise ValueError(
            f"{path}: config.json lacks model_type; copy it from the model's own directory"
        )
    if not isinstance(name, str) or name not in KINDS.keys() | WHOLE.keys():
        known = ", ".join([*KINDS, *WHOLE])
        raise ValueError(
            f"{path}: config.json says model_type {name!r}, which is not read; read are {known}"
            " (evlm convert families)"
        )
    return KINDS[WHOLE.get(name, name)]


def _kind_of_gguf(path: Path, metadata: dict) -> Kind:
    """llama.cpp's architectures; "llama" is that of Llama, SmolLM2 and Mistral.

    Raises ValueError for another, a part or an adapter.
    """
    said = {"general.architecture": tuple(GGUF), "general.type": ("model",), "split.count": (0, 1)}
    if wrong := [
        f"{key} {metadata[key]!r}, read is {', '.join(map(str, ours))}"
        for key, ours in said.items()
        if metadata.get(key, ours[0]) not in ours
    ]:
        raise ValueError(f"{path}: the GGUF file has {', '.join(wrong)}")
    return Kind(GGUF[metadata["general.architecture"]], "llm", {})


def fields_of(path: Path, config: dict) -> dict[str, Any]:
    """The fields of `kind.read`, and where the kind is rotary those of config_rope.rotary, with
    defaults filled in.

    Raises:
      ValueError: naming every field that is not understood, or has a value that EVLM's towers
        cannot compute.
    """
    name, where = config["model_type"], where_of(config)
    if name in WHOLE:
        config, name = _vision_config(path, config), WHOLE[name]
        if config.get("model_type", name) != name:
            raise ValueError(
                f"{path}: {where} says model_type {config['model_type']!r}, which is not {name}"
            )
    kind = KINDS[name]
    silent = INERT | kind.silent | set(ROTARY if kind.rotary else ())
    silent |= {"rope_local_base_freq"} if kind.rotary and kind.rotary.near else set()
    if kind.tower == "vit":
        silent |= {"is_causal", "tie_word_embeddings"}
    found = settled(path, where, config, kind.read, kind.fixed, silent)
    return found | (rotary(path, config, kind.rotary) if kind.rotary else {})


def where_of(config: dict) -> str:
    """Where the fields of a tower stand: in config.json, or in an object of it."""
    whole = config.get("model_type") in WHOLE
    return "vision_config of config.json" if whole else "config.json"


def settled(
    path: Path, where: str, config: dict, read: dict, fixed: dict, inert: frozenset | set
) -> dict[str, Any]:
    """Values of the fields in `read`.

    Raises ValueError naming every field that is missing, unknown, or not as `fixed` has it, or OFF.
    """
    off = OFF.keys() & config.keys() - inert - read.keys()
    fixed = {name: OFF[name] for name in off} | fixed
    lacks = [
        name for name, default in read.items() if default is NEEDED and config.get(name) is None
    ]
    if lacks:
        raise ValueError(
            f"{path}: {where} lacks {', '.join(lacks)}; copy it from the model's own directory"
        )
    known = read.keys() | fixed.keys() | inert
    wrong = [
        f"{name} {value!r}"
        for name, value in config.items()
        if name not in known and not (value is None or value in ({}, []))
    ]
    for name, (default, allowed) in fixed.items():
        value = config.get(name, default)
        if isinstance(value, (list, dict)) or value not in allowed:
            wrong.append(
                f"{name} {value!r}" + ("" if name in config else " (transformers' default)")
            )
    if wrong:
        mend = "remove a field if transformers' own class has no use for it"
        raise ValueError(
            f"{path}: {where} asks for {', '.join(sorted(wrong))}, which is not understood or not"
            f" EVLM's; {mend}"
        )
    said = {name: config.get(name, default) for name, default in read.items()}
    values = {name: _side(value) if name in SIDES else value for name, value in said.items()}
    if odd := [
        f"{name} {values[name]!r}"
        for name, default in read.items()
        if not _alike(name, values[name], default)
    ]:
        raise ValueError(f"{path}: {where} has {', '.join(odd)}, which no such field can be")
    return values


def _side(value: Any) -> Any:
    """Two equal sides of an image or a patch as one."""
    return (
        value[0]
        if isinstance(value, list)
        and len(value) == 2
        and value[0] == value[1]
        and isinstance(value[0], int)
        else value
    )


def _alike(name: str, value: Any, default: Any) -> bool:
    """Whether a value is of the type of its field: names, flags, whole numbers and others;
    positive and finite.
    """
    if value == math.inf or (type(value) is int and value > MOST):
        return False
    if name in LISTS:
        return value is None or (
            isinstance(value, list) and all(type(one) is LISTS[name] for one in value)
        )
    if name in ("num_register_tokens", "additional_vocab_size", "max_window_layers"):
        return type(value) is int and value >= 0
    if name in SOFT:
        return value is None or (type(value) in (int, float) and value > 0)
    if default is None or name in ("num_key_value_heads", "sliding_window"):
        return value is None or (type(value) is int and value > 0)
    if default is NEEDED:
        return isinstance(value, (bool, int, float)) and (isinstance(value, bool) or value > 0)
    kinds = (int, float) if type(default) is float or name == "mlp_ratio" else (type(default),)
    return type(value) in kinds and (isinstance(value, (bool, str)) or value > 0)


def part_of(path: Path, config: dict, name: str, file: str = "config.json") -> dict[str, Any]:
    """An object within a JSON file; {} where it is left out, or null. Raises ValueError for another
    value.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f"{path}: {file} has {name} {value!r}, which must be an object; copy it from the"
            " model's own directory"
        )
    return value or {}


def settled_part(
    path: Path, config: dict, name: str, read: dict, fixed: dict, inert: frozenset | set
) -> dict[str, Any]:
    """`settled` of an object within config.json."""
    part = part_of(path, config, name)
    return settled(path, f"{name} of config.json", part, read, fixed, inert)


def _vision_config(path: Path, config: dict) -> dict:
    """The vision part of a CLIP or SigLIP; the old `vision_config_dict`, where it is there, wins as
    a whole.
    """
    old, new = (part_of(path, config, f"vision_config{end}") for end in ("_dict", ""))
    return old or new
