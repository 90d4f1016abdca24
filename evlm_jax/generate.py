"""Answers to prompts about images and videos: batches of prompts, sampling, stop tokens and stop
strings, streaming.

Prompts are documents of data/text.py (`prompt`). They are answered in batches of similar length,
padded to a few sizes (prompts.py); padding is masked and no answer depends on it. Images are
decoded and encoded some at a time, each straight into what text sees of them: of a long video
neither pixels nor taps accumulate. Without a callback the host looks at the answers every CHUNK
tokens only.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from evlm_jax.config import EVLMConfig, ranges
from evlm_jax.config.ranges import (
    Answers,
    Count,
    NewTokens,
    NonNegative,
    PositiveFloat,
    PositiveShare,
    Seed,
    Share,
)
from evlm_jax.data import text
from evlm_jax.data.features import encode_images
from evlm_jax.data.samples import ImageRef, Turn
from evlm_jax.data.stream import Answer, Stream
from evlm_jax.data.tokenizer import Tokenizer
from evlm_jax.data.video import MOST_FRAMES
from evlm_jax.models.decode_weights import Weights
from evlm_jax.models.decoding import CHUNK, Prompt, decode, prefill, read_images
from evlm_jax.models.evlm import EVLM, encoder
from evlm_jax.models.image_cache import ImageCache
from evlm_jax.models.sampling import Sampling
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.mesh import Layout, jit
from evlm_jax.prompts import LENGTHS, Room, bucket, collate, rung

ROWS = 8  # prompts answered together; fewer in a call than so many: one, or all of these rows
STOPS = 8  # stop tokens that have room; twice as many where there are more, and so on
PICTURES = 64  # that are encoded before text's keys are made of them, most


class Asked(NamedTuple):
    """One answer that is wanted."""

    prompt: text.Document
    number: int  # of the prompt
    answer: int  # of those to this prompt


class Generator:
    """Generates answers with a model.

    Args:
      model: its config decides the dtype of activations.
      dtype: of the matrices, "float32" | "bfloat16"; by default train.matmul_precision, in which
        they were trained.
      features: refs -> taps [n, G, S, V], e.g. FeatureStore.get; by default images are loaded and
        encoded here.
      rows: most prompts answered together.
      images: most pictures and frames of a prompt, and of prompts answered together.
      layout: of the mesh of `model`; rows are split among its devices. None: one device.
    """

    def __init__(
        self,
        model: EVLM,
        tokenizer: Tokenizer,
        dtype: str | None = None,
        features: Callable[[Sequence[ImageRef]], np.ndarray] | None = None,
        rows: int = ROWS,
        layout: Layout | None = None,
        images: int = MOST_FRAMES,
    ):
        cfg = model.cfg
        self.cfg, self.tokenizer, self.rows, self.images = cfg, tokenizer, rows, images
        self.weights = jit(
            layout, lambda model: Weights.of(model, dtype or cfg.train.matmul_precision)
        )(model)
        self.least = (
            {"rows": 1, "pictures": 1}
            if layout is None
            else {axis: layout.parts(axis) for axis in ("rows", "pictures")}
        )
        encode = encoder(model, partial(jit, layout))
        self.features = features or partial(
            encode_images, cfg, lambda p: fetch_to_host(encode(p)), self.least["pictures"]
        )
        self._allowed = _allowed(tokenizer, cfg)
        self._no_images = jit(layout, partial(ImageCache.empty, cfg), static_argnums=(0, 1))
        self._read_images = jit(layout, partial(read_images, cfg), donate_argnames="held")
        self._prefill = jit(
            layout,
            partial(prefill, cfg),
            static_argnames=("slots", "images"),
            donate_argnames="held" if cfg.cross_layers else (),
        )
        self._decode = jit(layout, partial(decode, cfg), donate_argnames="state")

    def prompt(
        self, turns: Sequence[Turn], visuals: Sequence[tuple[ImageRef, ...]] = ()
    ) -> text.Document:
        """A document that `generate` continues.

        Raises SampleError if markers and visuals differ in number.
        """
        return text.prompt(turns, visuals, self.tokenizer, self.cfg)

    def generate(
        self,
        prompts: Sequence[text.Document],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        callback: Callable[[int, str], None] | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_strings: str | Sequence[str] = (),
        num_return_sequences: int = 1,
    ) -> list[Answer]:
        """Answers in the order of the prompts, those of one prompt side by side. None depends on
        the other prompts, only on the place of its own in the list. Options are transformers' and
        do what they do there. Never chosen are the tokens that stand for images, and
        ids that the tokenizer does not have.

        Args:
          temperature: 0 is greedy.
          top_p: draws from the smallest set of best tokens with this probability.
          seed: the draw of answer j to prompt i depends on (seed, i, j).
          stop: ids that end an answer; the tokenizer's where left out.
          callback: called with (index of the answer, next piece of it) as soon as it is known.
          top_k: draws from so many best tokens; 0: from all.
          min_p: draws from tokens with at least this share of the best one's probability.
          repetition_penalty: above 1, tokens of the prompt and of the answer so far become less
            likely, when greedy too.
          stop_strings: texts that end an answer, and are no part of its text.
          num_return_sequences: answers to each prompt, which need a temperature.
        Raises:
          ValueError: a prompt that is no single path (text.prompt makes them) or has too many
            images, or an option out of range.
        """
        ranges.check(Seed, seed, "seed")
        ranges.check(NewTokens, max_new_tokens, "max_new_tokens")
        ranges.check(Answers, num_return_sequences, "num_return_sequences")
        if num_return_sequences > 1 and not temperature:
            raise ValueError(
                "num_return_sequences: at temperature 0 all answers are the same; give a"
                " temperature"
            )
        strings = _strings(stop_strings)
        asked = [
            Asked(prompt, i, j)
            for i, prompt in enumerate(map(self._checked, prompts))
            for j in range(num_return_sequences)
        ]
        stop = tuple(self.tokenizer.eos if stop is None else stop)
        sampling = self._sampling(stop, temperature, top_p, top_k, min_p, repetition_penalty)
        streams = [Stream(self.tokenizer, stop, strings, k, callback) for k in range(len(asked))]
        self._answer_all(asked, streams, seed, sampling, max_new_tokens)
        return [stream.answer() for stream in streams]

    def _sampling(
        self,
        stop: tuple[int, ...],
        temperature: float,
        top_p: float,
        top_k: int,
        min_p: float,
        repetition_penalty: float,
    ) -> Sampling:
        """Raises ValueError for an option out of range, or that says nothing."""
        ranges.check(NonNegative, temperature, "temperature")
        ranges.check(PositiveShare, top_p, "top_p")
        ranges.check(Count, top_k, "top_k")
        ranges.check(Share, min_p, "min_p")
        ranges.check(PositiveFloat, repetition_penalty, "repetition_penalty")
        if not temperature and (top_k or top_p < 1 or min_p):
            raise ValueError(
                "top_k, top_p and min_p are of draws: give a temperature, or leave them out"
            )
        ends = np.array(stop + (-1,) * (bucket(len(stop), STOPS) - len(stop)), np.int32)
        penalty = None if repetition_penalty == 1 else np.float32(repetition_penalty)
        top_k = np.int32(min(top_k, self.cfg.llm.vocab))
        return Sampling(
            np.float32(temperature),
            np.float32(top_p),
            ends,
            top_k,
            np.float32(min_p),
            self._allowed,
            penalty,
        )

    def _checked(self, document: text.Document) -> text.Document:
        """The document. Raises ValueError for one that is no single path, which cannot go on, or
        has too many images.
        """
        count, images = len(document.tokens), len(document.refs)
        if not count or not np.array_equal(document.positions, np.arange(count)):
            raise ValueError(
                f"prompt {document.key}: not one unbranched text; make it with Generator.prompt"
            )
        if images > self.images:
            raise ValueError(
                f"prompt {document.key}: {images} pictures and frames, {self.images} are the most:"
                " show fewer"
            )
        return document

    def _answer_all(
        self, asked: list[Asked], streams: list[Stream], seed: int, sampling: Sampling, most: int
    ) -> None:
        """In batches of similar length, into their streams."""
        lengths = [len(one.prompt.tokens) for one in asked]
        least = LENGTHS[0 if len(asked) > 1 and max(lengths) <= LENGTHS[0] else 1]
        sizes = [(Room.of([one.prompt], least), len(one.prompt.tokens)) for one in asked]
        order = sorted(range(len(asked)), key=sizes.__getitem__)
        rows = self._rows(len(order))
        while order:
            images = max(len(asked[k].prompt.refs) for k in order[:rows])
            count = rows if rows * images <= self.images else self.least["rows"]
            batch, order = order[:count], order[count:]
            together = [(asked[k], streams[k]) for k in batch]
            self._answer(together, seed, sampling, most, count, least)

    def _rows(self, count: int) -> int:
        """Rows of the batches of so many answers."""
        rows, most = self.least["rows"], -(-self.rows // self.least["rows"]) * self.least["rows"]
        while rows < min(count, most):
            rows *= ROWS
        return min(rows, most)

    def _answer(
        self,
        batch: list[tuple[Asked, Stream]],
        seed: int,
        sampling: Sampling,
        most: int,
        rows: int,
        least: int,
    ) -> None:
        """One batch, into its streams, in so many rows of at least so many tokens."""
        asked, streams = zip(*batch)
        prompts = [one.prompt for one in asked]
        room = Room.of(prompts, least)
        prompt = collate(prompts, self.cfg.query_block, rows, room)
        places = np.array(
            [(one.number, one.answer) for one in asked] + [(0, 0)] * (rows - len(asked)), np.uint32
        )
        random = _keys(np.uint32(seed), places)
        sizes = {"slots": room.length + rung(most, LENGTHS[1:]), "images": room.images}
        held = self._look(prompts, prompt, room.images)
        state = self._prefill(self.weights, prompt, held, random, sampling, **sizes)
        new, known = fetch_to_host(state.token)[:, None], 0
        while True:
            known += new.shape[1]
            for stream, tokens in zip(streams, new):
                stream.push(tokens)
            if known >= most or all(stream.ended for stream in streams):
                return
            limit = 1 if streams[0].callback else min(CHUNK, most - known)
            state, out = self._decode(self.weights, state, sampling, np.int32(limit))
            new = fetch_to_host(out)[:, :limit]

    def _look(
        self, prompts: Sequence[text.Document], prompt: Prompt, slots: int
    ) -> ImageCache | None:
        """What the prompts see of their images, a chunk of whose `slots` is encoded at a time; None
        where the model sees no image.
        """
        if not self.cfg.uses_images:
            return None
        vit, rows = self.cfg.vit, len(prompt.length)
        held, count = self._no_images(rows, slots), math.gcd(slots, max(1, PICTURES // rows))
        shape = bucket(rows * count, self.least["pictures"]), len(vit.taps), vit.tokens, vit.width
        for first in range(0, max(len(document.refs) for document in prompts), count):
            some = [document.refs[first : first + count] for document in prompts]
            refs = list(dict.fromkeys(ref for own in some for ref in own))
            taps, (image, place) = np.zeros(shape, np.float32), np.zeros((2, rows, count), np.int32)
            taps[: len(refs)] = self.features(refs)
            number = dict(zip(refs, range(len(refs))))
            for row, own in enumerate(some):
                image[row, : len(own)] = [number[ref] for ref in own]
                at = np.flatnonzero(prompts[row].media_slot == 0)  # images stand there in order
                place[row, : len(own)] = at[first : first + len(own)]
            about = image, place, prompt.length
            held = self._read_images(self.weights, taps, *about, held, np.int32(first))
        return held


def _strings(stop_strings: str | Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for what is no text, or an empty one."""
    some = isinstance(stop_strings, Sequence) and not isinstance(stop_strings, str)
    strings = tuple(stop_strings) if some else (stop_strings,)
    if not all(isinstance(string, str) for string in strings):
        raise ValueError(f"stop_strings must be texts, got {strings!r}")
    if "" in strings:
        raise ValueError("stop_strings: an empty text ends every answer; leave it out")
    return strings


def _allowed(tokenizer: Tokenizer, cfg: EVLMConfig) -> np.ndarray:
    """bool [vocab]: ids that the tokenizer has, but for what stands for images."""
    ids = set(tokenizer.ids)
    for name in filter(None, (cfg.media.placeholder, cfg.media.around)):
        with contextlib.suppress(ValueError):  # a model that was never shown an image may lack it
            ids.discard(tokenizer.id(name))
    return np.isin(np.arange(cfg.llm.vocab), list(ids))


@jax.jit
def _keys(seed: jax.Array, places: np.ndarray) -> jax.Array:
    """A PRNG key for each of [n, 2] (prompt, answer)."""
    return jax.vmap(
        lambda place: jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed), place[0]), place[1]
        )
    )(places)
