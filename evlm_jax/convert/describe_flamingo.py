"""What a checkpoint of open_flamingo 2.0.1 says of the model, in the words of XAttnConfig and
BridgeConfig.

It is a state dict of what open_flamingo trains: resampler, gated blocks and word embeddings. Vision
tower and language model are folders of their own. Its code has one size of everything but the
towers, so that names and shapes tell the rest."""

import re
from typing import Any

from evlm_jax.checkpoint.lazy_tensors import Source
from evlm_jax.config import EVLMConfig
from evlm_jax.config.xattn import PLAIN

ATTENTION = {"heads": 8, "head_dim": 64}
BLOCK = r"lang_encoder\.(.+)\.(\d+)\.gated_cross_attn_layer\.attn_gate"
LAYERS = "model.layers"  # of a Llama, and of every decoder with Llama's names


def fields(every: int, ffn: int) -> dict[str, dict[str, Any]]:
    """Fields of EVLMConfig by section that open_flamingo fixes, with a block of FFN `ffn` before
    every `every`-th layer.
    """
    block = {"kv_heads": 8, "ffn": ffn, "every": every, "first": every - 1}
    block |= {"sinks": 0, "eps": 1e-5, "kv_norm": False} | PLAIN
    resampler = {"kind": "flamingo", "latents": 64, "depth": 6, "ffn": 4, "prefix": False}
    return {
        "xattn": ATTENTION | block,
        "bridge": ATTENTION | resampler,
        "media": {"tokens": 1, "sight": "last"},
        "moe": {"copies": 0},
    }


def fields_beside(cfg: EVLMConfig) -> dict[str, dict[str, Any]]:
    """`fields` with the towers of `cfg`, of which the last block is read."""
    taps = {"vit": {"taps": (*cfg.vit.taps[:-1], cfg.vit.depth)}}
    return fields(cfg.xattn.every, 4 * cfg.llm.hidden) | taps


def describe_flamingo(source: Source, prefix: str) -> dict[str, dict[str, Any]]:
    """`fields` of a checkpoint.

    Raises ValueError where its language model is none that EVLM's decoder computes, or it has no
    gated block.
    """
    found = [
        match
        for name in source.tensors
        if (match := re.fullmatch(BLOCK, name.removeprefix(prefix)))
    ]
    if not found:
        raise ValueError(
            f"{source.path}: a resampler without gated blocks: give the state dict that"
            " open_flamingo's filter_state_dict_to_trainable leaves"
        )
    if other := next((match[1] for match in found if match[1] != LAYERS), None):
        raise ValueError(
            f"{source.path}: the gated blocks lie in lang_encoder.{other}: such a language model"
            f" (MPT, GPT-NeoX, OPT) is not EVLM's decoder, which has lang_encoder.{LAYERS}"
        )
    first = min(int(match[2]) for match in found)
    into = source.tensors.get(
        f"{prefix}lang_encoder.{LAYERS}.{first}.gated_cross_attn_layer.ff.1.weight"
    )
    if into is None or len(into.shape) != 2:
        raise ValueError(f"{source.path}: the gated block of layer {first} lacks ff.1.weight")
    return fields(first + 1, into.shape[0])
