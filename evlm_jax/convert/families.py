"""Which foreign models are read: for each `model_type` the fields of its config.json that decide
the function.

A model type that is not in KINDS is refused by its name, and so is a field that is not known here
and says anything. Defaults are those of transformers' config classes: published configs leave out
what equals them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evlm_jax.convert.refused import LANGUAGE, VISION

NEEDED = object()  # in place of a default: the field must be there

INERT = frozenset(  # fields of any config.json that change no output of a whole forward pass
    "architectures attention_dropout attention_probs_dropout_prob attn_dropout_prob auto_map"
    " bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty"
    " do_sample drop_path_rate dropout dtype early_stopping emb_dropout_prob"
    " encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task"
    " forced_bos_token_id forced_eos_token_id hidden_dropout_prob id2label initializer_factor"
    " initializer_range is_llama_config label2id language layerscale_value length_penalty"
    " max_length max_position_embeddings max_sequence_length min_length model_type name_or_path"
    " no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences"
    " original_max_position_embeddings output_attentions output_hidden_states output_scores"
    " pad_token_id prefix pretraining_tp problem_type projection_dim remove_invalid_values"
    " repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id"
    " suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p"
    " torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed"
    " unsloth_version use_bfloat16 use_cache _commit_hash _name_or_path"
    " _attn_implementation_autoset chunk_size_feed_forward bf16 fp16 fp32 use_flash_attn"
    " softmax_in_fp32 use_mask_token apply_layernorm reshape_hidden_states out_features out_indices"
    " stage_names vision_use_head logit_scale_init_value onnx use_cache_kernel".split()
)
OFF = {  # fields of any config.json that must be as given, where they are there
    name: (False, {False})
    for name in (
        "add_cross_attention is_decoder is_encoder_decoder tie_encoder_decoder rope_interleaved"
        " qk_layernorm use_qk_norm use_mrope"
    ).split()
}
OFF |= {"cross_attention_hidden_size": (None, {None}), "tie_last_hidden_states": (None, {None})}
OFF |= {
    "attn_implementation": (None, {None, "eager", "sdpa", "flash_attention_2"}),
    "is_causal": (True, {True}),
}
OFF |= {"_attn_implementation": OFF["attn_implementation"]}
OFF |= {
    "interpolate_antialias": (True, {True}),
    "interpolate_offset": (0.0, {0.0}),
}  # early configs of DINOv2 with registers


@dataclass(frozen=True)
class Kind:
    """A model type that is read: `read` is {field: default} of what becomes ours, `fixed` {field:
    (default, the values that are ours)}.
    """

    family: str  # of tables.py; transformers 5 renamed some, which is no family of its own
    tower: str  # "vit" | "llm" | "evlm"
    read: dict[str, Any]
    fixed: dict[str, tuple[Any, set]] = field(default_factory=dict)
    rotary: bool = False  # rope_theta, rope_scaling and rope_parameters are its fields
    note: str = ""


SILU = {"hidden_act": ("silu", {"silu", "swish"})}
SIZES = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LLAMA = SIZES | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
}
MISTRAL = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8}
QWEN2 = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "layer_types": None,
}
QWEN = dict.fromkeys(
    "vocab_size hidden_size num_hidden_layers num_attention_heads kv_channels intermediate_size"
    " rotary_emb_base layer_norm_epsilon tie_word_embeddings seq_length use_dynamic_ntk"
    " use_logn_attn".split(),
    NEEDED,
)
ENCODER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
CLIP = ENCODER | {
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = ENCODER | {
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DINOV2 = ENCODER | {"patch_size": 14, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
REGISTERS = DINOV2 | {"patch_size": 16, "num_register_tokens": 4}
IMAGES = {"num_channels": (3, {3})}
ONE_BIAS = {"qkv_bias": (True, {True}), "use_swiglu_ffn": (False, {False})}

KINDS = {
    "llama": Kind(
        "llama",
        "llm",
        LLAMA,
        SILU | {"attention_bias": (False, {False}), "mlp_bias": (False, {False})},
        True,
        "no scaled or partial rotary positions, no biases, silu",
    ),
    "mistral": Kind(
        "llama",
        "llm",
        MISTRAL,
        SILU | {"sliding_window": (4096, {None})},
        True,
        "sliding_window null, silu",
    ),
    "qwen2": Kind(
        "llama",
        "llm",
        QWEN2,
        SILU | {"use_sliding_window": (False, {False})},
        True,
        "no window, no scaled or partial rotary positions, silu",
    ),
    "qwen": Kind(
        "qwen",
        "llm",
        QWEN,
        {
            "rotary_pct": (1.0, {1.0}),
            "no_bias": (True, {True}),
            "scale_attn_weights": (True, {True}),
        }
        | {"use_cache_quantization": (False, {False})},
        note="Qwen 1.0",
    ),
    "dinov2": Kind("dinov2", "vit", DINOV2, IMAGES | ONE_BIAS, note="S, B and L (no SwiGLU)"),
    "dinov2_with_registers": Kind(
        "dinov2", "vit", REGISTERS, IMAGES | ONE_BIAS, note="S, B and L (no SwiGLU)"
    ),
    "clip_vision_model": Kind("clip", "vit", CLIP, IMAGES),
    "siglip_vision_model": Kind("siglip", "vit", SIGLIP, IMAGES, note="fixed resolution"),
}
WHOLE = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
}  # their vision_config is read, the rest is no part of it
UNUSED = {
    "qwen2": {"sliding_window", "max_window_layers"}
}  # of no meaning where use_sliding_window is False
ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
EVA = {  # `vision_cfg` of open_clip and of the EVA repository; the values of EVA02-CLIP-E
    "postnorm": (False, {True}),
    "rope": (False, {False}),
    "naiveswiglu": (False, {False}),
    "subln": (False, {False}),
    "qkv_bias": (True, {True}),
    "ls_init_value": (None, {None}),
}
EVA_READ = {
    "head_width": 64,
    "image_size": 224,
    "layers": 12,
    "width": 768,
    "mlp_ratio": 4.0,
    "patch_size": 16,
}
EVA_INERT = frozenset(
    "eva_model_name drop_path_rate xattn fusedLN pt_hw_seq_len intp_freq global_average_pool"
    " patch_dropout".split()
)


def kind_of(path: Path, config: dict) -> Kind | None:
    """What config.json or a GGUF file says the model is; None where nothing says it: no
    config.json, or one in the words of EVA.

    Raises:
      ValueError: a model type that is not read, or one whose weights are quantised; named.
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
      ValueError: naming every field that is not understood, or says what EVLM's towers are not.
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
    scaled = lambda key, value: f"{key} {value!r}"
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


def listing() -> str:
    """Every model type of transformers' causal language models and vision models, with the verdict;
    a table in Markdown.
    """
    rows = [(name, kind.tower, kind.note) for name, kind in KINDS.items()]
    rows += [
        (name, KINDS[part].tower, f"its vision_config, as {part}") for name, part in WHOLE.items()
    ]
    lines = ["| model_type | tower | read, if |", "| --- | --- | --- |"]
    towers = {"llm": "language", "vit": "vision"}
    lines += [
        f"| {name} | {towers[tower]} | {note or 'every field is understood'} |"
        for name, tower, note in rows
    ]
    read = KINDS.keys() | WHOLE.keys()
    for title, names in (("Language models", LANGUAGE), ("Vision models", VISION)):
        lines += [
            "",
            (
                f"{title} that are refused by name:"
                f" {', '.join(name for name in names if name not in read)}."
            ),
        ]
    return "\n".join(lines) + "\n"
