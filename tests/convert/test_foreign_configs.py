"""What EVLM's towers are not is refused by the config that says it."""

import json

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import Source
from evlm_jax.convert import config_json, engine, idefics, mllama
from evlm_jax.convert.describe_decoder import describe_decoder
from evlm_jax.convert.readers import open_source
from tests.helpers.checkpoints import dinov2_directory, llama_directory
from tests.helpers.tiny import tiny_config

CFG = tiny_config()

NOT_LLAMA = {  # of config.json: what the error names
    "rope_scaling, the old key": (
        {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
        "max_position_embeddings None",
    ),
    "longrope": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rope_type 'longrope'",
    ),
    "two contexts": (
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "dynamic",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
            },
        },
        "original_max_position_embeddings 32",
    ),
    "rope_scaling": (
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            "max_position_embeddings": 64,
        },
        "no low_freq_factor",
    ),
    "rope_parameters": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "original_max_position_embeddings None",
    ),
    "a factor alone": ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "factor 4.0"),
    "two bases": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta 10000.0 and 500000.0"),
    "layers of two kinds": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "full_attention",
    ),
    "how queries grow": (
        {
            "model_type": "ministral3",
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "llama_4_scaling_beta None",
    ),
    "queries that grow": (
        {
            "model_type": "ministral3",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "llama_4_scaling_beta": 0.1},
        },
        "rope_type 'linear' beside llama_4_scaling_beta",
    ),
    "queries of a Llama that grow": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "llama_4_scaling_beta 0.1",
    ),
    "no object": ({"rope_scaling": "yarn"}, "is no object"),
    "a list of rope types": ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type ..yarn"),
    "more layers than any machine": ({"num_hidden_layers": 10**30}, "num_hidden_layers 10000"),
    "partial rotary positions": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "bias of the MLP": ({"mlp_bias": True}, "mlp_bias True"),
    "bias of the attention": ({"attention_bias": True}, "attention_bias True"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    "window": ({"sliding_window": 4096}, "sliding_window 4096"),
    "a window that is no number": ({"model_type": "mistral", "sliding_window": 0}, "window 0"),
    "layer types": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    "layers without positions, too few": (
        {"model_type": "smollm3", "no_rope_layers": [1, 1, 0]},
        "no_rope_layers",
    ),
    "multipliers": (
        {"logits_scaling": 8.0, "residual_multiplier": 0.2},
        "logits_scaling 8.0, residual_multiplier 0.2",
    ),
    "layers without positions": ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
    "norms of q and k": ({"use_qk_norm": True}, "use_qk_norm True"),
    "no causal mask": ({"is_causal": False}, "is_causal False"),
    "interleaved positions": ({"rope_interleaved": True}, "rope_interleaved True"),
    "other layers": ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "per_layer_config"),
    "weights of another file": (
        {"transformers_weights": "other.safetensors"},
        "transformers_weights",
    ),
    "code from elsewhere": (
        {"attn_implementation": "someone/kernels"},
        "attn_implementation 'someone/kernels'",
    ),
    "a wrong type": ({"num_attention_heads": "4"}, "num_attention_heads '4'"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
    "Gemma 2": ({"model_type": "gemma2"}, "names of its tensors are llama's"),
    "Cohere 2": ({"model_type": "cohere2"}, "model_type 'cohere2', which is not read"),
    "GLM 4": ({"model_type": "glm4"}, "model_type 'glm4', which is not read"),
    "an odd type": ({"model_type": ["llama"]}, "which is not read"),
    "no type": ({"model_type": None}, "lacks model_type"),
    "another family's type": ({"model_type": "qwen"}, "names of its tensors are llama's"),
}


@pytest.mark.parametrize("case", NOT_LLAMA)
def test_what_is_no_llama_is_refused_by_its_config(tmp_path, case):
    changes, message = NOT_LLAMA[case]
    llama_directory(tmp_path, CFG, **changes)
    with pytest.raises(ValueError, match=message) as error:
        engine.describe(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


INERT = {
    "old keys": {
        "pretraining_tp": 2,
        "torch_dtype": "bfloat16",
        "_name_or_path": "x",
        "bos_token_id": 1,
        "architectures": ["LlamaForCausalLM"],
    },
    "nothing said": {
        "rope_scaling": None,
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    },
    "both keys": {
        "rope_theta": 1e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "code beside it": {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "heads left out": {"num_key_value_heads": 2, "head_dim": None},
}


@pytest.mark.parametrize("case", INERT)
def test_what_changes_nothing_is_read(tmp_path, case):
    llama_directory(tmp_path, CFG, **INERT[case])
    engine.open_tower(CFG, open_source(tmp_path), "llm")


def test_defaults_are_those_of_the_family(tmp_path):
    """Qwen2 has 32 key heads where config.json leaves them out, Mistral 8,
    Llama as many as heads.
    """
    for name, heads in (("llama", 4), ("qwen2", 32), ("mistral", 8)):
        config = {"model_type": name, "num_attention_heads": 4, "sliding_window": None}
        assert (config_json.fields_of(tmp_path, config)["num_key_value_heads"] or 4) == heads


def test_layers_are_a_list_where_there_are_two(tmp_path):
    """Two equal sides of an image are one number; two equal layers are not."""
    for turns in ([1, 1], [0, 0]):
        config = {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": turns}
        assert config_json.fields_of(tmp_path, config)["no_rope_layers"] == turns


def test_all_layers_may_have_a_window(tmp_path):
    config = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 9}
    config |= {"num_hidden_layers": 2, "max_window_layers": 0}
    assert describe_decoder(tmp_path, config)["window"] == (9,)


LINEAR = {"rope_type": "linear", "factor": 2.0}
HALF_READ = {  # of which transformers reads a part, or nothing at all
    "scaling beside other parameters": (
        {"model_type": "llama", "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"beta": 1}},
        "a rope_scaling unlike rope_parameters",
    ),
    "an old key beside two bases": (
        {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 2.0}},
        "transformers reads rope_type alone",
    ),
} | {
    f"{name} without its window": ({"model_type": name, "sliding_window": None}, "sliding_window")
    for name in ("gemma2", "gemma3_text", "olmo3")
}


@pytest.mark.parametrize("case", HALF_READ)
def test_what_transformers_does_not_read_whole_is_refused(tmp_path, case):
    config, message = HALF_READ[case]
    with pytest.raises(ValueError, match=message):
        describe_decoder(tmp_path, config)


def test_the_trained_length_beside_two_bases_is_transformers(tmp_path):
    """What stands beside rope_parameters wins where there is one base alone."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for name, parameters, wanted in (
        ("llama", yarn, 16),
        ("olmo3", {"full_attention": yarn}, 64),
        ("olmo3", {"full_attention": yarn | {"original_max_position_embeddings": 32}}, 32),
    ):
        config = {"model_type": name, "max_position_embeddings": 64, "rope_parameters": parameters}
        found = describe_decoder(tmp_path, config | {"original_max_position_embeddings": 16})
        assert found["rope_scaling"]["original"] == wanted


def test_heads_that_were_cut_off_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pruned_heads"):
        config_json.fields_of(
            tmp_path, {"model_type": "clip_vision_model", "pruned_heads": {"0": [1]}}
        )


NOT_DINOV2 = {
    "SwiGLU": ({"use_swiglu_ffn": True}, r"mlp_ratio is \d+ in config.json and \d+ in the tensors"),
    "no bias": ({"qkv_bias": False}, "qkv_bias False"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu'; EVLM's ViT has gelu"),
    "another depth": (
        {"num_hidden_layers": 12},
        "num_hidden_layers is 12 in config.json and 4 in the tensors",
    ),
    "DINOv3": ({"model_type": "dinov3_vit"}, "it holds dinov3, the names of its tensors are"),
    "AIMv2": ({"model_type": "aimv2_vision_model"}, "it holds aimv2, the names of its tensors are"),
    "NaFlex": ({"model_type": "siglip2_vision_model"}, "'siglip2_vision_model', which is not read"),
    "an unknown field": ({"rope_theta": 100.0}, "rope_theta 100.0"),
}


@pytest.mark.parametrize("case", NOT_DINOV2)
def test_what_is_no_dinov2_is_refused_by_its_config(tmp_path, case):
    changes, message = NOT_DINOV2[case]
    dinov2_directory(tmp_path, CFG)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        engine.describe(str(tmp_path))


def test_the_kernel_of_positions_is_a_fact_of_the_family(tmp_path):
    cfg = tiny_config(vit={"registers": 2, "image_size": 16})
    dinov2_directory(tmp_path, cfg)
    assert engine.describe(str(tmp_path))["interpolation"] == "antialias"
    with pytest.raises(
        ValueError, match="vit.interpolation is bicubic, the checkpoint has antialias"
    ):
        engine.open_tower(cfg, open_source(tmp_path), "vit")


def test_a_dinov2_of_another_width_needs_its_config(tmp_path):
    dinov2_directory(tmp_path, CFG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="width 32 needs its config.json"):
        engine.describe(str(tmp_path))


PARTS = {  # of config.json, that must be objects
    "clip": ("vision_config", "vision_config_dict"),
    "idefics": ("vision_config",),
    "mllama": ("text_config", "vision_config"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_config_are_objects(tmp_path, name):
    for part in PARTS[name]:
        for value in ("x", [1], 0, True):
            source = Source(tmp_path, {"model_type": name, part: value}, {})
            with pytest.raises(ValueError, match=f"config.json has {part} .*must be an object"):
                if name == "clip":
                    config_json.fields_of(tmp_path, source.metadata)
                else:
                    (mllama if name == "mllama" else idefics).parts(source)


def test_a_dinov2_without_registers_is_one_with_none(tmp_path):
    """transformers' class with registers saves a tensor without rows where it has none."""
    from safetensors.numpy import load_file, save_file

    dinov2_directory(tmp_path, CFG)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "dinov2_with_registers", "num_register_tokens": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(file := tmp_path / "model.safetensors")
    save_file(tensors | {"embeddings.register_tokens": np.zeros((1, 0, 32), np.float32)}, file)
    assert engine.describe(str(tmp_path))["registers"] == 0
    cfg = tiny_config(vit={"interpolation": "antialias"})
    engine.open_tower(cfg, open_source(tmp_path), "vit")


def test_the_processor_of_transformers_5_is_read_before_the_preprocessor(tmp_path):
    """As transformers reads them."""
    dinov2_directory(tmp_path, CFG)
    numbers = {"image_mean": [0.25] * 3, "image_std": [0.5] * 3}

    def write(name, **facts):
        return (tmp_path / f"{name}_config.json").write_text(json.dumps(facts))

    write("processor", processor_class="AutoProcessor", image_processor=numbers)
    assert engine.describe(str(tmp_path))["mean"] == (0.25,) * 3
    write("preprocessor", do_normalize=False)
    assert engine.describe(str(tmp_path))["std"] == (0.5,) * 3
    write("processor", processor_class="AutoProcessor")  # of transformers 4
    assert engine.describe(str(tmp_path))["std"] == (1.0,) * 3
    write("processor", image_processor=[numbers])
    with pytest.raises(ValueError, match="processor_config.json has image_processor .* an object"):
        engine.describe(str(tmp_path))


def test_the_preprocessor_is_read_whole(tmp_path):
    dinov2_directory(tmp_path, CFG)

    def write(**facts):
        return (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))

    write(do_normalize=False)
    assert engine.describe(str(tmp_path))["std"] == (1.0, 1.0, 1.0)
    for facts, message in (
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"do_normalize": None}, "do_normalize must be true or false, got None"),
        ({"image_mean": [0.5] * 3}, "image_std must be three numbers"),
        ({"image_mean": [0.5] * 3, "image_std": ["a", 1, 1]}, "image_std must be three numbers"),
        ({"image_mean": [float("nan")] * 3, "image_std": [1] * 3}, "image_mean must be three"),
    ):
        write(**facts)
        with pytest.raises(ValueError, match=message):
            engine.describe(str(tmp_path))
