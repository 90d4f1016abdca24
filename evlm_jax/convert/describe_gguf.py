"""What a GGUF file of llama.cpp's architecture "llama" says about it, in the words of LLMConfig."""

from collections.abc import Callable
from typing import Any

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Source

READ: dict[str, Any] = {  # key behind "llama.": llama.cpp's default, where it has one
    "embedding_length": None,
    "block_count": None,
    "feed_forward_length": None,
    "attention.head_count": None,
    "attention.layer_norm_rms_epsilon": None,
    "attention.head_count_kv": 0,
    "attention.key_length": 0,
    "attention.value_length": 0,
    "rope.dimension_count": 0,
    "rope.freq_base": 10000.0,
    "vocab_size": 0,
}
FIXED = {  # values with which llama.cpp computes what EVLM's decoder does
    "rope.scaling.type": {"none", "linear"},
    "rope.scaling.factor": {0, 1},
    "rope.scale_linear": {0, 1},
    "rope.scaling.attn_factor": {0, 1},
    "expert_count": {0},
    "expert_used_count": {0},
    "attention.sliding_window": {0},
    "attention.causal": {True},
    "tensor_data_layout": {"Meta AI original pth"},
    "use_parallel_residual": {False},
}
INERT = {"context_length", "rope.scaling.original_context_length", "rope.scaling.finetuned"}


def describe_gguf(source: Source, shape: Callable[[str, int], tuple[int, ...]]) -> dict:
    """Fields of LLMConfig that the file fixes.

    Keys of other namespaces (general, tokenizer) say nothing about the function.

    Args:
      shape: (name, rank) of a tensor -> its shape.
    Raises:
      ValueError: keys that are missing, not understood, or say what EVLM's decoder does not have.
    """
    values = _values(source)
    heads, hidden = values["attention.head_count"], values["embedding_length"]
    vocab = shape("token_embd.weight", 2)[0]
    head_dim = values["attention.key_length"] or hidden // max(heads, 1)
    own = {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    if wrong := [
        f"llama.{key} is {values[key]}, not {ours}"
        for key, ours in (own | {"vocab_size": vocab}).items()
        if values[key] not in (0, ours)
    ]:
        raise ValueError(f"{source.path}: {', '.join(wrong)}, which EVLM's decoder does not have")
    eps = np.float32(values["attention.layer_norm_rms_epsilon"])  # stored so
    return {
        "vocab": vocab,
        "hidden": hidden,
        "layers": values["block_count"],
        "heads": heads,
        "kv_heads": values["attention.head_count_kv"] or heads,
        "head_dim": head_dim,
        "mlp": values["feed_forward_length"],
        "rope_theta": float(values["rope.freq_base"]),
        "eps": float(str(eps)),
        "qkv_bias": False,
        "tied": "output.weight" not in source.tensors,
        "dynamic_ntk": 0,
        "logn": 0,
    }


def _values(source: Source) -> dict[str, int | float]:
    """Values of the keys in READ; one that is given for every layer, and is the same in all, as
    one.
    """
    config = {
        key.removeprefix("llama."): value
        for key, value in source.metadata.items()
        if key.startswith("llama.")
    }
    lacks = [key for key, default in READ.items() if default is None and key not in config]
    if lacks:
        raise ValueError(
            f"{source.path}: the GGUF file lacks {', '.join(f'llama.{key}' for key in lacks)};"
            " convert the model again"
        )
    values = {key: _uniform(config.get(key, default)) for key, default in READ.items()}
    wrong = [
        key
        for key, allowed in FIXED.items()
        if key in config and not (np.isscalar(config[key]) and config[key] in allowed)
    ]
    wrong += [key for key in config if key not in READ.keys() | FIXED.keys() | INERT]
    wrong += [key for key, value in values.items() if type(value) not in (int, float) or value < 0]
    if wrong:
        said = ", ".join(f"llama.{key} {config[key]!r}" for key in sorted(wrong))
        raise ValueError(
            f"{source.path}: the GGUF file asks for {said}, which is not understood or not EVLM's"
        )
    return values


def _uniform(value: Any) -> Any:
    """The one value of an array that holds no other; anything else as it is."""
    same = isinstance(value, np.ndarray) and len(value) and (value == value[0]).all()
    return value[0].item() if same else value
