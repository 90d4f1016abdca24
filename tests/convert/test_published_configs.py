"""Config files of published models, as their authors wrote them."""

import pytest

from evlm_jax.convert import config_json
from evlm_jax.convert.describe_decoder import describe_decoder

PUBLISHED = {  # fields as the projects' own config.json files have them: what is read of them
    "SmolLM2 135M": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
        }
        | {
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.04,
            "intermediate_size": 1536,
            "is_llama_config": True,
        }
        | {
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
        }
        | {
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
        }
        | {
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        {"rope_theta": 1e5, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "Qwen2.5 7B": (
        {
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 3584,
        }
        | {
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
        }
        | {
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
        }
        | {
            "tie_word_embeddings": False,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {"rope_theta": 1e6, "num_key_value_heads": 4, "intermediate_size": 18944},
    ),
    "Mistral 7B v0.3": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        | {
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32768,
            "use_cache": True,
        },
        {"rope_theta": 1e6, "vocab_size": 32768, "num_hidden_layers": 32},
    ),
    "Llama 3.2 1B": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "kind": "llama3",
                "factor": 32.0,
                "slow": 1.0,
                "fast": 4.0,
                "original": 8192,
            },
        },
    ),
    "Qwen3 8B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"rope_theta": 1e6, "head_dim": 128, "rope_scaling": None},
    ),
    "Gemma 2 2B": (
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        {"attn_logit_softcapping": 50.0, "hidden_size": 2304, "sliding_window": 4096},
    ),
    "Gemma 3 1B": (
        {
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "hidden_size": 1152,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        {"rope_theta": 1e6, "rope_near": 1e4, "sliding_window_pattern": 6},
    ),
    "SmolLM3 3B": (
        {
            "model_type": "smollm3",
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"rope_theta": 5e6, "num_hidden_layers": 36, "tie_word_embeddings": True},
    ),
    "OLMo 3 7B": (
        {
            "model_type": "olmo3",
            "rope_theta": 500000,
            "sliding_window": 4096,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
        },
        {"rope_theta": 5e5, "rope_near": 5e5, "sliding_window": 4096},
    ),
    "Granite 3.3 2B": (
        {
            "model_type": "granite",
            "attention_bias": False,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "mlp_bias": False,
            "residual_multiplier": 0.22,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
        },
        {"attention_multiplier": 0.015625, "logits_scaling": 8.0},
    ),
    "Phi 4": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": 16384,
            "resid_pdrop": 0.0,
            "rope_scaling": None,
            "rope_theta": 250000,
            "sliding_window": None,
        },
        {"rope_theta": 250000.0, "rotary_share": 1.0},
    ),
    "Qwen 14B Chat": (
        {
            "model_type": "qwen",
            "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
            "attn_dropout_prob": 0.0,
            "bf16": False,
        }
        | {
            "emb_dropout_prob": 0.0,
            "fp16": False,
            "fp32": False,
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "kv_channels": 128,
        }
        | {
            "intermediate_size": 27392,
            "layer_norm_epsilon": 1e-06,
            "max_position_embeddings": 8192,
            "no_bias": True,
            "onnx_safe": None,
        }
        | {
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
        }
        | {
            "seq_length": 2048,
            "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer",
            "use_dynamic_ntk": True,
        }
        | {
            "use_flash_attn": "auto",
            "use_logn_attn": True,
            "vocab_size": 152064,
            "use_cache_quantization": False,
        },
        {"kv_channels": 128, "seq_length": 2048, "use_logn_attn": True},
    ),
    "SigLIP so400m": (
        {
            "model_type": "siglip",
            "architectures": ["SiglipModel"],
            "initializer_factor": 1.0,
            "text_config": {"hidden_size": 1152},
        }
        | {
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
            }
        },
        {
            "num_hidden_layers": 12,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "image_size": 384,
        },
    ),
    "CLIP L": (
        {
            "model_type": "clip",
            "logit_scale_init_value": 2.6592,
            "text_config": {},
            "vision_config": {"hidden_size": 512},
        }
        | {
            "vision_config_dict": {
                "hidden_size": 1024,
                "patch_size": 14,
                "projection_dim": 768,
                "dropout": 0.0,
                "pruned_heads": {},
            }
        },
        {"hidden_size": 1024, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    ),
    "a vision model in full": (
        {
            "model_type": "clip_vision_model",
            "add_cross_attention": False,
            "architectures": None,
            "bad_words_ids": None,
            "num_beams": 1,
        }
        | {
            "chunk_size_feed_forward": 0,
            "is_decoder": False,
            "max_length": 20,
            "pruned_heads": {},
            "temperature": 1.0,
            "top_k": 50,
        }
        | {
            "tie_encoder_decoder": False,
            "tie_word_embeddings": True,
            "torchscript": False,
            "use_bfloat16": False,
            "id2label": {"0": "a"},
        },
        {"hidden_size": 768, "patch_size": 32},
    ),
    "DINOv2 with registers": (
        {
            "model_type": "dinov2_with_registers",
            "apply_layernorm": True,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
        }
        | {
            "image_size": 518,
            "interpolate_antialias": True,
            "interpolate_offset": 0.0,
            "layerscale_value": 1.0,
            "patch_size": 14,
        }
        | {
            "out_features": ["stage12"],
            "out_indices": [12],
            "qkv_bias": True,
            "stage_names": ["stem"],
            "use_swiglu_ffn": False,
        },
        {"num_register_tokens": 4, "image_size": 518, "num_attention_heads": 12},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    config, facts = PUBLISHED[name]
    assert config_json.kind_of(tmp_path, config)
    assert facts.items() <= config_json.fields_of(tmp_path, config).items()
    if config_json.kind_of(tmp_path, config).tower == "llm":
        assert describe_decoder(tmp_path, config)
