"""The model with caches: prefill reads prompts, decode adds tokens one at a time. Composition of
the same blocks as evlm.py.

    slot of a key = position of its token
    prompts  a b c . .   lengths 3 and 5, padded on the right
             d e f g h   the first new token of row 0 overwrites slot 3

A query at position p sees the slots <= p, so padding is overwritten before anything can see it.
Layers with a window keep the window alone (text_cache.py).
Cross-attention keys depend on the images alone and are there before the text is read
(image_cache.py). Caches lie as `attention` multiplies them, and are only read while a token goes
through the layers: its own keys come out at the end.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.config import EVLMConfig
from evlm_jax.models import text_cache
from evlm_jax.models.attention import NEGATIVE
from evlm_jax.models.bridge import write
from evlm_jax.models.decode_weights import Weights
from evlm_jax.models.evlm import cross_attention_op
from evlm_jax.models.image_cache import ImageCache
from evlm_jax.models.llm import finished, scaled
from evlm_jax.models.long_context import rope_base, sharpen
from evlm_jax.models.rotary import key_turns, rope_tables
from evlm_jax.models.sampling import Sampling, sample
from evlm_jax.models.text_attention import self_attention_op, text_attention_op
from evlm_jax.models.trunk import run_layers
from evlm_jax.ops.decode_matmul import compute_dtype, logits
from evlm_jax.ops.grouped_attention import AttentionPlan
from evlm_jax.parallel.sharding import shard

CHUNK = 64  # most tokens of one call of `decode`
LONG = 1024  # tokens; of a longer prompt some ask at a time (text_attention.py)


class Prompt(NamedTuple):
    """Prompts padded on the right, with the fields of Batch; each ends where the answer begins."""

    tokens: jax.Array  # [B, T]
    media_slot: jax.Array  # [B, T]
    length: jax.Array  # [B]; 0 in a row that is padding
    image_slot: jax.Array  # [B, T] of what a media token stands for
    plan: AttentionPlan | None  # None without cross-attention
    visible_start: jax.Array  # [B] first image slot that the last token sees
    visible: jax.Array  # [B] how many it sees


class DecodeState(NamedTuple):
    """All that changes while answers grow.

    C: slots of the text; layers with another window have arrays of their own. X, Z and `there`: as
    of ImageCache."""

    token: jax.Array  # [B] int32, chosen but not yet read
    position: jax.Array  # [B] int32, its position
    done: jax.Array  # [B] bool, `token` ends the answer
    random: jax.Array  # [B] PRNG keys
    visible_start: jax.Array  # [B] int32, the first image slot that is seen
    visible: jax.Array  # [B] int32, how many are seen
    theta: jax.Array | None  # [B] float32, rotary bases by dynamic NTK; None: rope_theta
    self_keys: tuple[jax.Array, ...]  # [layers, B, K, H, C]
    self_values: tuple[jax.Array, ...]  # [layers, B, K, C, H]
    cross_keys: jax.Array | None  # [X, B, K, H, Z]; None without cross-attention
    cross_values: jax.Array | None  # [X, B, K, Z, H]
    seen: jax.Array | None = (
        None  # [B, vocab] bool, tokens of prompt and answer; None without a repetition penalty
    )
    there: jax.Array | None = None  # [B, Z] bool

    @classmethod
    def spec(cls, cfg: EVLMConfig, rows: int, slots: int, images: int) -> "DecodeState":
        """Shapes and dtypes, for planning and ahead-of-time compilation."""
        dtype = compute_dtype(cfg.train.dtype)

        def row(dtype=jnp.int32):
            return jax.ShapeDtypeStruct((rows,), dtype)

        def caches(sizes):
            return tuple(jax.ShapeDtypeStruct(size, dtype) for size in sizes)

        cross = ImageCache.spec(cfg, rows, images)
        own = map(caches, text_cache.sizes(cfg.llm, rows, slots))
        theta = row(jnp.float32) if cfg.llm.dynamic_ntk else None
        each = row(), row(), row(jnp.bool), row(_key_dtype()), row(), row(), theta
        return cls(*each, *own, cross.keys, cross.values, there=cross.there)


@functools.cache  # the cost study asks thousands of times
def _key_dtype():
    return jax.eval_shape(jax.random.key, 0).dtype


def prefill(
    cfg: EVLMConfig,
    weights: Weights,
    prompt: Prompt,
    held: ImageCache | None,
    random: jax.Array,
    sampling: Sampling,
    slots: int,
    images: int,
):
    """Reads the prompts and chooses the first token of each answer.

    Arguments as in `read_prompts`.
    """
    logits, state = read_prompts(cfg, weights, prompt, held, random, slots, images)
    if sampling.repetition_penalty is not None:
        state = state._replace(seen=_seen(prompt, cfg.llm.vocab))
    return _choose(logits, state, sampling)


def decode(
    cfg: EVLMConfig, weights: Weights, state: DecodeState, sampling: Sampling, limit: jax.Array
):
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
        state = _choose(*read_tokens(cfg, weights, state), sampling)
        return i + 1, state, out.at[:, i].set(jnp.where(ended, -1, state.token))

    empty = jnp.full((len(state.token), CHUNK), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(going, step, (jnp.int32(0), state, empty))
    return state, out


def read_images(
    cfg: EVLMConfig,
    weights: Weights,
    taps: jax.Array,
    image: jax.Array,
    place: jax.Array,
    length: jax.Array,
    held: ImageCache | None = None,
    first: jax.Array | int = 0,
) -> ImageCache:
    """What text sees of images.

    Args:
      taps: [n, G, S, V].
      image: [B, c], row of `taps` that fills each of c slots.
      place: [B, c], position of its first media token.
      length: [B] of the prompts.
      held: of all slots, to write them into; None: there are no others.
      first: number of the first of these slots.
    """
    held = ImageCache.empty(cfg, *image.shape) if held is None else held
    taps = shard(taps.astype(compute_dtype(cfg.train.dtype)), "pictures")
    theta = rope_base(cfg.llm, length)
    turned = key_turns(cfg, place, None if theta is None else theta[:, None, None, None])
    views = view(cfg, weights, jnp.moveaxis(taps, 1, 0))
    return held.write(cfg, weights.crosses, views, image, turned, first)


def read_prompts(
    cfg: EVLMConfig,
    weights: Weights,
    prompt: Prompt,
    held: ImageCache | None,
    random: jax.Array,
    slots: int,
    images: int,
):
    """Fills the caches.

    Args:
      held: of the images (`read_images`); None where the model sees none.
      random: [B] PRNG keys.
      slots: C of the state; at least T.
      images: image slots of the state; at least the largest prompt.visible.
    Returns:
      (logits [B, vocab] behind each prompt, the state without a token)
    """
    rows = len(prompt.tokens)
    positions, theta = _positions(prompt), rope_base(cfg.llm, prompt.length)
    look = cross_attention_op(cfg)

    def cross_attend(number, q):
        return look(q, *held.block(cfg, number), prompt.plan, *held.mask(cfg))

    x, sees = _embed(cfg, weights, prompt, held), _seers(prompt)
    attend = text_attention_op(cfg, jnp.full_like(positions, positions.shape[1]), positions, LONG)
    x, (keys, values) = _decoder(cfg, weights, x, positions, theta, sees, attend, cross_attend)
    last = x[jnp.arange(rows), prompt.length - 1]
    start = prompt.visible_start
    if held is not None:
        start, held = held.kept(cfg, start, images)
    state = DecodeState(
        jnp.zeros(rows, jnp.int32),
        prompt.length - 1,
        prompt.length <= 0,
        random,
        start,
        prompt.visible,
        theta,
        *text_cache.filled(cfg.llm, keys, values, prompt.length, slots),
        *(None, None) if held is None else held[:2],
        there=None if held is None else held.there,
    )
    return _logits(cfg, weights, last), state


def _positions(prompt: Prompt) -> jax.Array:
    """[B, T]; padding makes no text longer."""
    return jnp.minimum(jnp.arange(prompt.tokens.shape[1]), prompt.length[:, None] - 1)


def _logits(cfg: EVLMConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """[B, D] -> [B, vocab]."""
    return finished(cfg.llm, logits(weights.head, hidden, cfg.llm.vocab))


def _words(cfg: EVLMConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Embeddings of tokens as the first layer reads them: [..., T] -> [..., T, D]."""
    words = weights.embed[tokens].astype(compute_dtype(cfg.train.dtype))
    return scaled(words, cfg.llm.scales.embedding)


def _embed(cfg: EVLMConfig, weights: Weights, prompt: Prompt, held: ImageCache | None) -> jax.Array:
    """[B, T, D], what the first layer reads: words, and media tokens where images stand."""
    dtype = compute_dtype(cfg.train.dtype)
    if weights.media is None:
        media = write(held.patches, prompt.image_slot, prompt.media_slot)
    else:
        media = weights.media[jnp.maximum(prompt.media_slot, 0)].astype(dtype)
    words = _words(cfg, weights, prompt.tokens)
    return shard(jnp.where(prompt.media_slot[..., None] >= 0, media, words), "rows")


def _seers(prompt: Prompt) -> jax.Array | None:
    """bool [B, T]: which tokens of prompts see an image; None without cross-attention."""
    if prompt.plan is None:
        return None
    plan = prompt.plan
    none = plan.block_tokens.shape[1] * plan.block_tokens.shape[2]
    return (plan.token_place < none).reshape(prompt.tokens.shape)


def _seen(prompt: Prompt, vocab: int) -> jax.Array:
    """bool [B, vocab]: which tokens stand in a prompt."""
    rows, length = prompt.tokens.shape
    tokens = jnp.where(jnp.arange(length) < prompt.length[:, None], prompt.tokens, vocab)
    return (
        jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].set(True, mode="drop")
    )


def read_tokens(
    cfg: EVLMConfig, weights: Weights, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """Reads `token` of each row: (logits [B, vocab], the state with its keys)."""
    sums = cfg.xattn.one_softmax
    seen, attend = _sight(cfg, state) if cfg.cross_layers else None, self_attention_op(sums=sums)
    self_attend = text_cache.attend_op(
        cfg.llm, state.self_keys, state.self_values, state.position, sums
    )

    def cross_attend(number, q):
        held = text_cache.layer(state.cross_keys, state.cross_values, number)
        found = attend(q, *held, seen[:, None])
        if not sums:
            return found
        out, total = found
        return out, jnp.where(state.visible[:, None, None] > 0, total, NEGATIVE)

    x = shard(_words(cfg, weights, state.token[:, None]), "rows")
    x, (k, v) = _decoder(
        cfg,
        weights,
        x,
        state.position[:, None],
        state.theta,
        state.visible[:, None] > 0,
        self_attend,
        cross_attend,
    )
    keys, values = text_cache.saved(
        cfg.llm, state.self_keys, state.self_values, k, v, state.position
    )
    return _logits(cfg, weights, x[:, 0]), state._replace(self_keys=keys, self_values=values)


def _sight(cfg: EVLMConfig, state: DecodeState) -> jax.Array:
    """bool [B, Z]: which keys of cross-attention a row sees."""
    number = jnp.arange(state.cross_values.shape[3])
    first, images = (a[:, None] * cfg.view_tokens for a in (state.visible_start, state.visible))
    sink = number - (len(number) - max(cfg.xattn.sinks, 1))
    seen = (number >= first) & (number < first + images)
    seen = seen if state.there is None else seen & state.there
    return seen | (sink >= 0) & ((sink < cfg.xattn.sinks) | (images == 0))


def view(cfg: EVLMConfig, weights: Weights, taps: jax.Array) -> jax.Array:
    """What the bridge makes of taps [G, n, S, V]: [G', n, S', V or D], as in training whatever the
    dtype of `weights`.
    """
    if weights.bridge is None:
        return taps
    with jax.default_matmul_precision(cfg.train.matmul_precision), jax.named_scope("bridge"):
        return weights.bridge(taps)


def _choose(logits: jax.Array, state: DecodeState, sampling: Sampling) -> DecodeState:
    """The next token of each row from its logits [B, vocab]; a row that is done keeps its token."""
    keys = jax.vmap(jax.random.fold_in)(state.random, state.position)
    token = jnp.where(state.done, state.token, sample(logits, keys, sampling, state.seen))
    if state.seen is not None:
        state = state._replace(seen=state.seen.at[jnp.arange(len(token)), token].set(True))
    return state._replace(
        token=token,
        position=state.position + ~state.done,
        done=state.done | jnp.isin(token, sampling.stop),
    )


def _decoder(
    cfg: EVLMConfig,
    weights: Weights,
    x: jax.Array,
    positions: jax.Array,
    theta: jax.Array | None,
    sees: jax.Array | None,
    self_attend: Callable,
    cross_attend: Callable,
):
    """All layers over T tokens at `positions` [B, T]: x [B, T, D] -> hidden [B, T, D], (their keys,
    values) [L, B, T, K, H].

    Args:
      theta: as in DecodeState.
      sees: bool [B, T], which tokens see an image.
      self_attend: (number of the layer, q, k, v of these tokens) -> attention output.
      cross_attend: (number of the cross-attention block, q) -> attention output.
    """
    rope = rope_tables(cfg.llm, positions, None if theta is None else theta[:, None, None, None])
    x, passed = run_layers(
        cfg,
        weights.layers,
        weights.crosses,
        x,
        rope,
        self_attend=lambda number, q, k, v: (
            self_attend(number, sharpen(cfg.llm, q, positions), k, v),
            (k, v),
        ),
        cross_attend=lambda _, number, q: (cross_attend(number, q), None),
        sees=sees,
    )
    return weights.ln_f(x), passed.layers
