"""What config.json and tensors of a vision tower say about it, in the words of ViTConfig."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evlm_jax.checkpoint.lazy_tensors import Source, read_json
from evlm_jax.convert.config_json import fields_of, part_of, settled_part, where_of
from evlm_jax.convert.families import EVA, EVA_INERT, EVA_READ

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")
DINOV2_OUT = [  # the last matrix of an MLP, and of a gated one by its old and new names
    f"encoder.layer.0.mlp.{name}.weight" for name in ("fc2", "weights_out", "down_proj")
]
EVA_E = "eva02_enormous"
DINOV2_HEADS = {384: 6, 768: 12, 1024: 16}  # of width: S, B and L
# of these a file tells enough without config.json
ALONE = "DINOv2 S, B and L, EVA02-CLIP-E, open_flamingo's checkpoints"


def config_fields(source: Source) -> dict[str, Any]:
    """As config_json.fields_of, of any tower.

    Raises ValueError where there is no config.json: names and shapes do not tell enough.
    """
    if not source.metadata:
        raise ValueError(
            f"{source.path}: config.json is missing; give the model's own directory, with"
            f" config.json and weights (weights alone are read of {ALONE})"
        )
    return fields_of(source.path, source.metadata)


def shapes_of(source: Source, prefix: str) -> Callable[[str, int], tuple[int, ...]]:
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


def vision_fields(source: Source, shape: tuple[int, ...], defaults: dict, **fields) -> dict:
    """Fields of ViTConfig: those that the patch kernel's shape tells, the normalisation of the
    folder's image processor, and `fields`.
    """
    choices = {"embed_norm": False, "registers": 0, "class_token": True}
    if source.path.is_dir() and (found := processor(source.path)):
        defaults = _normalisation(*found)
    return {
        "patch": shape[-1],
        "width": shape[0],
        "norm": "pre",
        "bias": "all",
        **choices,
        **defaults,
        **fields,
    }


def processor(folder: Path) -> tuple[str, dict] | None:
    """What a model's folder says of its pixels, and where: in transformers `image_processor` of
    processor_config.json, where it is there, is read in place of preprocessor_config.json.
    """
    whole, alone = (folder / f"{name}_config.json" for name in ("processor", "preprocessor"))
    name, said = "image_processor", read_json(whole) if whole.is_file() else {}
    if said.get(name) is not None:
        return f"{whole}: {name}", part_of(folder, said, name, whole.name)
    return (f"{alone}", read_json(alone)) if alone.is_file() else None


def _normalisation(where: str, read: dict) -> dict:
    """Raises ValueError for pixels that are not scaled to 0..1, or normalised by numbers that do
    not stand there.
    """
    factor, normalise = read.get("rescale_factor", 1 / 255), read.get("do_normalize", True)
    if (
        read.get("do_rescale", True) is not True
        or not isinstance(factor, float)
        or not math.isclose(factor, 1 / 255, rel_tol=1e-6)
    ):
        raise ValueError(
            f"{where}: do_rescale and rescale_factor must be true and 1/255: pixels are read as"
            " 0..1"
        )
    if not isinstance(normalise, bool):
        raise ValueError(f"{where}: do_normalize must be true or false, got {normalise!r}")
    if not normalise:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: _three(f"{where}: {theirs}", read.get(theirs)) for ours, theirs in names.items()}


def _three(where: str, value: Any) -> tuple[float, ...]:
    """Raises ValueError for what is not three numbers."""
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(type(one) in (int, float) and math.isfinite(one) for one in value)
    ):
        raise ValueError(f"{where} must be three numbers, got {value!r}")
    return tuple(map(float, value))


def activation(source: Source, name: str, where: str = "") -> str:
    """An activation in our words. Raises ValueError for one that the ViT does not have."""
    if name not in ACTIVATIONS:
        where = where or where_of(source.metadata)
        raise ValueError(
            f"{source.path}: {where} asks for hidden_act {name!r}; EVLM's ViT has"
            f" {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _depth(source: Source, pattern: str) -> int:
    """One more than the highest block number."""
    return 1 + max(
        int(found[1]) for found in map(re.compile(pattern).match, source.tensors) if found
    )


def agree(source: Source, where: str, **said: tuple[Any, Any]) -> None:
    """{field: (as `where` has it, as the tensors have it)}.

    Raises ValueError naming the fields that differ.
    """
    if wrong := [
        f"{name} is {a} in {where} and {b} in the tensors"
        for name, (a, b) in said.items()
        if a != b
    ]:
        raise ValueError(f"{source.path}: {', '.join(wrong)}; copy both from one directory")


def _registers(source: Source, prefix: str) -> int:
    """How many registers there are; a tensor of none is as none."""
    name = "embeddings.register_tokens"
    found = source.tensors.get(prefix + name)
    if found is None or found.shape[:2] == (1, 0):
        return 0
    return shapes_of(source, prefix)(name, 3)[1]


def _dinov2(source: Source, prefix: str) -> dict:
    """A file without config.json, as an ONNX file is, is of the published sizes: S, B or L."""
    shape = shapes_of(source, prefix)
    kernel = shape("embeddings.patch_embeddings.projection.weight", 4)
    (width, patch), registers = (kernel[0], kernel[-1]), _registers(source, prefix)
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
    antialias = registers or source.metadata.get("model_type") == "dinov2_with_registers"
    choices = {
        "layer_scale": True,
        "patch_bias": True,
        "interpolation": "antialias" if antialias else "bicubic",
    }
    if not source.metadata:
        if width not in DINOV2_HEADS:
            raise ValueError(
                f"{source.path}: a DINOv2 of width {width} needs its config.json: widths"
                f" {list(DINOV2_HEADS)} alone are known"
            )
        facts = {"heads": DINOV2_HEADS[width], "eps": 1e-6, "activation": "gelu"}
        return vision_fields(source, kernel, IMAGENET, **choices, **sizes, **facts)
    config = config_fields(source)
    hidden = int(config["hidden_size"] * config["mlp_ratio"])
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden  # as its own code has it
    agree(
        source,
        where_of(source.metadata),
        hidden_size=(config["hidden_size"], width),
        patch_size=(config["patch_size"], patch),
        num_hidden_layers=(config["num_hidden_layers"], sizes["depth"]),
        mlp_ratio=(hidden, sizes["mlp"]),
        image_size=(config["image_size"] // patch, grid),
        num_register_tokens=(config.get("num_register_tokens", 0), registers),
    )
    facts = {"heads": config["num_attention_heads"], "eps": config["layer_norm_eps"]}
    return vision_fields(
        source,
        kernel,
        IMAGENET,
        **choices,
        **sizes,
        **facts,
        activation="silu" if gated else activation(source, config["hidden_act"]),
    )


def _dinov3(source: Source, prefix: str) -> dict:
    """Rotary positions of patches, at any size."""
    shape, config = shapes_of(source, prefix), config_fields(source)
    kernel = shape("embeddings.patch_embeddings.weight", 4)
    depth = _depth(source, rf"{re.escape(prefix)}layer\.(\d+)\.")
    agree(
        source,
        where_of(source.metadata),
        hidden_size=(config["hidden_size"], kernel[0]),
        patch_size=(config["patch_size"], kernel[-1]),
        num_hidden_layers=(config["num_hidden_layers"], depth),
        num_register_tokens=(config["num_register_tokens"], _registers(source, prefix)),
    )
    return vision_fields(
        source,
        kernel,
        IMAGENET,
        depth=depth,
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        eps=config["layer_norm_eps"],
        activation=activation(source, config["hidden_act"]),
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
    shape = shapes_of(source, prefix)
    kernel = shape("embeddings.patch_embedding.weight", 4)
    clip = f"{prefix}embeddings.class_embedding" in source.tensors
    positions = shape("embeddings.position_embedding.weight", 2)[0] - clip
    sizes = _sizes(source, kernel, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", positions)
    choices = {
        "eps": config_fields(source)["layer_norm_eps"],
        "layer_scale": False,
        "patch_bias": not clip,
        "embed_norm": clip,
        "class_token": clip,
    }
    return vision_fields(source, kernel, OPENAI if clip else HALF, **(sizes | choices))


def _aimv2(source: Source, prefix: str) -> dict:
    """Norms are RMSNorms; in front of the table of positions stands one more."""
    shape, config = shapes_of(source, prefix), config_fields(source)
    kernel = shape("embeddings.patch_embed.weight", 4)
    if config["qkv_bias"] != config["mlp_bias"]:
        raise ValueError(
            f"{source.path}: config.json asks for qkv_bias {config['qkv_bias']} and mlp_bias"
            f" {config['mlp_bias']}; EVLM's ViT has both or none"
        )
    positions = shape("embeddings.position_embedding.weight", 2)[0]
    sizes = _sizes(source, kernel, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", positions)
    return vision_fields(
        source,
        kernel,
        OPENAI,
        **sizes,
        eps=config["rms_norm_eps"],
        bias="all" if config["qkv_bias"] else "none",
        class_token=False,
        norm_kind="rms",
        patch_norm=True,
        layer_scale=False,
        gated=True,
    )


def _internvit(source: Source, prefix: str) -> dict:
    """Norms of q and k have an eps of their own, 1e-6, in transformers' class."""
    shape, config = shapes_of(source, prefix), config_fields(source)
    kernel = shape("embeddings.patch_embeddings.projection.weight", 4)
    kinds = {"layer_norm": "layer", "rms_norm": "rms"}
    eps = config["layer_norm_eps"]
    if config["norm_type"] not in kinds or (config["use_qk_norm"] and eps != 1e-6):
        raise ValueError(
            f"{source.path}: config.json asks for norm_type {config['norm_type']!r}, layer_norm_eps"
            f" {eps}, use_qk_norm {config['use_qk_norm']}; EVLM's ViT has {' or '.join(kinds)}, and"
            " norms of q and k with the eps of the others, which is 1e-6 then"
        )
    positions = shape("embeddings.position_embeddings", 3)[1] - 1
    sizes = _sizes(source, kernel, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.", positions)
    return vision_fields(
        source,
        kernel,
        IMAGENET,
        **sizes,
        eps=eps,
        bias="all" if config["attention_bias"] else "out",
        norm_kind=kinds[config["norm_type"]],
        qk_norm="all" if config["use_qk_norm"] else "none",
        layer_scale=True,
    )


def _sizes(source: Source, kernel: tuple[int, ...], blocks: str, positions: int) -> dict:
    """What towers have in common whose tensors and config.json say it by the usual words."""
    config, depth, grid = config_fields(source), _depth(source, blocks), math.isqrt(positions)
    agree(
        source,
        where_of(source.metadata),
        hidden_size=(config["hidden_size"], kernel[0]),
        patch_size=(config["patch_size"], kernel[-1]),
        num_hidden_layers=(config["num_hidden_layers"], depth),
        image_size=(config["image_size"] // kernel[-1], grid),
    )
    return {
        "depth": depth,
        "heads": config["num_attention_heads"],
        "mlp": config["intermediate_size"],
        "pretrained_size": grid * kernel[-1],
        "activation": activation(source, config["hidden_act"]),
        "interpolation": "bicubic",
        "patch_bias": True,
    }


def _eva(source: Source, prefix: str) -> dict:
    """Heads are those of the published E sizes, or as `vision_cfg` of a config.json says; all else
    stands in the shapes.

    No `interpolation`: the EVA repository and timm resize the positions of the same weights each in
    its own way."""
    shape, config = shapes_of(source, prefix), source.metadata
    kernel = shape("patch_embed.proj.weight", 4)
    width, patch, grid = kernel[0], kernel[-1], math.isqrt(shape("pos_embed", 3)[1] - 1)
    depth = _depth(source, rf"{re.escape(prefix)}blocks\.(\d+)\.")
    if "vision_cfg" in config:
        found = settled_part(source.path, config, "vision_cfg", EVA_READ, EVA, EVA_INERT)
        agree(
            source,
            "vision_cfg of config.json",
            width=(found["width"], width),
            layers=(found["layers"], depth),
            patch_size=(found["patch_size"], patch),
        )
    elif width == 1792 and str(config.get("architecture", EVA_E)).startswith(EVA_E):
        found = {"head_width": 112}
    else:
        raise ValueError(
            f"{source.path}: only the E size of EVA02-CLIP is known without a vision_cfg in"
            " config.json"
        )
    pixels = OPENAI | part_of(source.path, config, "pretrained_cfg")
    where = f"{source.path}: pretrained_cfg of config.json"
    defaults = {name: _three(f"{where}: {name}", pixels[name]) for name in OPENAI}
    sizes = {
        "depth": depth,
        "heads": width // found["head_width"],
        "mlp": shape("blocks.0.mlp.fc1.bias", 1)[0],
    }
    sizes |= {"pretrained_size": grid * patch, "eps": 1e-6, "activation": "gelu"}
    choices = {"norm": "res_post", "bias": "qv", "layer_scale": False, "patch_bias": True}
    return vision_fields(source, kernel, defaults, **choices, **sizes)


TOWERS = {  # of tables.py
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "clip": _encoder,
    "siglip": _encoder,
    "aimv2": _aimv2,
    "internvit": _internvit,
    "eva02": _eva,
}
