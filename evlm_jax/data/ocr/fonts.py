"""Fonts of synthetic pages: the shipped ones by language, and files that a user names; their
characters, and the ink of a word.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from fontTools.ttLib import TTCollection, TTFont
from PIL import ImageFont

from evlm_jax import assets

LATIN = (  # of those in matplotlib, the ones for text
    *(
        f"DejaVu{kind}.ttf"
        for kind in ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "SansMono-Bold")
    ),
    *(f"DejaVu{kind}.ttf" for kind in ("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")),
    *(f"STIX{kind}.ttf" for kind in ("General", "GeneralBol", "GeneralItalic", "GeneralBolIta")),
)
CJK, SIMPLIFIED, WEIGHTS = (
    "noto-cjk",
    2,
    ("Light", "Regular", "Medium", "Bold"),
)  # asset, number in the collection, its styles
TRIED = 100  # texts in a row that no font can write, before it is an error


@dataclass(frozen=True)
class Face:
    """A font: a file, its number in a collection, the style of a variable font (empty for
    others).
    """

    path: str
    index: int = 0
    style: str = ""


def faces(language: str, files: str = "") -> tuple[Face, ...]:
    """The shipped fonts of a language, and the files of a comma-separated list. A collection (.ttc)
    brings each of its fonts.

    Raises:
      ValueError: there is none, or a file is no font.
    """
    named = [face for file in files.split(",") if file for face in _of_file(file)]
    if language == "en":
        folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
        return (*(Face(os.path.join(folder, name)) for name in LATIN), *named)
    if assets.available(CJK):
        named = [*(Face(str(assets.path(CJK)), SIMPLIFIED, weight) for weight in WEIGHTS), *named]
    if not named:
        raise ValueError(
            f"there is no font for Chinese pages: run `evlm fetch {CJK}`, or name font files with"
            " ?fonts=FILE,FILE"
        )
    return tuple(named)


def _of_file(path: str) -> list[Face]:
    try:
        count = len(TTCollection(path, lazy=True)) if path.lower().endswith((".ttc", ".otc")) else 1
        found = [Face(path, index) for index in range(count)]
        for face in found:
            characters(face)
            font(face, 16)
        return found
    except Exception as error:  # damaged fonts make the readers raise errors of any kind
        raise ValueError(
            f"?fonts={path}: cannot read the font: {type(error).__name__}: {error}"
        ) from error


@functools.cache
def characters(face: Face) -> frozenset[str]:
    """Characters for which a font has a glyph."""
    with TTFont(face.path, fontNumber=face.index, lazy=True) as opened:
        return frozenset(map(chr, opened.getBestCmap()))


def able(faces: Sequence[Face], text: str) -> tuple[Face, ...]:
    """Fonts with a glyph for every character of the text, white space aside."""
    wanted = frozenset("".join(text.split()))
    return tuple(face for face in faces if wanted <= characters(face))


def writable(faces: Sequence[Face], texts: Iterable[str]) -> tuple[str, tuple[Face, ...]]:
    """The first text that some font can write, and those fonts.

    Raises ValueError where a hundred cannot be written.
    """
    for tried, text in enumerate(texts):
        if found := able(faces, text):
            return text, found
        if tried == TRIED:
            lacking = (
                "".join(sorted(set("".join(text.split())).difference(*map(characters, faces))))
                or text
            )
            raise ValueError(
                f"no font has the characters {lacking!r}, nor those of {TRIED} texts before: name"
                " font files with ?fonts=FILE"
            )
    raise ValueError("there is no text")


@functools.lru_cache(64)
def font(face: Face, px: int) -> ImageFont.FreeTypeFont:
    """Laid out glyph by glyph, without shaping: the same on every machine, whatever Pillow was
    built with.
    """
    opened = ImageFont.truetype(
        face.path, px, index=face.index, layout_engine=ImageFont.Layout.BASIC
    )
    if face.style:
        opened.set_variation_by_name(face.style)
    return opened


def width(face: Face, px: int, text: str) -> int:
    """Pixels that the pen moves on."""
    return round(font(face, px).getlength(text))


@functools.lru_cache(1 << 14)
def ink(face: Face, px: int, word: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is black, relative to the pen on the base line.

    Raises ValueError where nothing is.
    """
    mask, (left, top) = font(face, px).getmask2(word, mode="L", anchor="ls")
    box = mask.getbbox()
    if box is None:
        raise ValueError(f"{word!r} leaves no ink in {os.path.basename(face.path)}")
    return box[0] + left, box[1] + top, box[2] + left, box[3] + top
