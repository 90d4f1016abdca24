"""Rotary positions of the language model: each layer's frequencies, scaled or plain, or none.

A config has few ropes: one in Llama, a near and a far one in Gemma 3, one or none in SmolLM3.
Tables of all are made once, and every layer picks its own by number. They are scaled as in
transformers' modeling_rope_utils.py."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.config import EVLMConfig, LLMConfig
from evlm_jax.config.model import RopeScaling


class Rope(NamedTuple):
    """What turns tokens by their positions."""

    cos: jax.Array
    sin: jax.Array
    queries: jax.Array | None = None  # [B, T, 1, 1], by which queries grow with their positions


def rope_tables(cfg: LLMConfig, positions: jax.Array, theta: jax.Array | None = None) -> Rope:
    """cos and sin, float32 [R, B, T, 1, r/2], of integer positions [B, T], for each of the R ropes
    that layers of `cfg` have; r of a head's dimensions turn. Queries grow alike in all of them.

    `theta`: [B, 1, 1, 1], a base for each row in place of rope_theta.
    """
    tables = []
    for base, scaled in dict.fromkeys(cfg.layer_ropes):
        own = base if theta is None else theta
        if scaled and cfg.rope_scaling.kind == "dynamic":
            own = own * _growth(cfg, positions)
        inverse = frequencies(cfg, own, scaled)
        angle = positions[..., None, None].astype(jnp.float32) * inverse
        factor = cfg.rope_scaling.attention if scaled else 1.0
        tables.append([f(angle) if factor == 1 else f(angle) * factor for f in (jnp.cos, jnp.sin)])
    scaling, queries = cfg.rope_scaling, None
    if scaling is not None and scaling.query:
        contexts = (positions // scaling.original).astype(jnp.float32)[..., None, None]
        queries = 1 + scaling.query * jnp.log1p(contexts)
    return Rope(*(jnp.stack(one) for one in zip(*tables, strict=True)), queries)


def layer_rope(cfg: LLMConfig, tables: Rope, number: jax.Array | int) -> Rope:
    """The tables of one layer, [B, T, 1, r/2], out of `rope_tables`."""
    kinds = list(dict.fromkeys(cfg.layer_ropes))
    which = jnp.array([*map(kinds.index, cfg.layer_ropes)])[number] if len(kinds) > 1 else 0
    return tables._replace(cos=tables.cos[which], sin=tables.sin[which])


def frequencies(cfg: LLMConfig, base: float | jax.Array, scaled: bool) -> jax.Array:
    """Angles by which the dimensions of a head turn at each position, [r/2]; [.., 1, 1, r/2] for
    bases [.., 1, 1]. A base of 0 turns nothing.
    """
    width = cfg.rotary_width
    if isinstance(base, float) and not base:
        return jnp.zeros(width // 2)
    inverse = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return _scaled(cfg.rope_scaling, inverse, base, width) if scaled else inverse


def _growth(cfg: LLMConfig, positions: jax.Array) -> jax.Array:
    """What the base of each token is multiplied by, [B, T, 1, 1], by the length of its document,
    which begins where positions [B, T] are 0: of a branching one by its longest dialog. D-GEN-12.
    """
    scaling, width = cfg.rope_scaling, cfg.rotary_width
    document = jnp.cumsum(positions == 0, 1)
    last = jax.vmap(partial(jax.ops.segment_max, num_segments=positions.shape[1] + 1))(
        positions, document
    )
    length = jnp.take_along_axis(last, document, 1)[..., None, None] + 1
    times = jnp.maximum(length / scaling.original, 1)
    return (scaling.factor * times - (scaling.factor - 1)) ** (width / (width - 2))


def _scaled(scaling: RopeScaling, inverse: jax.Array, base: float, width: int) -> jax.Array:
    """Frequencies [r/2] between those of plain positions, which fast ones keep, and those of
    positions divided by `factor`.
    """
    if scaling.kind == "dynamic":
        return inverse  # the base has grown instead
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "llama3":  # by turns within the original context
        turns = scaling.original / (2 * math.pi) * inverse
        kept = jnp.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)
    else:  # yarn: by number, between those that turn `fast` and `slow` times

        def number(turns):
            return width * math.log(scaling.original / (turns * 2 * math.pi)) / 2 / math.log(base)

        first, last = number(scaling.fast), number(scaling.slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        span = last - first or 0.001
        kept = 1 - jnp.clip((jnp.arange(width // 2) - first) / span, 0, 1)
    return inverse / scaling.factor * (1 - kept) + inverse * kept


def image_turns(
    cfg: EVLMConfig,
    media_slot: jax.Array,
    slot: jax.Array,
    positions: jax.Array,
    shape: tuple[int, int],
) -> Callable[[jax.Array, jax.Array | int], jax.Array]:
    """`key_turns` of a batch, whose images have the positions of their first media tokens.

    Args:
      media_slot: [B, T] as `positions`, of Batch; `slot`: the image slot of media tokens.
      shape: C and I.
    """
    if not cfg.xattn.key_rotary:
        return key_turns(cfg, positions)
    groups, images = shape
    place = jnp.where(media_slot == 0, slot, images).reshape(groups, -1)  # `images`: dropped
    at = jnp.zeros(shape, positions.dtype)
    at = at.at[jnp.arange(groups)[:, None], place].set(positions.reshape(groups, -1), mode="drop")
    return key_turns(cfg, at)


def key_turns(
    cfg: EVLMConfig, at: jax.Array, theta: jax.Array | None = None
) -> Callable[[jax.Array, jax.Array | int], jax.Array]:
    """A function (keys [C, I, S', K, H], number of their cross-attention block) -> the keys, turned
    by the positions `at` [C, I] of their images, where `cfg` has that (mPLUG-Owl3's MI-Rope).

    `theta`: as of `rope_tables`.
    """
    if not cfg.xattn.key_rotary:
        return lambda keys, number: keys
    tables, layers = rope_tables(cfg.llm, at, theta), jnp.array(cfg.cross_layers)

    def turn(keys: jax.Array, number: jax.Array | int) -> jax.Array:
        cos, sin, _ = layer_rope(cfg.llm, tables, layers[number])
        return rotate(keys, Rope(cos[..., None, :], sin[..., None, :]))

    return turn


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Half-split (NeoX) rotation of the first r dimensions of x [B, T, N, H], in float32."""
    cos, sin, _ = rope
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


def rotate_queries(q: jax.Array, rope: Rope) -> jax.Array:
    """`rotate` of queries, which may grow as well."""
    q = rotate(q, rope)
    return q if rope.queries is None else (q * rope.queries).astype(q.dtype)
