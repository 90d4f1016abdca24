"""Every causal language model and vision model of transformers: refused by config.json alone, or
read, and then the same function.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.convert import config_json, families
from evlm_jax.convert.describe_decoder import describe_decoder
from evlm_jax.convert.refused import LANGUAGE, VISION
from tests.helpers.parity import config_for, encode, load, relative, text_logits

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")
pytestmark = pytest.mark.parity

READ = families.KINDS.keys() | families.WHOLE.keys()
STOCK = sorted(READ - {"qwen"})  # which transformers does not have
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}
OTHER = {
    bool: lambda x: not x,
    int: lambda x: x + 1,
    float: lambda x: x + 0.25,
    str: lambda x: "relu",
    type(None): lambda _: 3,
}


def config_class(name: str):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[name]


def written(name: str, **changes) -> dict:
    """config.json as save_pretrained has it, complete."""
    return json.loads(json.dumps(config_class(name)(**changes).to_dict(), default=str))


def test_the_list_is_whole():
    from transformers.models.auto import modeling_auto as auto

    assert set(LANGUAGE) == set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images = {
        *auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    assert set(VISION) | set(LANGUAGE) >= images | {
        *auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    }
    assert READ - {"qwen", "idefics"} <= {*LANGUAGE, *VISION}


def test_the_docs_have_what_the_command_prints(capsys):
    assert cli.main(["convert", "families"]) == 0
    assert (
        Path("docs/conversion.md").read_text().partition("<!-- families -->\n")[2]
        == capsys.readouterr().out
    )


def test_every_other_type_is_refused_by_its_config(tmp_path):
    built = 0
    for name in sorted({*LANGUAGE, *VISION} - READ):
        try:
            config = written(name)
        except Exception:  # noqa: BLE001 (a config without a default, or of a library that is not there)
            config = {"model_type": name}
        built += len(config) > 1
        with pytest.raises(ValueError, match="which is not read|quantised"):
            config_json.kind_of(tmp_path, config)
    assert built > 300


@pytest.mark.parametrize("name", STOCK)
def test_defaults_and_fields_are_those_of_transformers(tmp_path, name):
    """Every field of the config class is read, fixed or inert; left out, it has transformers'
    default.
    """
    if name in families.WHOLE:
        config = written(name)
        assert config_json.fields_of(tmp_path, config) == config_json.fields_of(
            tmp_path, {"model_type": name, "vision_config": {}}
        )
        return
    config, kind = written(name), families.KINDS[name]
    for field, (default, _) in kind.fixed.items():
        assert config[field] == default
    said = describe_decoder if kind.tower == "llm" else config_json.fields_of
    assert said(tmp_path, config) == said(tmp_path, {"model_type": name})


@pytest.mark.parametrize("name", sorted(STOCK))
def test_a_field_with_another_value_is_seen(tmp_path, name):
    """Refused, or among the facts; but for the fields that are listed as inert."""
    config = written(name).get("vision_config") if name in families.WHOLE else written(name)

    def wrap(fields):
        return {"model_type": name, "vision_config": fields} if name in families.WHOLE else fields

    before = config_json.fields_of(tmp_path, wrap(config))
    apart = {"vision_use_head", *getattr(families, f"{name.upper()}_INERT", ())}
    for field in sorted(config.keys() - families.INERT - apart):
        value = config[field]
        other = (
            OTHER[type(value)](value)
            if type(value) in OTHER
            else {"factor": 4.0}
            if isinstance(value, dict)
            else ["sliding_attention"]
        )
        try:
            after = config_json.fields_of(tmp_path, wrap(config | {field: other}))
        except ValueError as error:
            assert field in str(error) or "rotary" in str(error) or "layer_types" in str(error)
        else:
            assert after != before, field


# ------------------------------------------------------------------------------------------- parity


def shaken(model, spread: float = 0.3, seed: int = 0):
    """In evaluation mode; norm weights and biases away from their defaults, so that a forgotten one
    shows.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape))
    return model.eval()


LANGUAGE_MODELS = {
    "llama": {"num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-4},
    "llama, wide heads": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": False, "max_window_layers": 1},
    "qwen2, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 1e6},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_language_models_that_are_read(tmp_path, case):
    from transformers import AutoModelForCausalLM

    config = config_class(case.partition(",")[0])(**SIZES | LANGUAGE_MODELS[case])
    theirs = shaken(AutoModelForCausalLM.from_config(config))
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 99, 60)
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    cfg = config_for(str(tmp_path), "llm")
    assert relative(text_logits(cfg, load(cfg, str(tmp_path), "llm"), tokens), reference) <= 1e-5


ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 7}
TOWERS = {  # config, trained size, size of the picture
    "dinov2": ({"mlp_ratio": 2}, 28, 42),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 3}, 28, 42),
    "clip_vision_model": ({"intermediate_size": 56, "hidden_act": "gelu"}, 28, 42),
    "metaclip_2_vision_model": ({"intermediate_size": 56}, 28, 42),
    "siglip_vision_model": ({"intermediate_size": 56}, 28, 42),
    "dinov3_vit": ({"intermediate_size": 56, "num_register_tokens": 3}, 28, 42),
    "aimv2_vision_model": ({"intermediate_size": 50}, 28, 28),  # which resizes no positions
    "aimv2_vision_model, biases, without a head": (
        {"intermediate_size": 50, "qkv_bias": True, "mlp_bias": True, "hidden_act": "gelu"}
        | {"use_head": False, "rms_norm_eps": 1e-3},
        28,
        28,
    ),
    "internvl_vision": (
        {"intermediate_size": 56, "use_qk_norm": True, "norm_type": "rms_norm"},
        28,
        42,
    ),
    "internvl_vision, biases": (
        {"intermediate_size": 50, "attention_bias": True, "layer_norm_eps": 1e-4}
        | {"use_mean_pooling": False, "use_mask_token": True, "hidden_act": "gelu_pytorch_tanh"},
        28,
        42,
    ),
    "dinov2, giant": ({"mlp_ratio": 3, "use_swiglu_ffn": True}, 28, 42),
    "siglip_vision_model, patches that do not fill it": ({"intermediate_size": 56}, 30, 28),
    "dinov2_with_registers, smaller": ({"mlp_ratio": 2}, 42, 28),
    "dinov2, tall": ({"mlp_ratio": 2}, 28, (42, 21)),
    "dinov2_with_registers, wide": ({"mlp_ratio": 2, "num_register_tokens": 3}, 42, (28, 35)),
    "dinov3_vit, no registers": ({"intermediate_size": 56}, 28, (28, 14)),
    "dinov3_vit, tall": ({"intermediate_size": 56, "num_register_tokens": 3}, 28, (35, 14)),
    "clip_vision_model, as many patches": ({"intermediate_size": 56}, 28, (56, 14)),
    "siglip_vision_model, wide": ({"intermediate_size": 56}, 28, (21, 42)),
    "internvl_vision, tall": ({"intermediate_size": 56}, 28, (42, 21)),
}


OFTEN = (
    "aimv2_vision_model",
    "internvl_vision",
    "dinov3_vit, tall",
    "dinov3_vit, no registers",
    "dinov2, tall",
)  # which test_parity_vit.py does not have


@pytest.mark.parametrize(
    "case, seed",
    [
        pytest.param(case, seed, marks=() if case in OFTEN and not seed else pytest.mark.slow)
        for case in TOWERS
        for seed in (0, 1)
    ],
)
def test_towers_that_are_read(tmp_path, case, seed):
    """At another size than the trained one, by their own interpolation; or with patches that leave
    a rest of the picture.
    """
    fields, trained, size = TOWERS[case]
    name = case.partition(",")[0]
    config = config_class(name)(**ENCODER, **fields, image_size=trained)
    auto = transformers.AutoModel.from_config  # which does not know MetaCLIP 2's tower
    made = transformers.MetaClip2VisionModel if name.startswith("metaclip") else auto
    theirs = shaken(made(config), seed=seed)
    theirs.save_pretrained(tmp_path)
    cfg = config_for(str(tmp_path), "vit", image_size=size, taps=(1, 3))
    assert cfg.vit.pretrained_size == trained // 7 * 7
    height, width = cfg.vit.size
    rest = trained % 7  # of which the tower makes no patch
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height + rest, width + rest, 3), np.uint8
    )
    mean, std = np.array(cfg.vit.mean), np.array(cfg.vit.std)
    image = ((pixels / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
    asked = name.partition("_")[0] in ("clip", "metaclip", "siglip") and not rest
    more = {"interpolate_pos_encoding": True} if asked else {}
    with torch.no_grad():
        reference = theirs(torch.tensor(image), output_hidden_states=True, **more).hidden_states
    taps = encode(load(cfg, str(tmp_path), "vit"), pixels[:height, :width])
    assert relative(taps[0], reference[1][0].numpy()) <= 1e-5
    assert relative(taps[1], reference[3][0].numpy()) <= 1e-5


@pytest.mark.slow
def test_the_tower_of_a_whole_internvl(tmp_path):
    text = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "qwen2"}
    vision = ENCODER | TOWERS["internvl_vision"][0] | {"image_size": 28}
    config = transformers.InternVLConfig(text_config=text, vision_config=vision, image_token_id=9)
    theirs = shaken(transformers.InternVLForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path)
    cfg = config_for(str(tmp_path), "vit", image_size=28, taps=(1, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    image = (pixels / 255 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    with torch.no_grad():
        reference = theirs.model.vision_tower(
            torch.tensor(image.astype(np.float32).transpose(2, 0, 1)[None]),
            output_hidden_states=True,
        ).hidden_states
    taps = encode(load(cfg, str(tmp_path), "vit"), pixels)
    assert relative(taps[1], reference[3][0].numpy()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LANGUAGE) - READ))
def test_tiny_models_of_other_types_are_refused(tmp_path, name):
    """With the weights on disk."""
    from transformers import AutoModelForCausalLM

    from evlm_jax.convert import engine

    try:
        config = config_class(name)(**SIZES, num_key_value_heads=2, pad_token_id=0)
        with torch.device("meta"):  # many name their sizes otherwise: their defaults may not fit
            shapes = AutoModelForCausalLM.from_config(config).parameters()
        assert sum(shape.numel() for shape in shapes) < 1e7
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"no tiny model of it: {type(error).__name__}")
    with pytest.raises(ValueError, match="which is not read|quantised"):
        engine.describe(str(tmp_path))
