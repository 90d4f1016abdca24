"""Vision towers against transformers, and EVA02-CLIP-E against a NumPy oracle written from the
published facts.
"""

import json
import math

import numpy as np
import pytest
from PIL import Image

from evlm_jax import assets
from evlm_jax.convert import engine
from tests.helpers.parity import config_for, encode, load, needs_asset, needs_transformers, relative

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
HALF = np.full((2, 3), 0.5)
OPENAI = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])


def normalised(pixels: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """[1, 3, h, w] float32, as PyTorch models take it."""
    return (
        ((pixels / 255 - constants[0]) / constants[1]).astype(np.float32).transpose(2, 0, 1)[None]
    )


def hidden_states(model, pixels: np.ndarray, constants: np.ndarray, **options) -> list[np.ndarray]:
    """Outputs of every block (0: embeddings) of a transformers model."""
    import torch

    with torch.no_grad():
        return [
            h[0].numpy()
            for h in model(
                torch.tensor(normalised(pixels, constants)), output_hidden_states=True, **options
            ).hidden_states
        ]


def dinov2_of_onnx():
    """transformers' DINOv2 with the weights that the ONNX file's graph names."""
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(assets.path("dinov2-small")).graph
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    state = {
        name.removeprefix("backbone."): array
        for name, array in weights.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            state[
                node.name.replace("/backbone/", "").replace("/MatMul", "").replace("/", ".")
                + ".weight"
            ] = weights[node.input[1]].T
    tables = [
        array
        for name, array in weights.items()
        if array.shape in ((1, 1, 384), (1, 1369, 384)) and not name.startswith("backbone.")
    ]
    state["embeddings.position_embeddings"] = np.concatenate(
        sorted(tables, key=lambda a: a.shape[1]), 1
    )
    rename = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
    }
    rename |= {
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    theirs = Dinov2Model(
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    ).eval()
    loaded = {}
    for name, array in state.items():
        for old, new in rename.items():
            name = (
                name.replace(old, new) if any(new in key for key in theirs.state_dict()) else name
            )
        loaded[name] = torch.tensor(np.ascontiguousarray(array))
    missing, unexpected = theirs.load_state_dict(loaded, strict=False)
    assert set(missing) <= {"embeddings.mask_token"} and not unexpected
    return theirs


@needs_transformers
@needs_asset("dinov2-small")
@needs_asset("photos")
@pytest.mark.ci
def test_dinov2_taps_on_a_photograph():
    """The oracle takes the weights out of the ONNX file by itself and interpolates the 37x37
    positions by torch.
    """
    theirs = dinov2_of_onnx()
    pixels = np.asarray(
        Image.open(assets.path("photos") / "chelsea.png").convert("RGB").resize((224, 224))
    )
    reference = hidden_states(theirs, pixels, IMAGENET)
    cfg = config_for("dinov2-small", "vit", image_size=224, taps=(4, 8, 11, 12))
    taps = encode(load(cfg, "dinov2-small", "vit"), pixels)
    errors = [
        relative(tap, reference[number]) for tap, number in zip(taps, cfg.vit.taps, strict=True)
    ]
    print(
        "\nDINOv2 relative errors at taps 4, 8, 11, 12:",
        ", ".join(f"{error:.1e}" for error in errors),
    )
    assert max(errors) <= 1e-4


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@needs_transformers
@pytest.mark.parametrize(
    "family, image_size",
    [
        ("Dinov2", 42),
        ("Dinov2WithRegisters", 28),
        ("Dinov2WithRegisters", 42),
        ("CLIPVision", 42),
        ("CLIPVision gelu", 28),  # LAION's
        ("CLIP", 28),
        ("SiglipVision", 42),
        ("Siglip", 28),
    ],
)
def test_tiny_random_towers_from_a_transformers_directory(tmp_path, family, image_size):
    """At the trained size and, with interpolated positions, at another one."""
    import torch
    import transformers

    torch.manual_seed(0)
    family, _, activation = family.partition(" ")
    clip, siglip = family.startswith("CLIP"), family.startswith("Siglip")
    sizes = (
        TINY
        | ({"intermediate_size": 56} if clip or siglip else {})
        | ({"hidden_act": activation} if activation else {})
    )
    if family in ("CLIP", "Siglip"):
        text = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 9,
            "eos_token_id": 1,
        }
        config = getattr(transformers, f"{family}Config")(vision_config=sizes, text_config=text)
    else:
        config = getattr(transformers, f"{family}Config")(**sizes)
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), np.uint8)
    vision = theirs.vision_model if family in ("CLIP", "Siglip") else theirs
    constants = OPENAI if clip else HALF if siglip else IMAGENET
    reference = hidden_states(
        vision, pixels, constants, **({"interpolate_pos_encoding": True} if clip or siglip else {})
    )
    rule = (
        "antialias" if family == "Dinov2WithRegisters" else "bicubic"
    )  # as their own code resizes positions
    cfg = config_for(str(tmp_path), "vit", image_size=image_size, taps=(1, 3), interpolation=rule)
    assert (
        cfg.vit.registers == (4 if "Registers" in family else 0)
        and cfg.vit.embed_norm == clip
        and cfg.vit.class_token != siglip
    )
    taps = encode(load(cfg, str(tmp_path), "vit"), pixels)
    assert relative(taps[0], reference[1]) <= 1e-5
    assert relative(taps[1], reference[3]) <= 1e-5


def eva_checkpoint(
    rng: np.random.Generator, depth: int, width: int, mlp: int, patch: int, grid: int
) -> dict[str, np.ndarray]:
    """Random weights in the names and shapes of the EVA repository."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid**2 + 1, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    shapes |= {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "head.weight": (5, width),
        "head.bias": (5,),
    }
    for i in range(depth):
        block = {
            "attn.qkv.weight": (3 * width, width),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.proj.weight": (width, width),
        }
        block |= {
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (mlp, width),
            "mlp.fc1.bias": (mlp,),
            "mlp.fc2.weight": (width, mlp),
        }
        block |= {"mlp.fc2.bias": (width,)} | {
            f"norm{j}.{kind}": (width,) for j in (1, 2) for kind in ("weight", "bias")
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {
        name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


def eva_oracle(
    weights: dict[str, np.ndarray], pixels: np.ndarray, depth: int, heads: int, patch: int
) -> list[np.ndarray]:
    """conversion.md section 1, in float64: x + norm1(attn(x)), x + norm2(mlp(x)); no bias on k; erf
    GELU; eps 1e-6.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    image, erf = normalised(pixels, OPENAI)[0].astype(np.float64), np.vectorize(math.erf)
    grid = image.shape[1] // patch
    tiles = [
        image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        for r in range(grid)
        for c in range(grid)
    ]
    patches = [
        np.tensordot(w["patch_embed.proj.weight"], tile, 3) + w["patch_embed.proj.bias"]
        for tile in tiles
    ]
    x = np.stack([w["cls_token"][0, 0], *patches]) + w["pos_embed"][0]

    def norm(y, name):
        centred = y - y.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    outputs = []
    for i in range(depth):
        b = f"blocks.{i}"
        bias = np.concatenate(
            [w[f"{b}.attn.q_bias"], np.zeros_like(w[f"{b}.attn.v_bias"]), w[f"{b}.attn.v_bias"]]
        )
        q, k, v = np.moveaxis(
            (x @ w[f"{b}.attn.qkv.weight"].T + bias).reshape(len(x), 3, heads, -1), 0, 2
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(x.shape)
        x = x + norm(mixed @ w[f"{b}.attn.proj.weight"].T + w[f"{b}.attn.proj.bias"], f"{b}.norm1")
        h = x @ w[f"{b}.mlp.fc1.weight"].T + w[f"{b}.mlp.fc1.bias"]
        h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
        x = x + norm(h @ w[f"{b}.mlp.fc2.weight"].T + w[f"{b}.mlp.fc2.bias"], f"{b}.norm2")
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    "prefix", ["", "visual.", "visual.trunk."]
)  # timm, the EVA repository, open_clip
def test_eva_against_a_numpy_oracle(tmp_path, prefix):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    sizes = {"depth": 3, "width": 24, "mlp": 40, "patch": 7, "grid": 2}
    weights = eva_checkpoint(rng, **sizes)
    other = {"text.logit_scale": np.zeros(1, np.float32)} if prefix else {}
    save_file(
        {prefix + name: array for name, array in weights.items()} | other,
        tmp_path / "model.safetensors",
    )
    vision = {
        "image_size": 14,
        "layers": 3,
        "width": 24,
        "head_width": 8,
        "mlp_ratio": 40 / 24,
        "patch_size": 7,
        "postnorm": True,
        "xattn": True,
    }
    (tmp_path / "config.json").write_text(json.dumps({"embed_dim": 5, "vision_cfg": vision}))
    pixels = rng.integers(0, 256, (14, 14, 3), np.uint8)
    reference = eva_oracle(weights, pixels, depth=3, heads=3, patch=7)
    cfg = config_for(str(tmp_path), "vit", image_size=14, taps=(1, 2))
    assert (cfg.vit.norm, cfg.vit.bias, cfg.vit.heads) == ("res_post", "qv", 3)
    taps = encode(load(cfg, str(tmp_path), "vit"), pixels)
    assert relative(taps[0], reference[0]) <= 1e-5
    assert relative(taps[1], reference[1]) <= 1e-5


def test_eva_of_another_kind_is_refused(tmp_path):
    """EVA-02 L of its own repository."""
    from safetensors.numpy import save_file

    sizes = {"depth": 1, "width": 24, "mlp": 40, "patch": 7, "grid": 2}
    save_file(eva_checkpoint(np.random.default_rng(0), **sizes), tmp_path / "model.safetensors")
    vision = {"image_size": 14, "layers": 1, "width": 24, "head_width": 8, "patch_size": 7}
    vision |= dict.fromkeys(("rope", "naiveswiglu", "subln"), True)
    (tmp_path / "config.json").write_text(json.dumps({"vision_cfg": vision}))
    with pytest.raises(ValueError, match="naiveswiglu True.* rope True, subln True"):
        engine.describe(str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_cfg": "x"}, "vision_cfg 'x', which must be an object"),
        ({"pretrained_cfg": [1]}, "pretrained_cfg .1., which must be an object"),
        ({"pretrained_cfg": {"mean": 0.5}}, "pretrained_cfg of config.json: mean must be three"),
    ],
)
def test_parts_of_an_eva_config_are_objects(tmp_path, changes, message):
    from safetensors.numpy import save_file

    sizes = {"depth": 1, "width": 24, "mlp": 40, "patch": 7, "grid": 2}
    save_file(eva_checkpoint(np.random.default_rng(0), **sizes), tmp_path / "model.safetensors")
    vision = {"image_size": 14, "layers": 1, "width": 24, "head_width": 8, "patch_size": 7}
    config = {"vision_cfg": vision | {"postnorm": True}} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        engine.describe(str(tmp_path))
