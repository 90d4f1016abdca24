"""EVLM beside its baselines on one video: what is compared, and what each needs, counted from the
config.

A case is one row: F frames and then text that sees all of them, read once (prefill) and answered
token by token (decode). Each frame is an image of its own for the ViT and has its own media tokens.
Were the frames separate images, text would see the last one only, and EVLM would keep the keys of
that one alone."""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from evlm_jax import flops
from evlm_jax.config import EVLMConfig, Phase, Rule
from evlm_jax.flops import Work, near_pairs
from evlm_jax.models.decoding import DecodeState

EVLM, LLAVA, FLAMINGO = "evlm", "llava", "flamingo"
FROZEN = Phase(rules=(Rule("^(xattn|media|bridge)/", 1.0), Rule("^(vit|llm)/", None)))


class Cache(NamedTuple):
    """Bytes that an answer keeps of its prompt."""

    own: int  # keys and values of the language model
    cross: int  # of cross-attention

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self)


def counterparts(cfg: EVLMConfig) -> dict[str, EVLMConfig]:
    """`cfg` and its baselines at the same towers, each by at most three other fields; a mixture of
    experts is left out of llava's.

    Raises:
      ValueError: `cfg` is a baseline itself.
    """
    if cfg.baseline:
        raise ValueError(
            f"config: {cfg.name} is a baseline ({cfg.baseline}); give EVLM's, its baselines are"
            " made of it"
        )
    bridge, media = (
        lambda kind: replace(cfg.bridge, kind=kind),
        lambda tokens: replace(cfg.media, tokens=tokens),
    )
    patches, none = media(cfg.vit.patches), replace(cfg.xattn, every=0)
    return {
        EVLM: cfg,
        LLAVA: replace(
            cfg, bridge=bridge(LLAVA), xattn=none, media=patches, moe=replace(cfg.moe, copies=0)
        ),
        FLAMINGO: replace(cfg, bridge=bridge(FLAMINGO), media=media(1)),
    }


def case(cfg: EVLMConfig, frames: int, text: int, rows: int = 1) -> EVLMConfig:
    """`cfg` on one device with `rows` rows of one video each, encoded before; in training all text
    is supervised, and towers are frozen.
    """
    media = cfg.media.tokens
    sizes = {
        "length": frames * media + text,
        "images": frames,
        "slots": frames,
        "image_group": 1,
        "block_pairs": _block_pairs(media, frames, text, cfg.query_block),
        "targets": text,
    }
    return replace(
        cfg,
        data=replace(cfg.data, **sizes, cache_features=True),
        train=replace(cfg.train, batch=rows, accumulate=1),
        optim=replace(cfg.optim, phases=(FROZEN,)),
        mesh=replace(cfg.mesh, data=1, fsdp=1, expert=1, tensor=1, slices=1),
    )


def _block_pairs(media: int, frames: int, text: int, query_block: int) -> int:
    """Block pairs as ops/attention_plan.py has them; without cross-attention as many as
    frames, the least there can be.
    """
    if not query_block:
        return frames

    def blocks(tokens):
        return math.ceil(tokens / query_block)

    return (
        frames * (blocks(media) + blocks(text)) if frames > 1 else blocks(media + text)
    )  # one frame is seen by all alike


def cache(cfg: EVLMConfig) -> Cache:
    """Cache of one row of a case, in train.dtype, as on accelerators; CPUs have float32."""
    spec, size = (
        DecodeState.spec(cfg, 1, cfg.data.length, cfg.data.images),
        jnp.dtype(cfg.train.dtype).itemsize,
    )

    def held(*arrays):
        return sum(math.prod(a.shape) * size for a in arrays if a is not None)

    return Cache(held(*spec.self_keys, *spec.self_values), held(spec.cross_keys, spec.cross_values))


def prefill_flops(cfg: EVLMConfig) -> float:
    """Needed by a case's prefill behind the ViT: bridge, keys and values, cross-attention, language
    model, head of one position.
    """
    return _forward(cfg, Work.video(cfg, 1)._replace(encoded=0, targets=1))


def media_scores(cfg: EVLMConfig) -> float:
    """FLOPs of prefill's self-attention among media tokens, (16 F)^2 / 2 pairs in the paper."""
    media = cfg.data.images * cfg.media.tokens
    near = near_pairs(cfg.llm, np.arange(media))
    return flops.needed(cfg, (), Work(0, media * (media + 1) / 2, 0, 0, 0, 0, near))[
        flops.LLM_SCORES
    ].forward


def encode_flops(cfg: EVLMConfig) -> float:
    """Needed by the ViT for a case's frames."""
    return _forward(cfg, Work(0, 0, 0, cfg.data.images, 0, 0))


def decode_flops(cfg: EVLMConfig) -> float:
    """Needed by one token behind a case's prompt."""
    near = near_pairs(cfg.llm, np.array([cfg.data.length - 1]))
    return _forward(cfg, Work(1, cfg.data.length, 0, 0, cfg.data.images, 1, near))


def matrix_bytes(cfg: EVLMConfig) -> float:
    """Bytes of the matrices that a token of an answer reads: every element is multiplied once."""
    return _forward(cfg, Work(1, 0, 0, 0, 0, 1)) / 2 * jnp.dtype(cfg.train.operands).itemsize


def decode_bytes(cfg: EVLMConfig, rows: int = 1) -> float:
    """Read by one token of an answer, where `rows` are answered together: its cache, and its share
    of the matrices, each read once.

    Of a mixture of experts, as if all rows chose the same.
    """
    return matrix_bytes(cfg) / rows + cache(cfg).total


def _forward(cfg: EVLMConfig, work: Work) -> float:
    return sum(cost.forward for cost in flops.needed(cfg, (), work).values())


MEASURES = {
    "KV bytes": lambda cfg: cache(cfg).total,
    "prefill FLOPs": prefill_flops,
    "decode bytes": decode_bytes,
    "decode bytes, 8 rows": partial(decode_bytes, rows=8),
}


def needs(cfg: EVLMConfig) -> dict:
    """All figures above of a case, for JSON."""
    return {
        "cache": cache(cfg)._asdict(),
        "prefill": prefill_flops(cfg),
        "media scores": media_scores(cfg),
        "encode": encode_flops(cfg),
        "decode": decode_flops(cfg),
        "decode bytes": decode_bytes(cfg),
        "matrix bytes": matrix_bytes(cfg),
    }
