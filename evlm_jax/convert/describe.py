"""What a foreign checkpoint says about its architecture,
in the words of ViTConfig and LLMConfig.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from evlm_jax.checkpoint.lazy_tensors import Source, read_json
from evlm_jax.config import LLMConfig, MediaConfig, MoEConfig, ViTConfig, XAttnConfig
from evlm_jax.config.schema import build
from evlm_jax.convert.config_json import fields_of, settled
from evlm_jax.convert.describe_decoder import describe_decoder
from evlm_jax.convert.describe_flamingo import describe_flamingo
from evlm_jax.convert.describe_gguf import describe_gguf
from evlm_jax.convert.families import EVA, EVA_INERT, EVA_READ, GGUF

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"
)
DINOV2_OUT = [  # the last matrix of an MLP, and of a gated one by its old and new names
    f"encoder.layer.0.mlp.{name}.weight" for name in ("fc2", "weights_out", "down_proj")
]
DINOV2_HEADS = {384: 6, 768: 12, 1024: 16}  # of width: S, B and L
# of these a file tells enough without config.json
ALONE = "DINOv2 S, B and L, EVA02-CLIP-E, open_flamingo's checkpoints"
EVLM = {
    "vit": ViTConfig,
    "llm": LLMConfig,
    "xattn": XAttnConfig,
    "moe": MoEConfig,
    "media": MediaConfig,
}


def describe_source(source: Source, family: str, prefix: str) -> dict:
    """Config fields that the checkpoint fixes. `family` and `prefix` as engine.recognise found
    them.

    Raises:
      ValueError: config.json is missing where it is needed, or describes something EVLM's towers do
        not cover.
    """
    facts = {
        "dinov2": _dinov2,
        "dinov3": _dinov3,
        "clip": _encoder,
        "siglip": _encoder,
        "eva02": _eva,
        "evlm": _evlm,
        "openflamingo": describe_flamingo,
    } | dict.fromkeys(GGUF.values(), _gguf)
    return facts.get(family.removesuffix("-transformers5"), _language)(source, prefix)


# ------------------------------------------------------------------------------------------- vision


def _fields(source: Source) -> dict[str, Any]:
    """As config_json.fields_of.

    Raises ValueError where there is no config.json: names and shapes do not tell enough.
    """
    if not source.metadata:
        raise ValueError(
            f"{source.path}: config.json is missing; give the model's own directory, with"
            f" config.json and weights (weights alone are read of {ALONE})"
        )
    return fields_of(source.path, source.metadata)


def _shapes(source: Source, prefix: str) -> Callable[[str, int], tuple[int, ...]]:
    """(name, rank) -> shape.

    Raises ValueError for a tensor that is missing or has another rank, or a side of nothing.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = source.tensors[prefix + name].shape if prefix + name in source.tensors else ()
        if len(found) != rank or 0 in found:
            raise ValueError(
                f"{source.path}: {prefix + name} is missing or not of {rank} axes: {found}; copy"
                " the model again"
            )
        return found

    return shape


def _vision(source: Source, shape: tuple[int, ...], defaults: dict, **fields) -> dict:
    """Fields that the patch kernel's shape tells, and the normalisation of
    preprocessor_config.json.
    """
    processor = source.path / "preprocessor_config.json"
    choices = {"embed_norm": False, "registers": 0, "class_token": True}
    if source.path.is_dir() and processor.is_file():
        defaults = _normalisation(processor)
    return {
        "patch": shape[-1],
        "width": shape[0],
        "norm": "pre",
        "bias": "all",
        **choices,
        **defaults,
        **fields,
    }


def _normalisation(path) -> dict:
    """Raises ValueError for pixels that are not scaled to 0..1, or normalised by numbers that do
    not stand there.
    """
    read = read_json(path)
    factor = read.get("rescale_factor", 1 / 255)
    if (
        read.get("do_rescale", True) is not True
        or not isinstance(factor, float)
        or not math.isclose(factor, 1 / 255, rel_tol=1e-6)
    ):
        raise ValueError(
            f"{path}: do_rescale and rescale_factor must be true and 1/255: pixels are read as 0..1"
        )
    if read.get("do_normalize", True) is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    numbers = {
        ours: read.get(theirs) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
    }
    if wrong := [
        name
        for name, value in numbers.items()
        if not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(one, int | float) and math.isfinite(one) for one in value)
    ]:
        raise ValueError(f"{path}: image_{' and image_'.join(wrong)} must be three numbers")
    return {name: tuple(map(float, value)) for name, value in numbers.items()}


def _activation(source: Source, name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{source.path}: config.json asks for hidden_act {name!r}; EVLM's ViT has"
            f" {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _depth(source: Source, pattern: str) -> int:
    """One more than the highest block number."""
    return 1 + max(
        int(found[1]) for found in map(re.compile(pattern).match, source.tensors) if found
    )


def _agree(source: Source, **said: tuple[Any, Any]) -> None:
    """{field: (as config.json has it, as the tensors have it)}.

    Raises ValueError naming the fields that differ.
    """
    if wrong := [
        f"{name} is {a} in config.json and {b} in the tensors"
        for name, (a, b) in said.items()
        if a != b
    ]:
        raise ValueError(f"{source.path}: {', '.join(wrong)}; copy both from one directory")


def _dinov2(source: Source, prefix: str) -> dict:
    """A file without config.json, as an ONNX file is, is of the published sizes: S, B or L."""
    shape = _shapes(source, prefix)
    kernel = shape("embeddings.patch_embeddings.projection.weight", 4)
    (width, patch), tokens = (kernel[0], kernel[-1]), f"{prefix}embeddings.register_tokens"
    registers = shape("embeddings.register_tokens", 3)[1] if tokens in source.tensors else 0
    grid = math.isqrt(shape("embeddings.position_embeddings", 3)[1] - 1)
    gated = source.metadata.get("use_swiglu_ffn") is True
    out = next(
        (name for name in DINOV2_OUT if f"{prefix}{name}" in source.tensors), DINOV2_OUT[gated]
    )
    sizes = {
        "depth": _depth(source, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\."),
        "mlp": shape(out, 2)[1],
        "gated": gated,
    }
    sizes |= {"pretrained_size": grid * patch, "registers": registers}
    # as their own code resizes positions
    choices = {
        "layer_scale": True,
        "patch_bias": True,
        "interpolation": "antialias" if registers else "bicubic",
    }
    if not source.metadata:
        if width not in DINOV2_HEADS:
            raise ValueError(
                f"{source.path}: a DINOv2 of width {width} needs its config.json: widths"
                f" {list(DINOV2_HEADS)} alone are known"
            )
        facts = {"heads": DINOV2_HEADS[width], "eps": 1e-6, "activation": "gelu"}
        return _vision(source, kernel, IMAGENET, **choices, **sizes, **facts)
    config = _fields(source)
    hidden = int(config["hidden_size"] * config["mlp_ratio"])
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden  # as its own code has it
    _agree(
        source,
        hidden_size=(config["hidden_size"], width),
        patch_size=(config["patch_size"], patch),
        num_hidden_layers=(config["num_hidden_layers"], sizes["depth"]),
        mlp_ratio=(hidden, sizes["mlp"]),
        image_size=(config["image_size"] // patch, grid),
        num_register_tokens=(config.get("num_register_tokens", 0), registers),
    )
    facts = {"heads": config["num_attention_heads"], "eps": config["layer_norm_eps"]}
    return _vision(
        source,
        kernel,
        IMAGENET,
        **choices,
        **sizes,
        **facts,
        activation="silu" if gated else _activation(source, config["hidden_act"]),
    )


def _dinov3(source: Source, prefix: str) -> dict:
    """Rotary positions of patches, at any size."""
    shape, config = _shapes(source, prefix), _fields(source)
    kernel = shape("embeddings.patch_embeddings.weight", 4)
    depth = _depth(source, rf"{re.escape(prefix)}layer\.(\d+)\.")
    _agree(
        source,
        hidden_size=(config["hidden_size"], kernel[0]),
        patch_size=(config["patch_size"], kernel[-1]),
        num_hidden_layers=(config["num_hidden_layers"], depth),
    )
    return _vision(
        source,
        kernel,
        IMAGENET,
        depth=depth,
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        eps=config["layer_norm_eps"],
        activation=_activation(source, config["hidden_act"]),
        rotary=config["rope_theta"],
        registers=config["num_register_tokens"],
        pretrained_size=config["image_size"] // kernel[-1] * kernel[-1],
        bias="qv",
        layer_scale=True,
        patch_bias=True,
        interpolation="bicubic",
    )


def _encoder(source: Source, prefix: str) -> dict:
    """CLIP and SigLIP. The position table tells the trained size: 27 x 27 patches of 14 pixels read
    378 of SigLIP's 384.
    """
    shape = _shapes(source, prefix)
    config, kernel = _fields(source), shape("embeddings.patch_embedding.weight", 4)
    clip, patch = f"{prefix}embeddings.class_embedding" in source.tensors, kernel[-1]
    grid = math.isqrt(shape("embeddings.position_embedding.weight", 2)[0] - clip)
    depth = _depth(source, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.")
    _agree(
        source,
        hidden_size=(config["hidden_size"], kernel[0]),
        patch_size=(config["patch_size"], patch),
        num_hidden_layers=(config["num_hidden_layers"], depth),
        image_size=(config["image_size"] // patch, grid),
    )
    sizes = {
        "depth": depth,
        "heads": config["num_attention_heads"],
        "mlp": config["intermediate_size"],
    }
    sizes |= {
        "pretrained_size": grid * patch,
        "eps": config["layer_norm_eps"],
        "activation": _activation(source, config["hidden_act"]),
    }
    choices = {
        "layer_scale": False,
        "patch_bias": not clip,
        "embed_norm": clip,
        "class_token": clip,
        "interpolation": "bicubic",
    }
    return _vision(source, kernel, OPENAI if clip else HALF, **choices, **sizes)


def _eva(source: Source, prefix: str) -> dict:
    """Heads are those of the published E sizes, or as `vision_cfg` of a config.json says; all else
    stands in the shapes.

    No `interpolation`: the EVA repository and timm resize the positions of the same weights each in
    its own way."""
    shape, config = _shapes(source, prefix), source.metadata
    kernel = shape("patch_embed.proj.weight", 4)
    width, patch, grid = kernel[0], kernel[-1], math.isqrt(shape("pos_embed", 3)[1] - 1)
    depth = _depth(source, rf"{re.escape(prefix)}blocks\.(\d+)\.")
    if "vision_cfg" in config:
        found = settled(
            source.path, "vision_cfg of config.json", config["vision_cfg"], EVA_READ, EVA, EVA_INERT
        )
        _agree(
            source,
            width=(found["width"], width),
            layers=(found["layers"], depth),
            patch_size=(found["patch_size"], patch),
        )
    elif width == 1792 and config.get("architecture", "eva02_enormous").startswith(
        "eva02_enormous"
    ):
        found = {"head_width": 112}
    else:
        raise ValueError(
            f"{source.path}: only the E size of EVA02-CLIP is known without a vision_cfg in"
            " config.json"
        )
    pixels = config.get("pretrained_cfg", {})
    defaults = {name: tuple(pixels.get(name, value)) for name, value in OPENAI.items()}
    sizes = {
        "depth": depth,
        "heads": width // found["head_width"],
        "mlp": shape("blocks.0.mlp.fc1.bias", 1)[0],
    }
    sizes |= {"pretrained_size": grid * patch, "eps": 1e-6, "activation": "gelu"}
    choices = {"norm": "res_post", "bias": "qv", "layer_scale": False, "patch_bias": True}
    return _vision(source, kernel, defaults, **choices, **sizes)


# ---------------------------------------------------------------------------------- language models


def _language(source: Source, prefix: str) -> dict:
    _fields(source)
    return describe_decoder(source.path, source.metadata)


def _gguf(source: Source, prefix: str) -> dict:
    return dataclasses.asdict(
        build(LLMConfig, describe_gguf(source, _shapes(source, prefix)), "llm")
    )


def _evlm(source: Source, prefix: str) -> dict:
    """An export of ours says it in our own words; by section of EVLMConfig."""
    sections = {name: source.metadata.get(name) for name in EVLM}
    if wrong := [name for name, section in sections.items() if not isinstance(section, dict)]:
        raise ValueError(
            f"{source.path}: config.json lacks {', '.join(wrong)}; export the model again"
        )
    known = {
        name: {field.name for field in dataclasses.fields(kind)} for name, kind in EVLM.items()
    }
    if wrong := [
        f"{name}.{key}"
        for name, section in sections.items()
        for key in section
        if key not in known[name]
    ]:
        raise ValueError(
            f"{source.path}: config.json has {', '.join(wrong)}, which this version does not know"
        )
    return {
        name: dataclasses.asdict(build(EVLM[name], section, name))
        for name, section in sections.items()
    }
