"""A language model of ours as a class of transformers has it: its model type, and the fields of its
config.json. The inverse of describe.py."""

from typing import Any

from evlm_jax.config import LLMConfig

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # of model_type


def stock_type(llm: LLMConfig) -> str:
    """The model type whose class computes what `llm` says.

    Raises ValueError where none does.
    """
    kind = {
        (False, "none"): "llama",
        (True, "none"): "qwen2",
        (False, "head"): "qwen3",
    }.get((llm.qkv_bias, llm.qk_norm))
    if kind is None:
        raise ValueError(
            "export: no class of transformers has a language model with llm.qkv_bias ="
            f" {llm.qkv_bias} and llm.qk_norm = {llm.qk_norm}: use --format hf or torch"
        )
    return kind


def stock_config(llm: LLMConfig) -> dict[str, Any]:
    """config.json of `stock_type`, but for dtype and ids of tokens."""
    kind = stock_type(llm)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": llm.vocab,
        "hidden_size": llm.hidden,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "intermediate_size": llm.mlp,
        "rms_norm_eps": llm.eps,
        "hidden_act": "silu",
        "rope_theta": llm.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},
        "tie_word_embeddings": llm.tied,
    }
