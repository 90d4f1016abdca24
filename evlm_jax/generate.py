"""Answers to prompts about images and videos: batches of prompts, sampling, stop tokens, streaming.

Prompts are documents of data/text.py (`prompt`). They are answered in batches of similar length, padded to a few sizes (powers of
two), so that few programs are compiled. Without a callback the host looks at the answers every CHUNK tokens only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evlm_jax import ranges
from evlm_jax.data import image, text
from evlm_jax.data.samples import ImageRef, Turn
from evlm_jax.mesh import Layout, jit
from evlm_jax.models.decoding import CHUNK, Prompt, decode, prefill
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.sampling import Sampling
from evlm_jax.models.weights import Weights
from evlm_jax.ops.grouped_attention import Plan
from evlm_jax.ops.grouping import plan
from evlm_jax.processes import on_host
from evlm_jax.ranges import NonNegative, Positive, PositiveShare, Seed
from evlm_jax.tokenizer import Tokenizer

ROWS = 8  # prompts answered together
SMALLEST = 32  # bucket of prompt lengths
STOPS = 8  # bucket of stop tokens


class Answer(NamedTuple):
    """What was generated, without the token that ended it."""

    text: str
    tokens: tuple[int, ...]


class Generator:
    """A model ready to answer.

    Args:
      model: its config decides the dtype of activations.
      dtype: of the matrices, "float32" | "bfloat16"; where left out train.matmul_precision, in which they were trained.
      features: refs -> taps [n, G, S, V], e.g. FeatureStore.get; where left out, images are loaded and encoded here.
      rows: most prompts answered together.
      layout: of the mesh that holds `model`; its rows are shared among the devices. None: one device.
    """

    def __init__(
        self,
        model: EVLM,
        tokenizer: Tokenizer,
        dtype: str | None = None,
        features: Callable[[Sequence[ImageRef]], np.ndarray] | None = None,
        rows: int = ROWS,
        layout: Layout | None = None,
    ):
        cfg = model.cfg
        self.cfg, self.tokenizer, self.rows = cfg, tokenizer, rows
        self.weights = jit(layout, lambda model: Weights.of(model, dtype or cfg.train.matmul_precision))(model)
        self.least = {"rows": 1, "pictures": 1} if layout is None else {axis: layout.parts(axis) for axis in ("rows", "pictures")}
        self.features = features or partial(_encode, model, jit(layout, EVLM.encode), self.least["pictures"])
        self._prefill = jit(layout, partial(prefill, cfg), static_argnames=("slots", "images"))
        self._decode = jit(layout, partial(decode, cfg), donate_argnames="state")

    def prompt(self, turns: Sequence[Turn], visuals: Sequence[tuple[ImageRef, ...]] = ()) -> text.Document:
        """A document that `generate` continues. Raises SampleError if markers and visuals differ in number."""
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
    ) -> list[Answer]:
        """Answers in the order of the prompts. No answer depends on the other prompts, only on its own place in the list.

        Args:
          temperature: 0 is greedy.
          top_p: draws from the smallest set of best tokens with this probability.
          seed: the draw of prompt i depends on (seed, i).
          stop: ids that end an answer; the tokenizer's where left out.
          callback: called with (index of the prompt, next piece of its answer) as soon as it is known.
        Raises:
          ValueError: a prompt that is no single path (text.prompt makes them), or a sampling option out of range.
        """
        ranges.check(NonNegative, temperature, "temperature")
        ranges.check(PositiveShare, top_p, "top_p")
        ranges.check(Positive, max_new_tokens, "max_new_tokens")
        ranges.check(Seed, seed, "seed")
        for document in prompts:
            if not np.array_equal(document.positions, np.arange(len(document.tokens))) or not len(document.tokens):
                raise ValueError(f"prompt {document.key}: not one unbranched text; make it with Generator.prompt")
        stop = tuple(self.tokenizer.eos if stop is None else stop)
        padded = np.array(stop + (-1,) * (_bucket(len(stop), STOPS) - len(stop)), np.int32)
        how = Sampling(np.float32(temperature), np.float32(top_p), padded)
        random = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
        streams = [Stream(self.tokenizer, stop, index, callback) for index in range(len(prompts))]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        for first in range(0, len(order), self.rows):
            chosen = order[first : first + self.rows]
            self._answer([prompts[i] for i in chosen], [streams[i] for i in chosen], random[np.array(chosen)], how, max_new_tokens)
        return [stream.answer() for stream in streams]

    def _answer(self, prompts: list[text.Document], streams: list["Stream"], random: jax.Array, how: Sampling, most: int) -> None:
        """One batch, into its streams."""
        refs = list(dict.fromkeys(ref for document in prompts for ref in document.refs))
        prompt = collate(prompts, refs, self.cfg.tile, self.least["rows"])
        slots = _bucket(max(len(document.tokens) for document in prompts) + most, prompt.tokens.shape[1])
        random = random[np.minimum(np.arange(len(prompt.length)), len(prompts) - 1)]
        sizes = {"slots": slots, "images": _bucket(prompt.visible.max())}
        state = self._prefill(self.weights, prompt, self._taps(refs), random, how, **sizes)
        new, known = on_host(state.token)[:, None], 0
        while True:
            known += new.shape[1]
            for stream, tokens in zip(streams, new):
                stream.push(tokens)
            if known >= most or all(stream.ended for stream in streams):
                return
            limit = 1 if streams[0].callback else min(CHUNK, most - known)
            state, out = self._decode(self.weights, state, how, np.int32(limit))
            new = on_host(out)[:, :limit]

    def _taps(self, refs: list[ImageRef]) -> np.ndarray | None:
        """[n, G, S, V], n a bucket; zeros behind the last one. None where the model sees no image."""
        if not self.cfg.sees:
            return None
        vit = self.cfg.vit
        taps = np.zeros((_bucket(len(refs), self.least["pictures"]), len(vit.taps), vit.tokens, vit.width), np.float32)
        if refs:
            taps[: len(refs)] = self.features(refs)
        return taps


def collate(prompts: Sequence[text.Document], refs: Sequence[ImageRef], tile: int, least: int = 1) -> Prompt:
    """Prompts as padded arrays, every size a power of two.

    Args:
      refs: all images, as they will stand in `taps`.
      tile: of cross-attention; 0: without a plan.
      least: number of rows; their power of two is taken times this.
    """
    rows, length = _bucket(len(prompts), least), _bucket(max(len(d.tokens) for d in prompts), SMALLEST)
    images, pairs = _bucket(max(len(d.refs) for d in prompts)), _bucket(max(d.pairs for d in prompts))
    number = {ref: i for i, ref in enumerate(refs)}
    arrays = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "media_slot", "visible_start", "visible_stop")}
    arrays["media_slot"] -= 1
    lengths, start, count = np.zeros((3, rows), np.int32)
    image_number = np.zeros((rows, images), np.int32)
    for row, document in enumerate(prompts):
        lengths[row] = len(document.tokens)
        for name, array in arrays.items():
            array[row, : lengths[row]] = getattr(document, name)
        start[row], count[row] = document.visible_start[-1], document.visible_stop[-1] - document.visible_start[-1]
        image_number[row, : len(document.refs)] = [number[ref] for ref in document.refs]
    grouped = None
    if tile:
        plans = [plan(a, b, tile, pairs) for a, b in zip(arrays["visible_start"], arrays["visible_stop"])]
        grouped = Plan(*(np.stack([p[name] for p in plans]) for name in Plan._fields))
    return Prompt(arrays["tokens"], arrays["media_slot"], lengths, arrays["visible_start"], grouped, image_number, start, count)


class Stream:
    """One growing answer."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[int, ...], index: int, callback: Callable[[int, str], None] | None):
        self.tokenizer, self.stop, self.index, self.callback = tokenizer, stop, index, callback
        self.tokens, self.ended, self._shown = [], False, ""

    def push(self, tokens: np.ndarray) -> None:
        """Takes new tokens up to the one that ends the answer."""
        for token in tokens.tolist():
            self.ended |= token in self.stop
            if not self.ended:
                self.tokens.append(token)
        if self.callback:
            self._show()

    def _show(self) -> None:
        """Hands on what is new, but no half of a character whose other bytes are still to come."""
        whole = self.tokenizer.decode(self.tokens)
        ready = whole if self.ended else whole.rstrip("\ufffd")
        if len(ready) > len(self._shown):
            piece, self._shown = ready[len(self._shown) :], ready
            self.callback(self.index, piece)

    def answer(self) -> Answer:
        """The whole answer; shows what was held back."""
        if self.callback and not self.ended:
            self.ended = True
            self._show()
        return Answer(self.tokenizer.decode(self.tokens), tuple(self.tokens))


def _encode(model: EVLM, encode: Callable, least: int, refs: Sequence[ImageRef]) -> np.ndarray:
    """Taps of images, computed now; `least` as in `collate`."""
    pixels = np.zeros((_bucket(len(refs), least), model.cfg.vit.image_size, model.cfg.vit.image_size, 3), np.uint8)
    pixels[: len(refs)] = image.pixels(refs, model.cfg)
    return on_host(encode(model, pixels))[: len(refs)].astype(np.float32)


def _bucket(size: int, smallest: int = 1) -> int:
    """The next power of two times `smallest`."""
    while smallest < size:
        smallest *= 2
    return smallest
