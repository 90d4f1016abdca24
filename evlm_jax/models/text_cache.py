"""Keys and values of self-attention while an answer grows: one array for all layers with the same
window, in the order of LLMConfig.layers_of_window.

Slots are a ring: the key of position p has slot p modulo their count. Layers that see all have a
slot for every token of prompt and answer, those with a window of w tokens w slots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from evlm_jax.config import LLMConfig
from evlm_jax.models.text_attention import self_attention_op
from evlm_jax.parallel.sharding import shard_map_local

Caches = tuple[jax.Array, ...]


def sizes(llm: LLMConfig, rows: int, slots: int) -> tuple[list[tuple], list[tuple]]:
    """Shapes of the keys [layers, B, K, H, C] and of the values [layers, B, K, C, H]."""
    rings = [
        ((len(layers), rows, llm.kv_heads), _ring(window, slots))
        for window, layers in llm.layers_of_window.items()
    ]
    return (
        [(*front, llm.head_dim, count) for front, count in rings],
        [(*front, count, llm.head_dim) for front, count in rings],
    )


def _ring(window: int, slots: int) -> int:
    """Slots of a layer with this window, where the text has `slots`."""
    return min(window or slots, slots)


def _held(last: jax.Array, count: int) -> jax.Array:
    """Positions [B, count] of the keys in a ring's slots behind position `last` [B] of the text;
    negative where a slot has none.
    """
    return last[:, None] - (last[:, None] - jnp.arange(count)) % count


def filled(
    llm: LLMConfig, keys: jax.Array, values: jax.Array, length: jax.Array, slots: int
) -> tuple[Caches, Caches]:
    """The caches from keys and values [L, B, T, K, H] of prompts of `length` [B] tokens, with room
    for `slots` tokens.
    """

    def cache(a, layers, count):  # [layers, B, K, C, H]
        a = _of_layers(a, layers).swapaxes(2, 3)
        if count >= a.shape[3]:
            return jnp.pad(a, ((0, 0),) * 3 + ((0, count - a.shape[3]), (0, 0)))
        at = jnp.maximum(_held(length - 1, count), 0)
        return jnp.take_along_axis(a, at[None, :, None, :, None], axis=3)

    rings = [(layers, _ring(window, slots)) for window, layers in llm.layers_of_window.items()]
    return (
        tuple(cache(keys, *ring).swapaxes(3, 4) for ring in rings),
        tuple(cache(values, *ring) for ring in rings),
    )


def attend_op(
    llm: LLMConfig, keys: Caches, values: Caches, position: jax.Array, sums: bool = False
) -> Callable:
    """(number of a layer, q, k, v [B, 1, heads, H] of the tokens at `position` [B]) -> attention to
    what the layer sees of the cache, and to the token itself; `sums` as of models.attention.
    """
    attend = self_attention_op(llm.scales.query, llm.scales.score_cap, sums)

    def ring(keys, values):
        count = values.shape[3]
        own = (jnp.arange(count) == position[:, None] % count)[..., None, None]
        seen = (_held(position, count) >= 0)[:, None]

        def read(number, q, k, v):
            old_k, old_v = layer(keys, values, number)
            return attend(q, jnp.where(own, k, old_k), jnp.where(own, v, old_v), seen)

        return read

    rings = [*map(ring, keys, values)]
    if len(rings) == 1:
        return rings[0]
    of_layer = np.array(
        [
            next((i, own.index(number)) for i, own in enumerate(_windows(llm)) if number in own)
            for number in range(llm.layers)
        ]
    )

    def switch(number, *new):
        which, place = jnp.array(of_layer)[number]
        return jax.lax.switch(which, rings, place, *new)

    return switch


def saved(
    llm: LLMConfig,
    keys: Caches,
    values: Caches,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
) -> tuple[Caches, Caches]:
    """The caches with keys and values [L, B, 1, K, H] of tokens at `position` [B]."""
    caches, new = (None, "rows", "kv_heads"), (None, "rows", None, "kv_heads")
    save = shard_map_local(_save, (caches, caches, new, new, ("rows",)), (caches, caches))
    done = [
        save(a, b, _of_layers(k, own), _of_layers(v, own), position % b.shape[3])
        for a, b, own in zip(keys, values, _windows(llm), strict=True)
    ]
    keys, values = zip(*done, strict=True)
    return keys, values


def _save(
    keys: jax.Array, values: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Caches [L, B, K, H, C] and [L, B, K, C, H] with [L, B, 1, K, H] in `slot` [B]."""
    for row, place in enumerate(slot):  # one small update a row is done in place, a scatter is not
        keys = jax.lax.dynamic_update_slice(
            keys, k[:, row : row + 1, 0, :, :, None].astype(keys.dtype), (0, row, 0, 0, place)
        )
        values = jax.lax.dynamic_update_slice(
            values, v[:, row : row + 1, 0, :, None].astype(values.dtype), (0, row, 0, place, 0)
        )
    return keys, values


def layer(keys: jax.Array, values: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer as `attention` takes them, [B, slots, heads, H]."""

    def one(a):
        return jax.lax.dynamic_index_in_dim(a, number, 0, False)

    return one(keys).transpose(0, 3, 1, 2), one(values).transpose(0, 2, 1, 3)


def _windows(llm: LLMConfig) -> list[tuple[int, ...]]:
    """The layers of each cache."""
    return list(llm.layers_of_window.values())


def _of_layers(a: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """Some layers of a stack; the stack itself where they are all."""
    return a if len(layers) == len(a) else a[np.array(layers)]
