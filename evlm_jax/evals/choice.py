"""Which of the candidate answers has the lowest loss, for every question about an image at once.

An image, all its questions and all their candidates are ONE document, a token trie: the image's
media tokens and every question are computed once, a candidate of one token costs no position at
all, only one more pick from the same logits. The loss of a candidate is the sum over its tokens;
the token that ends the answer counts only where one candidate is the beginning of another (else it
would be compared without being needed: docs/decisions.md, D-EVAL-4)."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.pack import Budget
from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import Sample, question
from evlm_jax.data.text import Document, score_document
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.mesh import Layout, jit

SLACK = 1.1  # room over the average need of a row's tokens, so that length stays what closes a row
IMAGES, TARGETS, PAIRS = 2, 128, 4  # budgets are multiples of these: few compiled shapes


def candidate_losses(
    model: EVLM,
    tokenizer,
    samples: Sequence[Sample],
    candidates: Sequence[str],
    features: FeatureStore | None = None,
    rows: int = 2,
    layout: Layout | None = None,
) -> list[np.ndarray]:
    """float64 [questions, candidates] of each sample: the loss in nats of every candidate as the
    answer of every dialog's question.
    """
    same = [[tuple(candidates)] * len(sample.dialogs) for sample in samples]
    found = own_candidate_losses(model, tokenizer, samples, same, features, rows, layout)
    return [np.stack(of_sample) for of_sample in found]


def own_candidate_losses(
    model: EVLM,
    tokenizer,
    samples: Sequence[Sample],
    candidates: Sequence[Sequence[tuple[str, ...]]],
    features: FeatureStore | None = None,
    rows: int = 2,
    layout: Layout | None = None,
) -> list[list[np.ndarray]]:
    """Losses as of `candidate_losses`, where every dialog of every sample has its own candidates:
    one float64 array for each dialog.
    """
    sets = dict.fromkeys(own for of_sample in candidates for own in of_sample)
    end = any([needs_end(tokenizer, own, model.cfg) for own in sets])
    asked = [
        replace(
            sample,
            dialogs=tuple(
                question(dialog[0].text, answer)
                for dialog, own in zip(sample.dialogs, of_sample, strict=True)
                for answer in own
            ),
        )
        for sample, of_sample in zip(samples, candidates, strict=True)
    ]
    losses = answer_losses(model, tokenizer, asked, features, rows, end, layout)
    return [
        np.split(loss, np.cumsum([len(own) for own in of_sample])[:-1])
        for (loss, _), of_sample in zip(losses, candidates, strict=True)
    ]


def answer_losses(
    model: EVLM,
    tokenizer,
    samples: Sequence[Sample],
    features: FeatureStore | None = None,
    rows: int = 2,
    end: bool = True,
    layout: Layout | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Loss in nats, float64, of the last turn of every dialog of each sample, and whether greedy
    generation would produce it, bool.

    Args:
      rows: of a batch.
      end: count the token that ends the answer as well.
      layout: of the mesh of `model`; `rows` are split among its devices. None: one device.
    """
    documents = [score_document(sample, tokenizer, model.cfg, end=end) for sample in samples]
    cfg = fit_budget(model.cfg, documents, 1 if layout is None else layout.parts("images"))
    graphdef, state = nnx.split(model)
    found = [
        (np.zeros(len(sample.dialogs)), np.ones(len(sample.dialogs), bool)) for sample in samples
    ]
    bar = tqdm(
        total=sum(len(s.dialogs) for s in samples), desc="losses", unit="answer", leave=False
    )
    for batch, document, dialog in rows_in_order(documents, cfg, rows, features):
        log_probs, best = fetch_to_host(_score(layout, graphdef, state, batch))
        for d in np.unique(document[document >= 0]):
            here = document == d
            np.add.at(found[d][0], dialog[here], -log_probs.astype(np.float64)[here])
            np.logical_and.at(found[d][1], dialog[here], best[here])
            bar.update(len(samples[d].dialogs))
    bar.close()
    return found


def needs_end(tokenizer, candidates: Sequence[str], cfg: EVLMConfig) -> bool:
    """Whether one candidate's tokens begin another's.

    Raises ValueError if two candidates are the same tokens.
    """
    sample = Sample(
        "candidates", "candidates", (), tuple(question("?", answer) for answer in candidates)
    )
    document = score_document(sample, tokenizer, cfg, end=False)
    tokens = [
        tuple(document.targets[document.dialog == i].tolist()) for i in range(len(candidates))
    ]
    if twice := [candidates[i] for i, count in enumerate(map(tokens.count, tokens)) if count > 1]:
        raise ValueError(
            f"candidates {', '.join(map(repr, twice))} are the same tokens; leave out all but one"
        )
    return any(a != b and b[: len(a)] == a for a in tokens for b in tokens)


def fit_budget(cfg: EVLMConfig, documents: Sequence[Document], parts: int = 1) -> EVLMConfig:
    """The configuration with budgets that suit these documents: `data.length` closes a row, the
    others seldom do; images are of one row.

    `parts`: what the image slots are split into, on a mesh.
    """
    need = np.array([Budget.needed(document) for document in documents])
    length = max(cfg.data.length, int(need[:, 0].max()))
    usual = need.sum(0) / need[:, 0].sum() * length * SLACK
    room = np.maximum(usual[1:], need[:, 1:].max(0))
    steps = math.lcm(IMAGES, parts), TARGETS, PAIRS
    images, targets, pairs = (
        step * math.ceil(size / step) for size, step in zip(room, steps, strict=True)
    )
    budgets = dict(
        length=length,
        pack_length=0,
        pack_media=0,
        images=images,
        targets=targets,
        image_group=1,
        slots=images,
        block_pairs=max(pairs, images),
    )
    return replace(cfg, data=replace(cfg.data, **budgets))


def _score(
    layout: Layout | None, graphdef: nnx.GraphDef, state: nnx.State, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Log-probability, float32, of every target [B, M], and whether it is the likeliest; each
    distinct position is computed once.
    """
    places = [
        np.unique(at[target >= 0])
        for at, target in zip(batch.target_positions, batch.targets, strict=True)
    ]
    width = -(-max(map(len, places)) // 32) * 32  # few compiled shapes
    positions = np.stack([np.pad(p, (0, width - len(p))) for p in places])
    slots = np.stack(
        [
            np.searchsorted(p, at).clip(0, max(0, len(p) - 1))
            for p, at in zip(places, batch.target_positions, strict=True)
        ]
    )
    hidden, picks = _programs(layout)
    return picks(graphdef, state, hidden(graphdef, state, batch), positions, slots, batch.targets)


@functools.cache
def _programs(layout: Layout | None) -> tuple[Callable, Callable]:
    """`_hidden` and `_picks` for the devices of `layout`."""
    return tuple(jit(layout, f, static_argnums=0) for f in (_hidden, _picks))


def _hidden(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> jax.Array:
    return nnx.merge(graphdef, state).hidden(batch)


def _picks(
    graphdef, state, hidden: jax.Array, positions: jax.Array, slots: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Row by row, so that the logits of one row are all that is ever in memory."""
    model = nnx.merge(graphdef, state)

    def row(inputs):
        hidden, positions, slots, targets = inputs
        log_probs = jax.nn.log_softmax(model.logits(hidden[positions]))
        return log_probs[slots, jnp.maximum(targets, 0)], log_probs.argmax(-1)[slots] == targets

    return jax.lax.map(row, (hidden, positions, slots, targets))
