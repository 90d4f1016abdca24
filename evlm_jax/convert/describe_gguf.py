"""What a GGUF file of llama.cpp says about its language model, in the words of LLMConfig."""

from collections.abc import Callable
from typing import Any

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Source
from evlm_jax.convert.describe_decoder import cycle

READ: dict[str, Any] = {  # key behind "llama." or so: llama.cpp's default, where it has one
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
GEMMA3: dict[str, Any] = {  # read besides
    "attention.sliding_window": None,
    "rope.freq_base": 1000000.0,
    "rope.scaling.factor": 0,
    "final_logit_softcapping": 0.0,
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
    arch = source.metadata["general.architecture"]
    values = _values(source, arch)
    heads, hidden = values["attention.head_count"], values["embedding_length"]
    vocab = shape("token_embd.weight", 2)[0]
    head_dim = values["attention.key_length"] or hidden // max(heads, 1)
    own = {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    if wrong := [
        f"{arch}.{key} is {values[key]}, not {ours}"
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
        "qkv_bias": arch == "qwen2",
        "qk_norm": "head" if arch in ("qwen3", "gemma3") else "none",
        "tied": "output.weight" not in source.tensors,
        "dynamic_ntk": 0,
        "logn": 0,
        "rope_scaling": _scaling(source),
    } | (_gemma3(values, head_dim) if arch == "gemma3" else {})


def _gemma3(values: dict[str, int | float], head_dim: int) -> dict[str, Any]:
    """Fields that llama.cpp knows of Gemma 3 by its name: every sixth layer sees all, the others
    have rotary positions of base 10,000; the largest model scales scores by another width.
    """
    hidden, layers = values["embedding_length"], values["block_count"]
    windows = [0 if (i + 1) % 6 == 0 else values["attention.sliding_window"] for i in range(layers)]
    factor = values["rope.scaling.factor"]
    scaling = {"kind": "linear", "factor": float(factor), "layers": "full"}
    width = hidden // values["attention.head_count"] if layers == 62 else head_dim
    return {
        "norms": "both+1",
        "activation": "gelu_tanh",
        "window": cycle(windows),
        "rope": cycle([1e4 if window else values["rope.freq_base"] for window in windows]),
        "rope_scaling": scaling if factor not in (0, 1) else None,
        "scales": {
            "embedding": hidden**0.5,
            "query": width**-0.5,
            "logit_cap": values["final_logit_softcapping"],
        },
    }


def _scaling(source: Source) -> dict[str, Any] | None:
    """RopeScaling of Llama 3.1 to 3.3; the file has nothing of it but the factors of all
    frequencies.

    Whether they are those is looked at where the tensor is dropped (inert.py).
    """
    if "rope_freqs.weight" not in source.tensors:
        return None
    factor = round(float(source.tensors["rope_freqs.weight"].read().max()), 3)
    if factor == 1:
        return None
    return {"kind": "llama3", "factor": factor, "original": 8192, "slow": 1.0, "fast": 4.0}


def _values(source: Source, arch: str) -> dict[str, int | float]:
    """Values of the keys in READ; one that is given for every layer, and is the same in all, as
    one.
    """
    read = READ | (GEMMA3 if arch == "gemma3" else {})
    fixed = {key: allowed for key, allowed in FIXED.items() if key not in read}
    config = {
        key.removeprefix(f"{arch}."): value
        for key, value in source.metadata.items()
        if key.startswith(f"{arch}.")
    }
    lacks = [key for key, default in read.items() if default is None and key not in config]
    if lacks:
        raise ValueError(
            f"{source.path}: the GGUF file lacks {', '.join(f'{arch}.{key}' for key in lacks)};"
            " convert the model again"
        )
    values = {key: _uniform(config.get(key, default)) for key, default in read.items()}
    wrong = [
        key
        for key, allowed in fixed.items()
        if key in config and not (np.isscalar(config[key]) and config[key] in allowed)
    ]
    wrong += [key for key in config if key not in read.keys() | fixed.keys() | INERT]
    wrong += [key for key, value in values.items() if type(value) not in (int, float) or value < 0]
    if wrong:
        said = ", ".join(f"{arch}.{key} {config[key]!r}" for key in sorted(wrong))
        raise ValueError(
            f"{source.path}: the GGUF file asks for {said}, which is not understood or not EVLM's"
        )
    return values


def _uniform(value: Any) -> Any:
    """The one value of an array that holds no other; anything else as it is."""
    same = isinstance(value, np.ndarray) and len(value) and (value == value[0]).all()
    return value[0].item() if same else value
