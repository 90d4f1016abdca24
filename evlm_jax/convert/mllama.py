"""Llama 3.2 Vision (Mllama): a vision tower with tiles and a Llama, with gated cross-attention.
What its config.json says, and how its tensors are numbered.

Its blocks are layers of the language model, counted with the others: `plain` counts the layers
without them and names each block by the layer behind it, before tables.py. Both encoders of its
vision tower are one."""

import re
from typing import Any

from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, Tensors
from evlm_jax.config import EVLMConfig
from evlm_jax.config.xattn import PLAIN
from evlm_jax.convert.config_json import fields_of, part_of, settled_part
from evlm_jax.convert.config_rope import FIELDS as ROTARY
from evlm_jax.convert.describe_vision import (
    HALF,
    activation,
    agree,
    processor,
    shapes_of,
    vision_fields,
)
from evlm_jax.convert.families import IMAGES, INERT
from evlm_jax.convert.stock import rope_fields

NAME, BRIDGES = "Llama 3.2 Vision", ("joined",)
PLACE = "vision_config of config.json"
MORE_WORDS = 8  # of the embedding: <|image|> and room
EPS = 1e-5  # of the norms around the vision tower's blocks, in its class
TEXT = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "cross_attention_layers": None,
}
POSITIONS = (*ROTARY, "max_position_embeddings", "original_max_position_embeddings")
CROSS = [3, 8, 13, 18, 23, 28, 33, 38]
VISION = {
    "hidden_size": 1280,
    "hidden_act": "gelu",
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "intermediate_size": 5120,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "max_num_tiles": 4,
    "intermediate_layers_indices": None,
    "supported_aspect_ratios": None,
}
BETWEEN = [3, 7, 15, 23, 30]
FORMER = {  # how names began before transformers 5: as they begin now
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "language_model.": "model.language_model.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
LAYER = r"model\.language_model\.layers\.(\d+)\.(.*)"
GLOBAL = r"model\.vision_model\.global_transformer\.layers\.(\d+)\.(.*)"


def plain(source: Source) -> Source:
    """The tensors by the names of tables.py; any other model as it is.

    Raises ValueError naming a field of config.json that is not understood, or two tensors that
    would have one name.
    """
    if source.metadata.get("model_type") != "mllama":
        return source
    cross, local = _text(source)["cross_attention_layers"], _vision(source)["num_hidden_layers"]
    theirs: dict[str, str] = {}
    for name in source.tensors:
        if (other := theirs.setdefault(_plain(name, cross, local), name)) != name:
            raise ValueError(
                f"{source.path}: {other} and {name} are one by config.json, which has"
                f" cross_attention_layers {cross} and {local} local layers, or one tensor has two"
                " names; copy the model again"
            )
    return source._replace(tensors={ours: source.tensors[name] for ours, name in theirs.items()})


def _plain(name: str, cross: list[int], local: int) -> str:
    former = next((old for old in FORMER if name.startswith(old)), "")
    name = FORMER.get(former, "") + name.removeprefix(former)
    if found := re.fullmatch(GLOBAL, name):
        return f"model.vision_model.transformer.layers.{int(found[1]) + local}.{found[2]}"
    if found := re.fullmatch(LAYER, name):
        number = int(found[1])
        kind = "cross" if number in cross else "layers"
        return f"model.{kind}.{number - sum(one < number for one in cross)}.{found[2]}"
    return name.replace("model.language_model.", "model.", 1)


def parts(source: Source) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The config.json of its Llama, and the other sections of EVLMConfig.

    Raises ValueError naming a field that is not understood.
    """
    fields_of(source.path, source.metadata)
    found, vision = _text(source), _vision(source)
    cross, layers = found.pop("cross_attention_layers"), found["num_hidden_layers"]
    found["num_hidden_layers"] = layers - len(cross)
    first, every = _distances(source, cross, layers)
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    block = {"heads": found["num_attention_heads"], "kv_heads": found["num_key_value_heads"]}
    block |= {"head_dim": head_dim, "ffn": found["intermediate_size"], "eps": found["rms_norm_eps"]}
    block |= {"every": every, "first": first, "sinks": 0, "kv_norm": False, "norm_kind": "rms"}
    block |= {"qk_norm": "head", "gated": True, "ffn_without_image": False} | PLAIN
    config = part_of(source.path, source.metadata, "text_config")
    text = found | {name: config[name] for name in POSITIONS if name in config}
    text |= {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
    if "rope_theta" not in config.keys() | part_of(source.path, config, "rope_parameters").keys():
        text["rope_theta"] = 5e5
    return text, {
        "vit": _tower(source, vision),
        "xattn": block,
        "bridge": {"kind": "joined"},
        "media": {"tokens": 1, "around": "", "sight": "neighbours"},
        "moe": {"copies": 0},
    }


def _is(name: str) -> dict[str, tuple[str, set[str]]]:
    return {"model_type": (name, {name})}


def _text(source: Source) -> dict[str, Any]:
    inert = INERT | {*POSITIONS, "tie_word_embeddings"}
    fixed = {"hidden_act": ("silu", {"silu", "swish"})} | _is("mllama_text_model")
    found = settled_part(source.path, source.metadata, "text_config", TEXT, fixed, inert)
    cross = found["cross_attention_layers"]
    found["cross_attention_layers"] = CROSS if cross is None else sorted(set(cross))
    return found


def _distances(source: Source, cross: list[int], layers: int) -> tuple[int, int]:
    """Layers in front of the first block, and from one block to the next.

    Raises ValueError where blocks stand at other places than `xattn.first` and `every` can say.
    """
    behind = [number - before for before, number in enumerate(cross)]
    first, count = behind[0] if behind else 0, layers - len(cross)
    every = behind[1] - first if len(behind) > 1 else count
    if not behind or every < 1 or first >= every or behind != [*range(first, count, every)]:
        raise ValueError(
            f"{source.path}: text_config of config.json has cross_attention_layers {cross} of"
            f" {layers} layers; EVLM's blocks are as far from each other as the first is from the"
            " begin, at most, and none is left out"
        )
    return first, every


def _vision(source: Source) -> dict[str, Any]:
    """Raises ValueError naming what is not as the tower's class has it."""
    fixed = IMAGES | {"norm_eps": (EPS, {EPS})} | _is("mllama_vision_model")
    inert = INERT | {"tie_word_embeddings"}
    found = settled_part(source.path, source.metadata, "vision_config", VISION, fixed, inert)
    taps, tiles = found["intermediate_layers_indices"], found["max_num_tiles"]
    taps = found["intermediate_layers_indices"] = BETWEEN if taps is None else taps
    said, width = found["supported_aspect_ratios"], found["hidden_size"]
    grids = [[a, b] for a in range(1, tiles + 1) for b in range(1, tiles + 1) if a * b <= tiles]
    right = {
        "supported_aspect_ratios": said in (None, grids) and (said or tiles == 4),
        "image_size": found["image_size"] % found["patch_size"] == 0,
        "vision_output_dim": found["vision_output_dim"] == width * (1 + len(taps)),
        "intermediate_layers_indices": taps == sorted(set(taps))
        and all(0 <= i < found["num_hidden_layers"] for i in taps),
    }
    if wrong := [f"{name} {found[name]!r}" for name, holds in right.items() if not holds]:
        raise ValueError(
            f"{source.path}: {PLACE} has {', '.join(wrong)}; read are all"
            f" grids of max_num_tiles {tiles} in their processor's order, ascending layers, a width"
            f" of {width} for each of these and one more, and tiles of whole patches"
        )
    return found


def _tower(source: Source, found: dict[str, Any]) -> dict[str, Any]:
    """Fields of ViTConfig."""
    kernel = shapes_of(source, "")("model.vision_model.patch_embedding.weight", 4)
    width, patch = (found["hidden_size"], kernel[0]), (found["patch_size"], kernel[-1])
    agree(source, PLACE, hidden_size=width, patch_size=patch)
    _check_pixels(source, found["image_size"], found["max_num_tiles"])
    depth = found["num_hidden_layers"] + found["num_global_layers"]
    return vision_fields(
        source,
        kernel,
        HALF,
        depth=depth,
        heads=found["attention_heads"],
        mlp=found["intermediate_size"],
        pretrained_size=found["image_size"],
        bias="mlp",
        activation=activation(source, found["hidden_act"], PLACE),
        layer_scale=False,
        patch_bias=False,
        embed_norm=True,
        eps=EPS,
        taps=(*(i + 1 for i in found["intermediate_layers_indices"]), depth),
        interpolation="bicubic",
        tiles=found["max_num_tiles"],
        global_blocks=found["num_global_layers"],
    )


def _check_pixels(source: Source, side: int, tiles: int) -> None:
    """Raises ValueError where the folder's image processor lays pictures on other tiles."""
    where, said = processor(source.path) or ("", {})
    ours = {"size": {"height": side, "width": side}, "max_image_tiles": tiles}
    ours |= {"do_resize": True, "do_pad": True, "resample": 2}  # which is bilinear
    if wrong := [
        f"{name} {said[name]!r}" for name in ours.keys() & said if said[name] != ours[name]
    ]:
        raise ValueError(
            f"{where} has {', '.join(sorted(wrong))}; pictures are laid on tiles by"
            f" {', '.join(f'{name} {ours[name]!r}' for name in ours)}, as {PLACE} has them; copy"
            " both from one directory"
        )


def pixels(cfg: EVLMConfig) -> dict[str, Any]:
    """preprocessor_config.json beside the normalisation."""
    side = cfg.vit.pretrained_size
    return {
        "image_processor_type": "MllamaImageProcessor",
        "size": {"height": side, "width": side},
        "max_image_tiles": cfg.vit.tiles,
    }


def stock(cfg: EVLMConfig, ids: dict[str, Any]) -> dict[str, Any]:
    """The config.json that comes nearest to `cfg`; whether it says all is for `parts` to find.
    `ids` are those of special tokens.
    """
    vit, llm = cfg.vit, cfg.llm
    cross = [layer + before for before, layer in enumerate(cfg.cross_layers)]
    sizes = (llm.vocab, llm.hidden, llm.layers + len(cross), llm.heads, llm.kv_heads, llm.mlp)
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(vit.activation, vit.activation)
    local, width = vit.depth - vit.global_blocks, vit.width * len(vit.taps)
    blocks = (vit.width, act, local, vit.global_blocks, vit.heads, vit.mlp, width)
    between = [tap - 1 for tap in vit.taps[:-1]]
    tiles = (vit.pretrained_size, vit.patch, vit.tiles, between, [list(grid) for grid in vit.grids])
    text = dict(zip(TEXT, (*sizes, llm.eps, cross), strict=True)) | rope_fields(llm) | ids
    del text["rope_theta"]  # stands in rope_parameters
    return {
        "model_type": "mllama",
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": llm.vocab,
        "text_config": text | {"model_type": "mllama_text_model", "hidden_act": "silu"},
        "vision_config": dict(zip(VISION, (*blocks, *tiles), strict=True))
        | {"model_type": "mllama_vision_model", "norm_eps": vit.eps},
    }


def written(tensors: Tensors, cfg: EVLMConfig) -> dict[str, Tensor]:
    """The inverse of `plain`, by the names of transformers 5."""
    local = cfg.vit.depth - cfg.vit.global_blocks

    def name_of(name: str) -> str:
        if found := re.fullmatch(r"model\.(cross|layers)\.(\d+)\.(.*)", name):
            kind, layer = found[1], int(found[2])
            number = layer + sum(one < layer + (kind == "layers") for one in cfg.cross_layers)
            return f"model.language_model.layers.{number}.{found[3]}"
        if found := re.fullmatch(r"model\.vision_model\.transformer\.layers\.(\d+)\.(.*)", name):
            number = int(found[1]) - local
            if number >= 0:
                return f"model.vision_model.global_transformer.layers.{number}.{found[2]}"
            return name
        other = name.startswith(("model.vision_model.", "model.multi_modal_projector.", "lm_head."))
        return name if other else name.replace("model.", "model.language_model.", 1)

    return {name_of(name): tensor for name, tensor in tensors.items()}
