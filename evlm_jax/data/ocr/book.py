"""Synthetic pages as a source of samples: made when they are asked for, of any source's texts and
pictures.
"""

import io
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote, urlencode

import numpy as np
from PIL import Image

from evlm_jax.data import image
from evlm_jax.data.ocr.dialogs import DIALOGS, dialogs
from evlm_jax.data.ocr.fonts import faces
from evlm_jax.data.ocr.layout import LAYOUTS
from evlm_jax.data.ocr.page import Page, compose, draw
from evlm_jax.data.samples import MARKER, ImageRef, Sample, literal
from evlm_jax.data.source import Source

LONG = 300  # characters: of a longer text a part is taken
UNSEEN = ("Cc", "Cf", "Cs")  # kinds of characters that leave no ink
VARIANTS = "\ufe0e\ufe0f"  # "as text" and "as emoji"
EMPTY = 100  # samples in a row without text, before it is an error


class Book(Source):
    """Pages by number. The picture of one is `page://NUMBER::NAME OF THE BOOK`; it is drawn when
    that is read (`picture`).
    """

    def __init__(
        self,
        name: str,
        pages: int,
        sample: Callable[[int], Sample],
        picture: Callable[[int], bytes],
        made_of: Sequence,
    ):
        super().__init__(name, range(pages), sample, dialogs=lambda number: DIALOGS)
        self.picture, self._made_of = picture, made_of

    def state(self) -> str:
        """Combined state of the sources of its texts and pictures."""
        return " ".join([super().state(), *(source.state() for source in self._made_of)])


@dataclass(frozen=True)
class _Pages:
    """The pages of a book, each a function of its number."""

    name: str
    whole: str  # the book's name with all its options
    language: str
    fonts: Sequence
    texts: Sequence[Sequence[Sample]]
    role: str
    backgrounds: Sequence[Sample] | None  # None: pages without pictures
    kinds: Sequence[str]
    seed: int
    size: int
    characters: int

    def page(self, number: int) -> Page:
        return compose(
            (self.seed, number),
            self.size,
            self.language,
            self.fonts,
            partial(supply, self.texts, self.role),
            self.characters,
            self.backgrounds is not None,
            self.kinds,
        )

    def sample(self, number: int) -> Sample:
        """The sample of a page: a reference to its picture, and the dialogs about it."""
        made = self.page(number)

        def placed(parts: Sequence) -> list:
            return list(
                zip([part.text for part in parts], made.place([part.box for part in parts]))
            )

        lines = made.sheet.lines
        words = [word for line in lines for word in line.words]
        rng = np.random.default_rng((self.seed, number, 2))
        asked = dialogs(self.language, placed(lines), placed(words), rng)
        return Sample(
            str(number), self.name, ((ImageRef(f"page://{number}::{self.whole}"),),), asked
        )

    def picture(self, number: int) -> bytes:
        """A JPEG."""
        drawn, quality = draw(
            self.page(number), (self.seed, number), partial(_background, self.backgrounds)
        )
        file = io.BytesIO()
        drawn.save(file, "JPEG", quality=quality)
        return file.getvalue()


def open_book(
    language: str,
    open_source: Callable[[str], Sequence[Sample]],
    name: str,
    path: str,
    *,
    pages: str = "1000000",
    seed: str = "0",
    size: str = "448",
    characters: str = "2000",
    role: str = "assistant",
    pictures: str = "photos",
    fonts: str = "",
    layouts: str = ",".join(LAYOUTS),
) -> Book:
    """Pages written with the texts of other sources.

    Args:
      path: names of the sources of text, with commas; what would be mistaken (`,` `?` `&`) as in
        URLs (`%2C` `%3F` `%26`).
      pages: how many; nothing is stored, so they may be millions.
      size: longer side of the picture in pixels.
      characters: most on a page.
      role: whose turns are written, assistant or user.
      pictures: source of the pictures below the pages; empty for none.
      fonts: files that are used besides the shipped ones, with commas.
      layouts: kinds of pages, with commas.
    Raises:
      ValueError: an option out of range, no font for the language, a source without text or
        pictures.
    """
    given = dict(seed=seed, size=size, characters=characters, role=role)
    given |= dict(pictures=pictures, fonts=fonts, pages=pages, layouts=layouts)
    kinds = layouts.split(",")
    numbers = {key: _number(key, given[key]) for key in ("pages", "seed", "size", "characters")}
    if role not in ("assistant", "user"):
        raise ValueError(f"data source {name!r}: role must be assistant or user, not {role!r}")
    if unknown := [kind for kind in kinds if kind not in LAYOUTS]:
        raise ValueError(
            f"data source {name!r}: layouts has {unknown[0]!r}; there are {', '.join(LAYOUTS)}"
        )
    texts = [open_source(unquote(part)) for part in path.split(",")]
    backgrounds = open_source(pictures) if pictures else None
    whole = f"ocr-{language}:{path}?{urlencode(given)}"  # all that a picture depends on
    count = numbers.pop("pages")
    made = _Pages(
        name, whole, language, faces(language, fonts), texts, role, backgrounds, kinds, **numbers
    )
    made_of = texts if backgrounds is None else [*texts, backgrounds]
    return Book(name, count, made.sample, made.picture, made_of)


def supply(
    sources: Sequence[Sequence[Sample]], role: str, rng: np.random.Generator
) -> Iterator[str]:
    """Endless texts: turns of this role of samples drawn by chance, each source as often.

    Raises ValueError where a hundred have none.
    """
    empty = 0
    while empty < EMPTY:
        source = sources[rng.integers(len(sources))]
        said = [
            turn.text
            for dialog in source[int(rng.integers(len(source)))].dialogs
            for turn in dialog
            if turn.role == role
        ]
        text = plain(said[rng.integers(len(said))]) if said else ""
        if len(text) > LONG:
            start = int(rng.integers(len(text) - LONG))
            text = text[start : start + LONG]
            text = text.partition(" ")[2].rpartition(" ")[0] or text  # whole words
        empty = 0 if text else empty + 1
        if text:
            yield text
    raise ValueError(
        f"{EMPTY} samples in a row have no text of the {role}: set ?role= to the other one, or name"
        " other sources"
    )


def plain(text: str) -> str:
    """`text` as one line without invisible marks, which can be drawn and read."""
    seen = "".join(
        c
        for c in text.replace(MARKER, " ")
        if c.isspace() or not (unicodedata.category(c) in UNSEEN or c in VARIANTS)
    )
    return literal(" ".join(seen.split()))


def _background(sources: Sequence[Sample], rng: np.random.Generator) -> Image.Image:
    """The first frame of a sample that has one. Raises ImageError."""
    for _ in range(EMPTY):
        if refs := sources[int(rng.integers(len(sources)))].refs:
            return image.decode_all(refs[:1])[0]
    raise ValueError(f"{EMPTY} samples in a row have no picture: name another source in ?pictures=")


def _number(option: str, value: str) -> int:
    if not value.isdecimal() or (option != "seed" and int(value) < 1):
        raise ValueError(
            f"option {option} must be a whole number{'' if option == 'seed' else ' above 0'}, not"
            f" {value!r}"
        )
    return int(value)
