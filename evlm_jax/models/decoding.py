"""The model with caches: prefill reads prompts, decode adds tokens one at a time. Composition of the same blocks as evlm.py.

    slot of a key = position of its token     prompts  a b c . .      lengths 3 and 5, padded on the right
                                                       d e f g h      the first new token of row 0 overwrites slot 3
A query at position p sees the slots <= p, so padding is overwritten before anything can see it. Cross-attention keys depend
on the images alone: they are projected once, and after prefill only the range that the last token sees is kept.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.attention import attention
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.layers import Linear, rope_tables
from evlm_jax.ops.grouped_attention import Plan, grouped_attention
from evlm_jax.ops.packed import Packed, compute_dtype, logits, pack, pack_head

CHUNK = 64  # most tokens of one call of `decode`


class Weights(NamedTuple):
    """What decoding reads of a model; the layers stay stacked."""

    embed: jax.Array  # [vocab, D]
    media: jax.Array  # [media tokens, D]
    layers: nnx.Module  # llm.Block
    crosses: nnx.Module  # xattn.Block
    ln_f: nnx.Module
    head: Packed

    @classmethod
    def of(cls, model: EVLM, dtype: str) -> "Weights":
        """Of a model, with matrices of `dtype`."""
        llm = model.llm
        head = llm.embed[...].T if llm.head is None else llm.head.kernel[...]
        layers, crosses = _pack(llm.layers, dtype), _pack(model.xattn, dtype)
        return cls(llm.embed[...].astype(dtype), model.media.embedding[...], layers, crosses, llm.ln_f, pack_head(head, dtype))


class Prompt(NamedTuple):
    """Prompts padded on the right, with the fields of Batch; each ends where the answer begins."""

    tokens: jax.Array  # [B, T]
    media_slot: jax.Array  # [B, T]
    length: jax.Array  # [B]; 0 in a row that is padding
    plan: Plan
    image: jax.Array  # [B, I] row of `taps` that fills each image slot
    visible_start: jax.Array  # [B] first image slot that the last token sees
    visible: jax.Array  # [B] how many it sees


class Sampling(NamedTuple):
    """How tokens are chosen."""

    temperature: jax.Array  # [], 0 is greedy
    top_p: jax.Array  # []
    stop: jax.Array  # [any] ids that end an answer


class DecodeState(NamedTuple):
    """All that changes while answers grow. C: slots of the cache; R: image slots that can still be seen; X: cross-attention blocks."""

    token: jax.Array  # [B] int32, chosen but not yet read
    position: jax.Array  # [B] int32, its position
    done: jax.Array  # [B] bool, `token` ends the answer
    random: jax.Array  # [B] PRNG keys
    visible: jax.Array  # [B] int32, how many of the R images are seen
    self_kv: tuple[jax.Array, jax.Array]  # [L, B, C, K, H]
    cross_kv: tuple[jax.Array, jax.Array]  # [X, B, R, S, N, H]

    @classmethod
    def spec(cls, cfg: EVLMConfig, rows: int, slots: int, images: int) -> "DecodeState":
        """Shapes and dtypes, for planning and ahead-of-time compilation."""
        shape, dtype = jax.ShapeDtypeStruct, compute_dtype(cfg.train.dtype)
        ints, key = shape((rows,), jnp.int32), jax.eval_shape(jax.random.key, 0).dtype
        text = shape((cfg.llm.layers, rows, slots, cfg.llm.kv_heads, cfg.llm.head_dim), dtype)
        cross = shape((len(cfg.cross_layers), rows, images, cfg.vit.tokens, cfg.xattn.heads, cfg.xattn.head_dim), dtype)
        return cls(ints, ints, shape((rows,), jnp.bool), shape((rows,), key), ints, (text, text), (cross, cross))


def prefill(cfg: EVLMConfig, weights: Weights, prompt: Prompt, taps: jax.Array, random: jax.Array, how: Sampling, slots: int, images: int):
    """Reads the prompts and chooses the first token of each answer. Arguments as in `read_prompts`."""
    return _choose(*read_prompts(cfg, weights, prompt, taps, random, slots, images), how)


def decode(cfg: EVLMConfig, weights: Weights, state: DecodeState, how: Sampling, limit: jax.Array):
    """Up to `limit` <= CHUNK further tokens of every answer; ends early when all are done.

    Returns:
      (state, tokens [B, CHUNK]), the tokens -1 where an answer had ended or nothing was computed.
    """

    def going(carry):
        i, state, _ = carry
        return (i < limit) & ~state.done.all()

    def step(carry):
        i, state, out = carry
        ended = state.done
        state = _choose(*read_tokens(cfg, weights, state), how)
        return i + 1, state, out.at[:, i].set(jnp.where(ended, -1, state.token))

    empty = jnp.full((len(state.token), CHUNK), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(going, step, (jnp.int32(0), state, empty))
    return state, out


def read_prompts(cfg: EVLMConfig, weights: Weights, prompt: Prompt, taps: jax.Array, random: jax.Array, slots: int, images: int):
    """Fills the caches.

    Args:
      taps: [n, G, S, V] of all images.
      random: [B] PRNG keys.
      slots: C of the state; at least T.
      images: R of the state; at least the largest prompt.visible.
    Returns:
      (logits [B, vocab] behind each prompt, the state without a token)
    """
    rows, length = prompt.tokens.shape
    dtype = compute_dtype(cfg.train.dtype)
    cross = project(cfg, weights, taps.astype(dtype), prompt.image)
    cache = jnp.zeros((cfg.llm.layers, rows, slots, cfg.llm.kv_heads, cfg.llm.head_dim), dtype)
    media = weights.media[jnp.maximum(prompt.media_slot, 0)].astype(dtype)
    x = jnp.where(prompt.media_slot[..., None] >= 0, media, weights.embed[prompt.tokens].astype(dtype))
    x, cache = _decoder(cfg, weights, x, jnp.zeros(rows, jnp.int32), length, (cache, cache), cross, prompt.plan)
    slot = jnp.minimum(prompt.visible_start[:, None] + jnp.arange(images), prompt.image.shape[1] - 1)  # [B, R]
    kept = jax.tree.map(lambda a: jnp.take_along_axis(a, slot[None, :, :, None, None, None], axis=2), cross)
    last = x[jnp.arange(rows), prompt.length - 1]
    state = DecodeState(jnp.zeros(rows, jnp.int32), prompt.length - 1, prompt.length <= 0, random, prompt.visible, cache, kept)
    return logits(weights.head, last, cfg.llm.vocab), state


def read_tokens(cfg: EVLMConfig, weights: Weights, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Reads `token` of each row: (logits [B, vocab], state). The images kept are a plan of one tile of one token a row."""
    rows, images = len(state.token), state.cross_kv[0].shape[2]
    number = jnp.broadcast_to(jnp.arange(images), (rows, images))
    zero = jnp.zeros((rows, 1), jnp.int32)
    plan = Plan(zero[..., None], zero, jnp.where(number < state.visible[:, None], 0, 1), number)
    x = weights.embed[state.token][:, None].astype(compute_dtype(cfg.train.dtype))
    x, cache = _decoder(cfg, weights, x, state.position, state.self_kv[0].shape[2], state.self_kv, state.cross_kv, plan)
    return logits(weights.head, x[:, 0], cfg.llm.vocab), state._replace(self_kv=cache)


def sample(logits: jax.Array, random: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token of each row of logits [B, vocab]: the best where temperature is 0, else drawn from the smallest set of best tokens
    that together have probability `top_p` (nucleus sampling, arXiv 1904.09751). `random`: [B] PRNG keys."""

    def draw(row, key):
        scaled = row / temperature
        best = jnp.sort(scaled, descending=True)
        probability = jax.nn.softmax(best)
        inside = jnp.cumsum(probability) - probability < top_p  # the mass in front of a token; the best one is always inside
        floor = jnp.min(jnp.where(inside, best, jnp.inf))
        return jax.random.categorical(key, jnp.where(scaled >= jnp.minimum(floor, best[0]), scaled, -jnp.inf))

    greedy = lambda: jnp.argmax(logits, -1)
    return jax.lax.cond(temperature > 0, lambda: jax.vmap(draw)(logits, random), greedy).astype(jnp.int32)


def project(cfg: EVLMConfig, weights: Weights, taps: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of every cross-attention block: taps [n, G, S, V], image [B, I] -> [X, B, I, S, N, H]."""
    number = jnp.array(cfg.tap_of_cross_layer)
    each = lambda i: _block(weights.crosses, i).keys_values(taps[:, number[i]])
    return jax.tree.map(lambda a: a[:, image], jax.lax.map(each, jnp.arange(len(cfg.cross_layers))))


def _choose(logits: jax.Array, state: DecodeState, how: Sampling) -> DecodeState:
    """The next token of each row from its logits [B, vocab]; a row that is done keeps its token."""
    keys = jax.vmap(jax.random.fold_in)(state.random, state.position)
    token = jnp.where(state.done, state.token, sample(logits, keys, how.temperature, how.top_p))
    return state._replace(token=token, position=state.position + ~state.done, done=state.done | jnp.isin(token, how.stop))


def _decoder(cfg: EVLMConfig, weights: Weights, x: jax.Array, start: jax.Array, window: int, cache, cross, plan: Plan):
    """All layers over T tokens that follow `start` [B] cached ones: x [B, T, D] -> hidden [B, T, D], cache with the new keys.

    `window`: slots that may hold visible keys, i.e. the first ones.
    """
    positions = start[:, None] + jnp.arange(x.shape[1])
    rope = rope_tables(positions, cfg.llm.head_dim, cfg.llm.rope_theta)
    mask = jnp.arange(window) <= positions[..., None]
    every = cfg.xattn.every

    def layer(number, x, cache):
        def attend(q, k, v):
            nonlocal cache
            cache = _write(cache[0], k, number, start), _write(cache[1], v, number, start)
            keys, values = (jax.lax.dynamic_index_in_dim(c, number, 0, False)[:, :window] for c in cache)
            return attention(q, keys, values, mask)

        return _block(weights.layers, number)(x, rope, attend), cache

    def group(index, carry, count):
        x, cache = carry
        k, v = (jax.lax.dynamic_index_in_dim(a, index, 0, False) for a in cross)
        x = _block(weights.crosses, index)(x, lambda q: grouped_attention(q, k, v, plan, cfg.xattn.sinks))
        for i in range(count):
            x, cache = layer(index * every + i, x, cache)
        return x, cache

    full, rest = divmod(cfg.llm.layers, every)
    x, cache = jax.lax.fori_loop(0, full, partial(group, count=every), (x, cache))
    x, cache = group(full, (x, cache), rest) if rest else (x, cache)
    return weights.ln_f(x), cache


def _write(cache: jax.Array, new: jax.Array, layer: jax.Array | int, start: jax.Array) -> jax.Array:
    """`new` [B, T, K, H] into cache [L, B, C, K, H], from slot start[b] on; row by row, which XLA does in place."""
    for row in range(len(new)):
        cache = jax.lax.dynamic_update_slice(cache, new[None, row : row + 1].astype(cache.dtype), (layer, row, start[row], 0, 0))
    return cache


def _pack(stack: nnx.Module, dtype: str) -> nnx.Module:
    """A stack of blocks with a Packed in place of each Linear."""

    def convert(leaf):
        if not isinstance(leaf, Linear):
            return leaf
        return Packed(pack(leaf.kernel[...], dtype), None if leaf.bias is None else leaf.bias[...])

    return jax.tree.map(convert, stack, is_leaf=lambda leaf: isinstance(leaf, Linear))


def _block(stack: nnx.Module, layer: jax.Array | int) -> nnx.Module:
    """One block of a stack; its Packed read their weights where they lie."""

    def pick(leaf):
        return dataclasses.replace(leaf, layer=layer) if isinstance(leaf, Packed) else leaf[layer]

    return jax.tree.map(pick, stack, is_leaf=lambda leaf: isinstance(leaf, Packed))
