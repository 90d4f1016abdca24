"""Self-attention of rows of text in training and of prompts, in the form of train.attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from evlm_jax.config import EVLMConfig, LLMConfig
from evlm_jax.models.attention import attention, text_mask, within_window
from evlm_jax.ops.fused_attention import fused_attention
from evlm_jax.ops.grouped_attention import attention_form
from evlm_jax.ops.platform import platform
from evlm_jax.parallel.sharding import shard_map_local

TEXT, TEXT_KEYS = ("rows", None, "heads"), ("rows", None, "kv_heads")
# Of a row longer than LONG so many tokens ask at a time: the scores of all are its square. Keys
# behind them are left out as far as PARTS equal parts of the row go.
LONG, ASKING, PARTS = 2048, 128, 4
SHORT = 64  # from so many tokens on shorter rows ask in PARTS on CPUs


def self_attention_op(scale: float = 0.0, cap: float = 0.0, sums: bool = False) -> Callable:
    """`attention` of a device's rows and heads: q [B, T, N, H], k and v [B, C, K, H], mask
    [B, T, C].
    """
    attend = functools.partial(attention, scale=scale, cap=cap, sums=sums)
    outputs = (TEXT, TEXT) if sums else TEXT
    return shard_map_local(attend, (TEXT, TEXT_KEYS, TEXT_KEYS, ("rows",)), outputs)


def text_attention_op(
    cfg: EVLMConfig, until: jax.Array, positions: jax.Array, long: int = LONG
) -> Callable:
    """(number of the layer, q [B, T, N, H], k and v [B, T, K, H]) -> [B, T, N, H], attention of
    tokens at `positions` [B, T] to what they see (`text_mask` of `until` [B, T]) within the layer's
    window; `Sums` (gate.py) where that shares its softmax with images. Rows of more than `long`
    tokens make no array [T, T] of scores, forward or backward.
    """
    llm, length = cfg.llm, until.shape[1]
    form = attention_form(cfg.train.attention, cfg.train.dtype)
    if form == "pallas":
        attend = packed_attention_op(llm)
        return lambda number, q, k, v: attend(q, k, v, until, positions, number)
    if form == "cudnn":
        attend = functools.partial(fused_attention, scale=llm.scales.query)
        attend = shard_map_local(attend, (TEXT, TEXT_KEYS, TEXT_KEYS, ("rows",)), TEXT)
    else:
        attend = self_attention_op(llm.scales.query, llm.scales.score_cap, cfg.xattn.one_softmax)
    if length > long and form == "xla":
        return functools.partial(_in_chunks, llm, attend, until, positions)
    if SHORT <= length and form == "xla" and platform() == "cpu":
        attend = functools.partial(_in_parts, attend)
    mask = text_mask(until)
    return lambda number, q, k, v: attend(q, k, v, within_window(llm, mask, positions, number))


def _in_parts(
    attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attend` of PARTS parts of a row, to the keys up to the end of each (D-OPS-22)."""
    length, out = q.shape[1], []
    for part in range(PARTS):
        first, stop = length * part // PARTS, length * (part + 1) // PARTS
        some = k[:, :stop], v[:, :stop], mask[:, first:stop, :stop]
        out.append(attend(q[:, first:stop], *some))
    return _joined(out)


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Parts of rows, or `Sums` of them, one behind the other."""
    return jax.tree.map(lambda *some: jnp.concatenate(some, 1), *parts)


def packed_attention_op(llm: LLMConfig) -> Callable:
    """`packed_attention` of a device's rows and heads: q [B, T, N, H], k and v [B, T, K, H],
    visible_until and positions [B, T], number of the layer.
    """
    from evlm_jax.ops.packed_attention import packed_attention  # Pallas is slow to import

    attend = functools.partial(
        packed_attention,
        windows=llm.layer_windows,
        scale=llm.scales.query,
        cap=llm.scales.score_cap,
    )
    inputs = (TEXT, TEXT_KEYS, TEXT_KEYS, ("rows",), ("rows",), ())
    return shard_map_local(attend, inputs, TEXT)


def _in_chunks(
    llm: LLMConfig,
    attend: Callable,
    until: jax.Array,
    positions: jax.Array,
    number: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """As `text_attention_op` has it: chunks of queries one after the other, whose scores the
    backward pass makes again.
    """
    rows, length = until.shape
    part, out = ASKING * -(-length // (PARTS * ASKING)), []
    for first in range(0, length, part):
        stop = min(first + part, length)
        count = -(-(stop - first) // ASKING)
        asking = first + jnp.arange(count * ASKING).reshape(count, ASKING)
        spare = ((0, 0), (0, asking.size - (stop - first)), (0, 0), (0, 0))
        cut = jnp.pad(q[:, first:stop], spare).reshape(rows, count, ASKING, *q.shape[2:])

        def some(chunk, stop=stop):
            asking, q = chunk
            mask = (jnp.arange(stop) <= asking[:, None]) & (asking[:, None] < until[:, None, :stop])
            place = jnp.take(positions, asking, 1, mode="clip")
            mask = within_window(llm, mask, positions[:, :stop], number, place)
            return attend(q, k[:, :stop], v[:, :stop], mask)

        done = jax.lax.map(jax.checkpoint(some), (asking, cut.swapaxes(0, 1)))

        def joined(x, count=stop - first):
            return x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :count]

        out.append(jax.tree.map(joined, done))
    return _joined(out)
