"""What a foreign checkpoint says about its architecture, in the words of ViTConfig and LLMConfig."""

import json
import math

import numpy as np

from evlm_jax.tensors import Source

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}


def describe_source(source: Source, family: str, prefix: str) -> dict:
    """Config fields that the checkpoint fixes. `family` and `prefix` as engine.recognise found them.

    Raises:
      ValueError: config.json is missing where it is needed, or describes something EVLM's towers do not cover.
    """
    facts = {"dinov2": _dinov2, "clip": _clip, "siglip": _siglip, "eva02": _eva, "llama": _llama, "llama-gguf": _gguf, "qwen": _qwen}
    facts |= {"evlm": _evlm}
    try:
        return facts[family.removesuffix("-transformers5")](source, prefix)
    except KeyError as missing:
        raise ValueError(f"{source.path}: config.json lacks {missing}; copy it from the model's own directory") from missing


def _vision(source: Source, prefix: str, defaults: dict, **fields) -> dict:
    """Fields that shapes tell, and the normalisation of preprocessor_config.json."""
    shape = lambda name: source.tensors[prefix + name].shape
    processor = source.path / "preprocessor_config.json"
    if processor.is_file():
        read = json.loads(processor.read_text("utf-8"))
        defaults = {"mean": tuple(read["image_mean"]), "std": tuple(read["image_std"])}
    return {"patch": shape(fields.pop("kernel"))[-1], "class_token": True, **defaults, **fields}


def _dinov2(source: Source, prefix: str) -> dict:
    """Everything stands in the shapes, except for `eps` and the activation, which all published DINOv2 share."""
    shape = lambda name: source.tensors[prefix + name].shape
    config, kernel = source.metadata, "embeddings.patch_embeddings.projection.weight"
    if config.get("use_swiglu_ffn"):
        raise ValueError(f"{source.path}: use_swiglu_ffn (DINOv2-giant) is not covered; use DINOv2 S, B or L")
    width, patch = shape(kernel)[0], shape(kernel)[-1]
    registers = shape("embeddings.register_tokens")[1] if f"{prefix}embeddings.register_tokens" in source.tensors else 0
    size = math.isqrt(shape("embeddings.position_embeddings")[1] - 1) * patch
    depth = 1 + max(int(n.split(".layer.")[1].split(".")[0]) for n in source.tensors if n.startswith(f"{prefix}encoder.layer."))
    choices = {"norm": "pre", "bias": "all", "layer_scale": True, "patch_bias": True, "embed_norm": False}
    sizes = {
        "depth": depth,
        "width": width,
        "heads": config.get("num_attention_heads", width // 64),
        "mlp": shape("encoder.layer.0.mlp.fc1.bias")[0],
    }
    activation = ACTIVATIONS[config.get("hidden_act", "gelu")]
    eps = config.get("layer_norm_eps", 1e-6)
    sizes |= {"pretrained_size": size, "registers": registers, "eps": eps, "activation": activation}
    return _vision(source, prefix, IMAGENET, kernel=kernel, **choices, **sizes)


def _huggingface_sizes(config: dict) -> dict:
    """Of a CLIP or SigLIP vision config."""
    sizes = {"depth": config["num_hidden_layers"], "width": config["hidden_size"], "heads": config["num_attention_heads"]}
    sizes |= {"mlp": config["intermediate_size"], "pretrained_size": config["image_size"], "eps": config["layer_norm_eps"]}
    return sizes | {"activation": ACTIVATIONS[config["hidden_act"]]}


def _clip(source: Source, prefix: str) -> dict:
    sizes = _huggingface_sizes(source.metadata.get("vision_config", source.metadata))
    choices = {"norm": "pre", "bias": "all", "layer_scale": False, "patch_bias": False, "embed_norm": True, "registers": 0}
    return _vision(source, prefix, OPENAI, kernel="embeddings.patch_embedding.weight", **choices, **sizes)


def _siglip(source: Source, prefix: str) -> dict:
    sizes = _huggingface_sizes(source.metadata.get("vision_config", source.metadata))
    choices = {"norm": "pre", "bias": "all", "layer_scale": False, "patch_bias": True, "embed_norm": False, "registers": 0}
    return _vision(source, prefix, HALF, kernel="embeddings.patch_embedding.weight", class_token=False, **choices, **sizes)


def _eva(source: Source, prefix: str) -> dict:
    """Everything stands in the shapes but the heads: those of the published E sizes, or as `vision_cfg` of a config.json says."""
    shape = lambda name: source.tensors[prefix + name].shape
    width, patch = shape("patch_embed.proj.weight")[0], shape("patch_embed.proj.weight")[-1]
    config = source.metadata.get("vision_cfg", {"postnorm": True} | ({"head_width": 112} if width == 1792 else {}))
    if not config.get("postnorm") or config.get("rope") or config.get("naiveswiglu") or config.get("subln"):
        raise ValueError(f"{source.path}: only the E size of EVA02-CLIP (postnorm, no rope, no swiglu, no subln) is covered")
    choices = {"norm": "res_post", "bias": "qv", "layer_scale": False, "patch_bias": True, "embed_norm": False, "registers": 0}
    depth = 1 + max(int(name.removeprefix(prefix).split(".")[1]) for name in source.tensors if name.startswith(f"{prefix}blocks."))
    sizes = {"depth": depth, "width": width, "heads": width // config["head_width"], "mlp": shape("blocks.0.mlp.fc1.bias")[0]}
    size = math.isqrt(shape("pos_embed")[1] - 1) * patch
    sizes |= {"pretrained_size": size, "eps": 1e-6, "activation": "gelu"}
    return _vision(source, prefix, OPENAI, kernel="patch_embed.proj.weight", **choices, **sizes)


def _llama(source: Source, prefix: str) -> dict:
    """Llama, SmolLM2, Qwen2."""
    config = source.metadata
    rope = config.get("rope_parameters") or config
    scaling = rope.get("rope_type", "default") if rope is not config else (config.get("rope_scaling") or {}).get("rope_type", "default")
    unsupported = {
        "rope_type": scaling != "default",
        "mlp_bias": config.get("mlp_bias"),
        "use_sliding_window": config.get("use_sliding_window"),
    }
    if wrong := [key for key, value in unsupported.items() if value]:
        raise ValueError(f"{source.path}: config.json asks for {', '.join(wrong)}, which EVLM's decoder does not have")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "mlp": config["intermediate_size"],
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "eps": config["rms_norm_eps"],
        "qkv_bias": f"{prefix}model.layers.0.self_attn.q_proj.bias" in source.tensors,
        "tied": config.get("tie_word_embeddings", False),
        "dynamic_ntk": 0,
        "logn": 0,
    }


def _gguf(source: Source, prefix: str) -> dict:
    if source.metadata["general.architecture"] != "llama":
        raise ValueError(f"{source.path}: GGUF of architecture {source.metadata['general.architecture']!r}; read is 'llama'")
    config = {key.removeprefix("llama."): value for key, value in source.metadata.items()}
    heads, hidden = config["attention.head_count"], config["embedding_length"]
    return {
        "vocab": source.tensors["token_embd.weight"].shape[0],
        "hidden": hidden,
        "layers": config["block_count"],
        "heads": heads,
        "kv_heads": config["attention.head_count_kv"],
        "head_dim": config.get("attention.key_length", hidden // heads),
        "mlp": config["feed_forward_length"],
        "rope_theta": float(config["rope.freq_base"]),
        "eps": float(str(np.float32(config["attention.layer_norm_rms_epsilon"]))),  # stored as float32
        "qkv_bias": False,
        "tied": "output.weight" not in source.tensors,
        "dynamic_ntk": 0,
        "logn": 0,
    }


def _qwen(source: Source, prefix: str) -> dict:
    """Qwen 1.0's `intermediate_size` counts both halves of the gated MLP."""
    config = source.metadata
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_attention_heads"],
        "head_dim": config["kv_channels"],
        "mlp": config["intermediate_size"] // 2,
        "rope_theta": float(config["rotary_emb_base"]),
        "eps": config["layer_norm_epsilon"],
        "qkv_bias": True,
        "tied": config["tie_word_embeddings"],
        "dynamic_ntk": config["seq_length"] if config["use_dynamic_ntk"] else 0,
        "logn": config["seq_length"] if config["use_logn_attn"] else 0,
    }


def _evlm(source: Source, prefix: str) -> dict:
    """An export of ours says it in our own words; by section of EVLMConfig."""
    fixed = lambda value: tuple(value) if isinstance(value, list) else value
    return {name: {key: fixed(value) for key, value in source.metadata[name].items()} for name in ("vit", "llm", "xattn", "moe", "media")}
