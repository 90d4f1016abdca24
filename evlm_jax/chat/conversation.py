"""What the page asks of the model: the answer to a conversation as it grows, and where a word of it
looked. Nothing here knows the page.
"""

import mimetypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from PIL import Image

from evlm_jax.data import text, video
from evlm_jax.data.features import FEW, encode_images
from evlm_jax.data.formats import captions
from evlm_jax.data.image import in_memory, load_all, size_of
from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import ImageRef, Sample, Turn, literal, marked
from evlm_jax.data.stream import pieces
from evlm_jax.generate import Generator
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.mesh import jit
from evlm_jax.prompts import IMAGES, LENGTHS, Room
from evlm_jax.report import attention_maps
from evlm_jax.runs import Trained

MOST_TOKENS = LENGTHS[-1]  # of a conversation
MOST_PICTURES = 4 * IMAGES[-1]  # frames of videos are pictures
TOGETHER = 8  # tokens of a word whose attention is computed by one program
PICTURE = 320  # pixels of the longer side of what attention is drawn over


class Message(NamedTuple):
    """What one side says; `files` are pictures and videos of the user."""

    role: str  # "user" | "assistant"
    text: str
    files: tuple[str, ...] = ()


class Look(NamedTuple):
    """Where a word looked in a picture that it sees."""

    picture: Image.Image
    grid: np.ndarray  # [g, g] as figures.overlay takes it
    share: float  # of the word's attention; the rest is for other pictures, or for none


class Taps:
    """Taps of pictures, computed by `encode` and kept while the next conversation has them too:
    another turn about a picture does not encode it again.
    """

    def __init__(self, encode: Callable[[Sequence[ImageRef]], np.ndarray]):
        self._encode, self._kept = encode, {}

    def get(self, refs: Sequence[ImageRef]) -> np.ndarray:
        """float32 [n, G, S, V]."""
        before = self._kept  # another thread may put others in its place
        missing = [ref for ref in dict.fromkeys(refs) if ref not in before]
        kept = {ref: before[ref] for ref in refs if ref in before}
        # On a CPU to pad a few to FEW takes longer than one after another.
        parts = [missing] if len(missing) >= FEW else [[ref] for ref in missing]
        for part in filter(None, parts):
            kept |= zip(part, self._encode(part))
        self._kept = kept
        return np.stack([kept[ref] for ref in refs])

    def fill(self, refs: Sequence[ImageRef], progress: bool = True) -> None:
        """Nothing: `get` computes what is missing."""


class Chat:
    """A model that answers conversations.

    Args:
      frames: of a video, as of `video.sample`.
      most: tokens of an answer.
      sampling: further options of Generator.generate.

    Attributes:
      shows_looks: whether attention can be drawn over a picture.
    """

    def __init__(self, trained: Trained, frames: str, most: int, **sampling):
        self.cfg, self.tokenizer = trained.model.cfg, trained.tokenizer
        self._model, self._frames, self._most, self._sampling = (
            trained.model,
            frames,
            most,
            sampling,
        )
        self.shows_looks = attention_maps.looks_at_patches(self.cfg)
        encode = partial(jit(None, EVLM.encode), trained.model)
        self._taps = Taps(partial(encode_images, self.cfg, lambda p: np.asarray(encode(p)), 1))
        self._generator = Generator(trained.model, trained.tokenizer, features=self._taps.get)

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer to a conversation that ends with the user, longer with each token.

        Raises ValueError for what cannot be answered: a file that is no picture or video that can
        be read, another number of marks than of files, a conversation that is too long.
        """
        document = self._generator.prompt(*self._said(messages))
        for size, most, what in (
            (len(document.tokens), MOST_TOKENS, "tokens"),
            (len(document.refs), MOST_PICTURES, "pictures and frames"),
        ):
            if size > most:
                raise ValueError(
                    f"the conversation has {size} {what}, {most} are the most: say less, or clear"
                    " it and begin anew"
                )
        return self._grown(document)

    def looks(self, messages: Sequence[Message], word: int) -> list[Look]:
        """The pictures that a word of the answer sees, which ends the conversation, in their order;
        none where it sees no picture.

        Args:
          word: number of the word, `words` of the answer.
        """
        return self._looks(*self._said(messages), word)

    def words(self, answer: str) -> list[str]:
        """Of an answer, which `looks` takes; none where attention cannot be drawn."""
        return literal(answer).split() if self.shows_looks else []

    def gates(self) -> dict | None:
        """What figures.gate_bars draws; None where the model has no gates."""
        if not self.cfg.cross_layers or not (gates := self._model.xattn.gates()):
            return None
        return {"layers": list(self.cfg.cross_layers)} | {
            name.removesuffix("_gate"): np.asarray(gate.opening()).tolist()
            for name, gate in gates.items()
        }

    def warm_up(self) -> Iterator[str]:
        """Compiles what most conversations need, and names each part before it begins; what longer
        ones need is compiled when they come.
        """
        frames = int(self._frames) if self._frames.isdigit() else int(captions.FRAMES)
        for what, sizes, words in (
            ("a picture", (1,), 1),
            ("a picture and a long text", (1,), 99),
            ("two pictures", (1, 1), 1),
            ("a video", (min(frames, MOST_PICTURES),), 1),
        ):
            yield what
            colours = count()
            visuals = [
                tuple(in_memory(Image.new("RGB", (8, 8), (next(colours), 0, 0))) for _ in range(n))
                for n in sizes
            ]
            turns = [Turn("user", *marked(["a " * words], len(visuals)))]
            for _ in self._grown(self._generator.prompt(turns, visuals)):
                break
            if self.shows_looks:
                self._looks([*turns, Turn("assistant", "a")], visuals, 0)

    def _grown(self, document: text.Document) -> Iterator[str]:
        """The answer to a prompt, longer with each token."""
        ask = partial(self._generator.generate, [document], self._most, **self._sampling)
        return accumulate(pieces(ask))

    def _looks(
        self, turns: Sequence[Turn], visuals: Sequence[tuple[ImageRef, ...]], word: int
    ) -> list[Look]:
        sample = Sample("conversation", "chat", tuple(visuals), (tuple(turns),))
        document = text.score_document(sample, self.tokenizer, self.cfg)
        _, places = attention_maps.placed_words(
            self.tokenizer, document.targets, document.target_positions, turns[-1].text
        )[word]
        seen = range(document.visible_start[places[0]], document.visible_stop[places[0]])
        if not seen:
            return []
        model = self._with_room(document)
        (batch, _, _), *_ = rows_in_order([document], model.cfg, 1, self._taps)
        padded = places + places[-1:] * (-len(places) % TOGETHER)
        maps = attention_maps.attention_maps(model, batch, 0, padded)[:, :, : len(places)]
        height, width = (PICTURE * side // max(self.cfg.vit.size) for side in self.cfg.vit.size)
        refs = [document.refs[i] for i in seen]
        pictures = load_all(refs, (height, width), self.cfg.data.resize)
        return [
            Look(
                Image.fromarray(picture),
                attention_maps.heat(maps[..., i, :], self.cfg.vit),
                float(maps[..., i, :].sum(-1).mean()),
            )
            for i, picture in zip(seen, pictures, strict=True)
        ]

    def _with_room(self, document: text.Document) -> EVLM:
        """The model for a row of one document, whose pictures come as taps."""
        model = nnx.merge(*nnx.split(self._model))
        row = Room.of([document]).row(self.cfg, document)
        model.cfg = replace(row, data=replace(row.data, cache_features=True))
        return model

    def _said(
        self, messages: Sequence[Message]
    ) -> tuple[list[Turn], tuple[tuple[ImageRef, ...], ...]]:
        """Turns with marks, and their visuals. Raises ValueError, as `answer`."""
        turns, visuals = [], ()
        for message in messages:
            shown = tuple(map(self._visual, message.files))
            said = (
                literal(message.text)
                if message.role == "assistant"
                else marked([message.text], len(shown))[0]
            )
            if not said.strip():
                raise ValueError("an empty message: write a question")
            turns.append(Turn(message.role, said))
            visuals += shown
        return turns, visuals

    def _visual(self, path: str) -> tuple[ImageRef, ...]:
        """A video's frames, or the picture alone; by content where the name says neither, or the
        wrong thing, as of .3gp and .ts.
        """
        ref = ImageRef(path)
        kind = (mimetypes.guess_type(Path(path).name)[0] or "").partition("/")[0]
        if kind == "image" or (kind != "video" and size_of(ref)):
            return (ref,)
        return video.sample(path, self._frames)
