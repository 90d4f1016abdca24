"""A language model of ours as a class of transformers has it: its model type, and the fields of its
config.json.

Types are tried in turn; the first whose config.json, read again, says the same is taken, so that
nothing is lost on the way."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evlm_jax.config import LLMConfig
from evlm_jax.convert.describe_decoder import FULL, SLIDING, describe_decoder
from evlm_jax.convert.families import KINDS

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
}  # of model_type
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def stock_config(llm: LLMConfig) -> dict[str, Any]:
    """config.json without dtype and ids of tokens. What Qwen 1.0 does beyond its context is left
    out: no class has it.

    Raises:
      ValueError: no class of transformers computes what `llm` says; fields that differ from Llama's
        are named.
    """
    plain = dataclasses.replace(llm, dynamic_ntk=0, logn=0)
    for config in _candidates(plain):
        try:
            found = describe_decoder(Path(config["model_type"]), config)
        except ValueError:
            continue
        if found == dataclasses.asdict(plain):
            return config
    other = [
        f"llm.{field.name} = {getattr(llm, field.name)!r}"
        for field in dataclasses.fields(llm)
        if field.default is not dataclasses.MISSING and getattr(llm, field.name) != field.default
    ]
    raise ValueError(
        f"export: no class of transformers has a language model with {', '.join(other)} and"
        f" llm.qkv_bias = {llm.qkv_bias}: use --format hf or torch"
    )


def _candidates(llm: LLMConfig) -> Iterator[dict[str, Any]]:
    """`llm` as every type would say it."""
    for name, architecture in CLASSES.items():
        fields = _fields(llm) | _layers(llm) | _scales(llm)
        fields |= rope_fields(llm, KINDS[name].rotary.near is not None)
        known = KINDS[name].read.keys() | {"rope_theta", "rope_parameters"}
        known |= {"max_position_embeddings"}
        if "layer_types" in known and not fields["sliding_window"]:
            del fields["sliding_window"]  # some classes ask for one even where no layer has it
        yield {"architectures": [architecture], "model_type": name} | {
            key: value for key, value in fields.items() if key in known
        }


def _fields(llm: LLMConfig) -> dict[str, Any]:
    activation = ACTIVATIONS[llm.activation]
    return {
        "vocab_size": llm.vocab,
        "hidden_size": llm.hidden,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "intermediate_size": llm.mlp,
        "rms_norm_eps": llm.eps,
        "hidden_act": activation,
        "hidden_activation": activation,
        "tie_word_embeddings": llm.tied,
    }


def _layers(llm: LLMConfig) -> dict[str, Any]:
    """Windows, and layers without positions."""
    window = max(llm.layer_windows)
    return {
        "sliding_window": window or None,
        "use_sliding_window": window > 0,
        "layer_types": [SLIDING if own else FULL[0] for own in llm.layer_windows],
        "no_rope_layers": [int(base > 0) for base, _ in llm.layer_ropes],
    }


def rope_fields(llm: LLMConfig, by_kind: bool = False) -> dict[str, Any]:
    """Positions, in one table or in one for each kind of layers."""
    far = {"rope_type": "default", "rope_theta": llm.rope_theta}
    if llm.rotary_share != 1:
        far["partial_rotary_factor"] = llm.rotary_share
    if scaling := llm.rope_scaling:
        names = {"factor": "factor"}
        if scaling.kind in ("llama3", "yarn"):
            names |= {"original": "original_max_position_embeddings"}
        if scaling.kind == "llama3":
            names |= {"slow": "low_freq_factor", "fast": "high_freq_factor"}
        if scaling.kind == "yarn":
            names |= {"slow": "beta_slow", "fast": "beta_fast", "attention": "attention_factor"}
            names |= {} if scaling.truncate else {"truncate": "truncate"}
            names |= {"query": "llama_4_scaling_beta"} if scaling.query else {}
        far |= {"rope_type": scaling.kind}
        far |= {theirs: getattr(scaling, ours) for ours, theirs in names.items()}
    known = (
        {"max_position_embeddings": scaling.original}
        if scaling and scaling.kind == "dynamic"
        else {}
    )
    if not by_kind:
        return known | {"rope_theta": llm.rope_theta, "rope_parameters": far}
    near = [
        base for window, (base, _) in zip(llm.layer_windows, llm.layer_ropes, strict=True) if window
    ]
    near = {"rope_type": "default", "rope_theta": near[0] if near else llm.rope_theta}
    return known | {"rope_parameters": {FULL[0]: far, SLIDING: near}}


def _scales(llm: LLMConfig) -> dict[str, Any]:
    """Factors as Granite has them, then as Gemma has them."""
    scales = llm.scales
    return {
        "embedding_multiplier": scales.embedding,
        "residual_multiplier": scales.residual,
        "attention_multiplier": scales.query or llm.head_dim**-0.5,
        "logits_scaling": scales.logits,
        "query_pre_attn_scalar": round((scales.query or llm.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": scales.score_cap or None,
        "final_logit_softcapping": scales.logit_cap or None,
    }
