"""Which foreign models are read: for each `model_type` the fields of its config.json that decide
the function.

A model type that is not in KINDS is refused by its name, and so is a field that is not known here
and says anything (config_json.py). Defaults are those of transformers' config classes: published
configs leave out what equals them."""

from dataclasses import dataclass, field
from typing import Any

from evlm_jax.convert.config_rope import MINISTRAL3, Rotary

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
    " pos_embed_jitter pos_embed_rescale pos_embed_shift _sliding_window_pattern"
    " _attn_implementation_autoset cache_implementation"
    " chunk_size_feed_forward bf16 fp16 fp32 use_flash_attn"
    " softmax_in_fp32 use_mask_token apply_layernorm reshape_hidden_states out_features out_indices"
    " stage_names vision_use_head use_head use_mean_pooling projection_dropout"
    " layer_scale_init_value logit_scale_init_value onnx use_cache_kernel".split()
)
OFF = {  # fields of any config.json that must be as given, where they are there
    name: (False, {False})
    for name in (
        "add_cross_attention is_decoder is_encoder_decoder tie_encoder_decoder rope_interleaved"
        " qk_layernorm use_qk_norm use_mrope"
    ).split()
}
OFF |= dict.fromkeys(("attention_bias", "mlp_bias"), (False, {False}))
OFF |= {"cross_attention_hidden_size": (None, {None}), "tie_last_hidden_states": (None, {None})}
OFF |= {
    "attn_implementation": (None, {None, "eager", "sdpa", "flash_attention_2"}),
    "is_causal": (True, {True}),
}
OFF |= {"_attn_implementation": OFF["attn_implementation"]}
# early configs of DINOv2 with registers
OFF |= {"interpolate_antialias": (True, {True}), "interpolate_offset": (0.0, {0.0})}


@dataclass(frozen=True)
class Kind:
    """A model type that is read: `read` is {field: default} of what becomes ours, `fixed` {field:
    (default, the values that are ours)}.
    """

    family: str  # of tables.py; transformers 5 renamed some, which is no family of its own
    tower: str  # one of engine.PARTS
    read: dict[str, Any]
    fixed: dict[str, tuple[Any, set]] = field(default_factory=dict)
    rotary: Rotary | None = None  # the fields of config_rope.py are its fields, too
    choices: dict[str, Any] = field(default_factory=dict)  # of LLMConfig, that the type alone says
    note: str = ""
    silent: frozenset[str] = frozenset()  # fields that its configs have and its class does not read


SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LAYERS = {"sliding_window": 4096, "layer_types": None}
SOME_SLIDE = LAYERS | {"use_sliding_window": False, "max_window_layers": 28}
QWEN2 = SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
MISTRAL = SIZES | {"intermediate_size": 14336, "num_key_value_heads": 8}
GEMMA = SIZES | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
GEMMA2 = {key: value for key, value in GEMMA.items() if key != "hidden_act"} | LAYERS
GEMMA2 |= {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
GEMMA3 = {key: value for key, value in GEMMA2.items() if key != "attn_logit_softcapping"}
GEMMA3 |= {"vocab_size": 262208, "final_logit_softcapping": None, "sliding_window_pattern": 6}
MULTIPLIERS = dict.fromkeys(
    (
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
    ),
    1.0,
)
NO_BIAS = {"attention_bias": (False, {False})}
NO_BIASES = NO_BIAS | {"mlp_bias": (False, {False})}
OLMO = SIZES | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
AFTER = {"qk_norm": "all", "norms": "post"}
CAUSAL = {"use_bidirectional_attention": (None, {None, False})}
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
DINOV2 = ENCODER | {
    "patch_size": 14,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
}
REGISTERS = DINOV2 | {"patch_size": 16, "num_register_tokens": 4}
DINOV3 = ENCODER | {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "num_register_tokens": 0,
}
DINOV3_FIXED = {"use_gated_mlp": (False, {False}), "key_bias": (False, {False})}
DINOV3_FIXED |= dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), (True, {True}))
AIMV2 = ENCODER | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "patch_size": 14,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "mlp_bias": False,
}
INTERNVIT = ENCODER | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "attention_bias": False,
    "use_qk_norm": False,
}
IDEFICS = {
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
}
IDEFICS_FIXED = {"alpha_type": ("float", {"float"}), "hidden_act": ("silu", {"silu", "swish"})}
# the last two are read in convert/idefics.py; the four before them stand in what its authors saved
IDEFICS_INERT = frozenset(
    "alpha_initializer alphas_initializer_range freeze_text_layers freeze_lm_head"
    " freeze_text_module_exceptions freeze_vision_layers freeze_vision_module_exceptions"
    " cross_layer_activation_function ffn_dim max_new_tokens word_embed_proj_dim"
    " vision_config perceiver_config".split()
)
# the first two are read in convert/mllama.py; its class ties nothing
MLLAMA_INERT = frozenset(
    "text_config vision_config image_token_index image_token_id tie_word_embeddings".split()
)
IMAGES = {"num_channels": (3, {3})}
ONE_BIAS = {"qkv_bias": (True, {True})}

KINDS = {
    "llama": Kind("llama", "llm", SIZES, NO_BIASES, Rotary(), note="no biases"),
    "mistral": Kind("llama", "llm", MISTRAL | {"sliding_window": 4096}, rotary=Rotary()),
    "ministral": Kind("llama", "llm", MISTRAL | LAYERS, rotary=Rotary()),
    "ministral3": Kind(
        "llama",
        "llm",
        MISTRAL
        | {
            "vocab_size": 131072,
            "num_hidden_layers": 34,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        rotary=Rotary(queries=MINISTRAL3),
        note="positions by yarn",
    ),
    "qwen2": Kind("llama", "llm", QWEN2 | SOME_SLIDE, {}, Rotary(), {"qkv_bias": True}),
    "qwen3": Kind(
        "llama",
        "llm",
        QWEN2 | SOME_SLIDE | {"head_dim": 128},
        NO_BIAS,
        Rotary(),
        {"qk_norm": "head"},
        "no biases",
    ),
    "smollm3": Kind(
        "llama",
        "llm",
        SIZES
        | LAYERS
        | {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "use_sliding_window": False,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        NO_BIASES,
        Rotary(2e6),
        note="no biases",
        silent=frozenset({"max_window_layers"}),
    ),
    "olmo2": Kind("olmo2", "llm", OLMO, NO_BIAS, Rotary(), AFTER, "no biases"),
    "olmo3": Kind("olmo2", "llm", OLMO | LAYERS, NO_BIAS, Rotary(5e5, 5e5), AFTER, "no biases"),
    "gemma": Kind(
        "llama",
        "llm",
        GEMMA,
        NO_BIAS | CAUSAL,
        Rotary(),
        {"norms": "pre+1"},
        "no biases, causal",
        frozenset({"hidden_activation"}),
    ),
    "gemma2": Kind(
        "gemma2",
        "llm",
        GEMMA2,
        NO_BIAS | CAUSAL,
        Rotary(),
        {"norms": "both+1"},
        "no biases, causal",
        frozenset({"hidden_act"}),
    ),
    "gemma3_text": Kind(
        "gemma2",
        "llm",
        GEMMA3,
        NO_BIAS
        | {
            "use_bidirectional_attention": (False, {None, False}),
            "attn_logit_softcapping": (None, {None}),
        },
        Rotary(1e6, 1e4),
        {"norms": "both+1", "qk_norm": "head"},
        "no biases, causal, no cap on scores",
    ),
    "granite": Kind("llama", "llm", SIZES | MULTIPLIERS, NO_BIASES, Rotary(), note="no biases"),
    "phi3": Kind(
        "phi3",
        "llm",
        SIZES
        | {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        {"embd_pdrop": (0.0, {0.0})},
        Rotary(share=True, scaled=False),
        note="no longrope",
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
        choices={"qkv_bias": True},
        note="Qwen 1.0",
    ),
    "idefics": Kind(
        "idefics",
        "whole",
        IDEFICS,
        IDEFICS_FIXED,
        Rotary(),
        note="one gate a block",
        silent=IDEFICS_INERT,
    ),
    "mllama": Kind("mllama", "whole", {}, note="blocks at even distances", silent=MLLAMA_INERT),
    "dinov2": Kind("dinov2", "vit", DINOV2, IMAGES | ONE_BIAS),
    "dinov2_with_registers": Kind("dinov2", "vit", REGISTERS, IMAGES | ONE_BIAS),
    "dinov3_vit": Kind("dinov3", "vit", DINOV3, IMAGES | DINOV3_FIXED, note="no gated MLP"),
    "clip_vision_model": Kind("clip", "vit", CLIP, IMAGES),
    "metaclip_2_vision_model": Kind("clip", "vit", CLIP, IMAGES),
    "siglip_vision_model": Kind("siglip", "vit", SIGLIP, IMAGES, note="fixed resolution"),
    "aimv2_vision_model": Kind(
        "aimv2",
        "vit",
        AIMV2,
        IMAGES | {"is_native": (False, {False})},
        note="positions are a table; biases everywhere or nowhere",
    ),
    "internvl_vision": Kind(
        "internvit",
        "vit",
        INTERNVIT,
        IMAGES | {"use_absolute_position_embeddings": (True, {True})},
        note="norms of q and k with an eps of 1e-6",
    ),
}
GGUF = {  # llama.cpp's architectures: family of tables_decoder.py
    "llama": "llama-gguf",
    "qwen2": "gguf",
    "qwen3": "gguf",
    "gemma3": "gemma3-gguf",
}
WHOLE = {
    "aimv2": "aimv2_vision_model",
    "clip": "clip_vision_model",
    "internvl": "internvl_vision",
    "metaclip_2": "metaclip_2_vision_model",
    "siglip": "siglip_vision_model",
}  # their vision_config is read, the rest is no part of it
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
