"""Where a model looks: cross-attention of words over the images of a sample."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig, ViTConfig
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import MARKER, Sample
from evlm_jax.data.text import encode
from evlm_jax.models.evlm import EVLM


def attention_maps(model: EVLM, batch: Batch, row: int, positions: Sequence[int]) -> np.ndarray:
    """Cross-attention of chosen text positions of one row, float32 [X, N, len(positions), I, S].

    X cross-attention layers, N heads, I image slots of the row's group, S visual tokens (prefix
    tokens first, then patches row by row). Weights over all images sum to 1 less the share of the
    zero sink; images that a position does not see have 0. A word that is read is looked up at its
    own position, a word that is predicted at the position before it.

    Raises:
      ValueError: no cross-attention looks at the visual tokens (`looks_at_patches`).
    """
    if not looks_at_patches(model.cfg):
        raise ValueError(
            "attention over the patches of a picture cannot be shown: the model has"
            f" {model.cfg.baseline}"
        )

    def own(a):
        return a[row * len(a) // len(batch.tokens)]  # of the row, or of its image group

    one = jax.tree.map(lambda a: jnp.asarray(own(a))[None], batch)
    return np.asarray(trace(model, one, jnp.asarray(positions))[1])


@jax.jit
def trace(model: EVLM, batch: Batch, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`model.hidden` of one row with dense cross-attention: ([1, T, D], weights
    [X, N, len(positions), I, S'] of `positions`).
    """
    sinks, shared = model.cfg.xattn.sinks, model.cfg.xattn.heads // model.cfg.xattn.kv_heads
    states = model.visual_states(batch)
    slot = jnp.arange(states.shape[2])
    visible = (batch.visible_start[0, :, None] <= slot) & (
        slot < batch.visible_stop[0, :, None]
    )  # [T, I]

    def dense(q, k, v):
        """q [1, T, N, H], k and v [1, I, S, K, H] -> attention output, weights [N, t, I, S]; the
        sink is in the denominator.
        """
        k, v = (jnp.repeat(a, shared, axis=-2)[0] for a in (k, v))
        scores = (
            jnp.einsum("tnh,isnh->ntis", q[0], k, preferred_element_type=jnp.float32)
            * q.shape[-1] ** -0.5
        )
        scores = jnp.where(visible[..., None], scores, -jnp.inf)
        top = jnp.maximum(scores.max((2, 3), keepdims=True), 0.0 if sinks else -1e30)
        weights = jnp.exp(scores - top)
        total = weights.sum((2, 3), keepdims=True) + sinks * jnp.exp(-top)
        weights = weights / jnp.where(total > 0, total, 1.0)
        return (
            jnp.einsum("ntis,isnh->tnh", weights, v.astype(jnp.float32)).astype(q.dtype)[None],
            weights[:, positions],
        )

    hidden, passed = model.forward_with_observer(batch, states, cross_attend=dense)
    return hidden, passed.crosses


def looks_at_patches(cfg: EVLMConfig) -> bool:
    """Whether keys of cross-attention are the picture's tokens and have a softmax of their own, so
    that attention can be drawn over it.
    """
    drawn = cfg.bridge.kind != "flamingo" and not cfg.vit.grid_by_picture
    return bool(cfg.cross_layers) and drawn and not cfg.xattn.one_softmax


def word_maps(
    model: EVLM, tokenizer, sample: Sample, features: FeatureStore | None = None
) -> list[dict]:
    """Attention over the first image for every word of a dialog of one question and one answer.

    Words of the question are looked up where they are read, words of the answer where they are
    predicted; a word of several tokens gets their mean.

    Returns:
      [{"word", "grid": [down, across] (see `heat`), "predicted"}]
    """
    (batch, _, _), *_ = rows_in_order(
        [encode(sample, tokenizer, model.cfg)], model.cfg, 1, features
    )
    (asked, answer), first = (
        sample.dialogs[0],
        int(np.flatnonzero(batch.media_slot[0] >= 0)[-1]) + 1,
    )
    read = placed_words(
        tokenizer,
        batch.tokens[0, first:],
        range(first, model.cfg.data.length),
        asked.text.rpartition(MARKER)[2],
    )
    said = placed_words(tokenizer, batch.targets[0], batch.target_positions[0], answer.text)
    maps = attention_maps(model, batch, 0, [p for _, places in read + said for p in places])[
        :, :, :, 0
    ]
    rows, at = [], 0
    for i, (word, places) in enumerate(read + said):
        grid = heat(maps[:, :, at : at + len(places)], model.cfg.vit)
        rows.append({"word": word, "grid": grid, "predicted": i >= len(read)})
        at += len(places)
    return rows


def placed_words(
    tokenizer, tokens: np.ndarray, places: Sequence[int], text: str
) -> list[tuple[str, list[int]]]:
    """The words of `text`, which `tokens` begin with, and the places of the tokens of each: where
    these are read, or of targets where they are predicted.
    """
    places_of, seen, spelled = [[] for _ in text.split()], [], ""
    for token, place in zip(tokens, places, strict=True):
        if len(spelled.strip()) >= len(text.strip()):
            break
        seen.append(
            token
        )  # decoded together: alone, a token of SentencePiece has no space in front
        before, spelled = spelled, tokenizer.decode(seen)
        if spelled.strip() != before.strip():
            places_of[len(spelled.split()) - 1].append(int(place))
    return list(zip(text.split(), places_of, strict=True))


def heat(weights: np.ndarray, vit: ViTConfig) -> np.ndarray:
    """Attention [..., S] of one word on one image, averaged over all leading axes (layers, heads)
    -> [down, across] over the patches.
    """
    every = np.asarray(weights, np.float64).reshape(-1, weights.shape[-1]).mean(0)
    tiles = every.reshape(*vit.laid, -1)[..., vit.prefix_tokens :]
    return tiles.reshape(*vit.laid, *vit.table_grid).swapaxes(1, 2).reshape(vit.grid)
