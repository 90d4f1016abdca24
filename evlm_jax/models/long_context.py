"""Qwen 1.0 beyond the c tokens it was trained with, in generation only: dynamic NTK (c =
llm.dynamic_ntk), logn attention (c = llm.logn).

    base  = theta * alpha ** (H / (H - 2))           rotary base of a prompt of L tokens and of its
                                                     whole answer
    alpha = max(1, 2 ** ceil(log2(L / c) + 1) - 1)   1, 3, 7 up to c, 2 c, 4 c tokens
    query at position i, counted from 1 without padding, times max(1, log(i) / log(c))

An answer that grows beyond c keeps the base of its prompt. Qwen scales queries only while there are
more than c keys, which there are for every query that would change. Source: modeling_qwen.py of
Qwen-14B-Chat. Why in generation only: docs/decisions.md, D-GEN-4."""

import math

import jax
import jax.numpy as jnp

from evlm_jax.config import LLMConfig


def rope_base(cfg: LLMConfig, length: jax.Array) -> jax.Array | None:
    """Lengths [B] of prompts without padding -> float32 [B]; None without dynamic NTK: then every
    base is rope_theta.
    """
    if not cfg.dynamic_ntk:
        return None
    doublings = 32 - jax.lax.clz(
        jnp.maximum(length - 1, 0) // cfg.dynamic_ntk
    )  # ceil(log2(L / c)), at least 0; exact, as log2 is not
    return cfg.rope_theta * ((2 << doublings) - 1).astype(jnp.float32) ** (
        cfg.head_dim / (cfg.head_dim - 2)
    )


def sharpen(cfg: LLMConfig, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries [B, T, N, H] at `positions` [B, T], counted from 0, scaled by logn attention where
    the config has it.
    """
    if not cfg.logn:
        return q
    scale = jnp.maximum(jnp.log(positions + 1.0) / math.log(cfg.logn), 1)
    return (q * scale[..., None, None]).astype(q.dtype)
