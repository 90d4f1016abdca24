"""A foreign config.json held against the table of families.py: what is not understood is refused by
name."""

from pathlib import Path
from typing import Any

from evlm_jax.convert.families import INERT, KINDS, NEEDED, OFF, ROTARY, UNUSED, WHOLE, Kind


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
    """llama.cpp's architecture "llama", which Llama, SmolLM2 and Mistral have.

    Raises ValueError for another, a part or an adapter.
    """
    said = {"general.architecture": "llama", "general.type": "model", "split.count": 1}
    if wrong := [
        f"{key} {metadata[key]!r}, read is {ours!r}"
        for key, ours in said.items()
        if metadata.get(key, ours) not in (ours, 0)
    ]:
        raise ValueError(f"{path}: the GGUF file has {', '.join(wrong)}")
    return Kind("llama-gguf", "llm", {})


def fields_of(path: Path, config: dict) -> dict[str, Any]:
    """The fields of `kind.read`, `rope_theta` too where the kind is rotary, with defaults filled
    in.

    Raises:
      ValueError: naming every field that is not understood, or has a value that EVLM's towers
        cannot compute.
    """
    name, where = config["model_type"], "config.json"
    if name in WHOLE:
        config, name, where = _vision_config(config), WHOLE[name], "vision_config of config.json"
        if config.get("model_type", name) != name:
            raise ValueError(
                f"{path}: {where} says model_type {config['model_type']!r}, which is not {name}"
            )
    kind = KINDS[name]
    silent = INERT | UNUSED.get(name, set()) | (set(ROTARY) if kind.rotary else set())
    if kind.tower == "vit":
        silent |= {"is_causal", "tie_word_embeddings"}
    off = {
        field: values for field, values in OFF.items() if field in config and field not in silent
    }
    found = settled(path, where, config, kind.read, kind.fixed | off, silent)
    if kind.rotary:
        found["rope_theta"] = _theta(path, config)
    if set(found.get("layer_types") or ()) - {"full_attention", "attention"}:
        raise ValueError(
            f"{path}: {where} asks for layer_types {found['layer_types']}, which EVLM's decoder"
            " does not have"
        )
    return found


def settled(
    path: Path, where: str, config: dict, read: dict, fixed: dict, inert: frozenset | set
) -> dict[str, Any]:
    """Values of the fields in `read`.

    Raises ValueError naming every field that is missing, unknown, or not as `fixed` has it.
    """
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
    values = {name: _side(config.get(name, default)) for name, default in read.items()}
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
    positive.
    """
    if name == "layer_types":
        return value is None or (
            isinstance(value, list) and all(isinstance(one, str) for one in value)
        )
    if default is None or name == "num_key_value_heads":
        return value is None or (type(value) is int and value > 0)
    if default is NEEDED:
        return isinstance(value, (bool, int, float)) and (isinstance(value, bool) or value > 0)
    kinds = (int, float) if type(default) is float or name == "mlp_ratio" else (type(default),)
    return type(value) in kinds and (isinstance(value, (bool, str)) or value > 0)


def _vision_config(config: dict) -> dict:
    """The vision part of a CLIP or SigLIP; the old `vision_config_dict`, where it is there, wins as
    a whole.
    """
    return config.get("vision_config_dict") or config.get("vision_config") or {}


def _theta(path: Path, config: dict) -> float:
    """The rotary base. Raises ValueError for scaled or partial positions, and for two bases that
    differ.
    """
    said = {"rope_theta": set(), "partial_rotary_factor": set(), "rope_type": set(), "type": set()}
    parts = [{key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}]
    parts += [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{path}: config.json has a rope_scaling or rope_parameters that is no object:"
            f" {parts[1:]}"
        )

    def scaled(key, value):
        return f"{key} {value!r}"

    wrong = [
        scaled(key, value)
        for part in parts
        for key, value in part.items()
        if value is not None and key not in said
    ]
    for part in parts:
        for key in said.keys() & part.keys():
            said[key] |= (
                {part[key]} if not isinstance(part[key], (list, dict)) else {repr(part[key])}
            )
    wrong += [
        scaled(key, value)
        for key in ("rope_type", "type")
        for value in said[key]
        if value not in (None, "default")
    ]
    wrong += [
        scaled("partial_rotary_factor", value)
        for value in said["partial_rotary_factor"]
        if value not in (None, 1)
    ]
    bases = {value for value in said["rope_theta"] if value is not None} or {10000.0}
    if len(bases) > 1 or not all(isinstance(base, (int, float)) and base > 0 for base in bases):
        wrong.append(f"rope_theta {' and '.join(map(str, sorted(bases, key=str)))}")
    if wrong:
        raise ValueError(
            f"{path}: config.json asks for rotary positions with {', '.join(wrong)}, which EVLM's"
            " decoder does not have"
        )
    return float(bases.pop())
