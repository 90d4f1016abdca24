"""Floating-point operations that a training step needs, counted from the config (2 per multiply-add). Letters: see config.py.

Needed, not executed: 2ND forward, +2ND where a gradient passes through, +2ND only where weights train. So a frozen ViT costs
2ND, a frozen LLM under trained cross-attention 4ND, trained layers 6ND. Causal attention counts half; the head counts at
supervised positions only; padding counts nothing.
"""

import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig


def vit_flops(cfg: EVLMConfig) -> float:
    """Forward of one image up to the highest tap."""
    vit, s = cfg.vit, cfg.vit.tokens
    block = 2 * s * (4 * vit.width**2 + 2 * vit.width * vit.mlp) + 4 * s * s * vit.width
    return max(vit.taps) * block + 2 * vit.grid**2 * vit.patch**2 * 3 * vit.width


def llm_flops_per_token(cfg: EVLMConfig) -> float:
    """Forward of all layers for one token, attention scores and head left out."""
    llm = cfg.llm
    attn = llm.hidden * llm.head_dim * (2 * llm.heads + 2 * llm.kv_heads)
    return 2 * llm.layers * (attn + 3 * llm.hidden * llm.mlp)


def xattn_flops_per_token(cfg: EVLMConfig) -> float:
    """Forward of all cross-attention blocks for one text token, scores left out."""
    x, d, moe = cfg.xattn, cfg.llm.hidden, cfg.moe
    ffn = 2 * d * x.ffn * (1 + moe.top_k / moe.slices) + d * moe.experts if moe.copies else 2 * d * x.ffn
    return 2 * len(cfg.cross_layers) * (2 * d * x.heads * x.head_dim + ffn)


def real_tokens(batch: Batch) -> np.ndarray:
    """bool [B, T]: positions that are not padding."""
    return (batch.positions > 0) | (batch.seen_until > np.arange(batch.tokens.shape[1]) + 1)


def seen_images(batch: Batch) -> int:
    """Image slots that some token sees."""
    padding = batch.pair_tile.shape[1]
    return sum(len(np.unique(row[tile < padding])) for row, tile in zip(batch.pair_image, batch.pair_tile, strict=True))


def train_flops(cfg: EVLMConfig, batch: Batch) -> float:
    """FLOPs needed by forward and backward of a batch of NumPy arrays, with the towers frozen and cross-attention trained."""
    llm, layers, width = cfg.llm, len(cfg.cross_layers), cfg.xattn.heads * cfg.xattn.head_dim
    real = real_tokens(batch)
    targets = (batch.targets >= 0).sum()
    seen = (batch.visible_stop - batch.visible_start).sum()
    images = seen_images(batch)
    text = 2 * llm_flops_per_token(cfg) * real.sum()
    scores = 2 * 4 * llm.layers * llm.heads * llm.head_dim * (batch.positions + 1)[real].sum()
    head = 2 * 2 * llm.hidden * llm.vocab * targets
    cross = 3 * xattn_flops_per_token(cfg) * real.sum() + 3 * 4 * layers * width * cfg.vit.tokens * seen
    keys = 2 * 2 * layers * 2 * cfg.vit.width * width * cfg.vit.tokens * images  # no gradient into a frozen tower
    vision = 0.0 if batch.pixels is None else vit_flops(cfg) * images
    return float(text + scores + head + cross + keys + vision)
