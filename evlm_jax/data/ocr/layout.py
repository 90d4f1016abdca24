"""Where the words of a synthetic page stand: drawn by chance, in reading order, on a flat sheet.
Nothing is drawn here.

    article                     list                 table               dense            sign
    HEADING                     Heading              ┌────┬────┬────┐    ·············
    ·········    ·········       1. ·········        │ ·· │ ·· │ ·· │    ·············     BIG
    ········     ········        2. ······           ├────┼────┼────┤    ·············     WORDS
    ·········    ·········       3. ········         └────┴────┴────┘    ·············

Columns are read one after the other, tables row by row: a row is a line.
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from evlm_jax.data.ocr.fonts import Face, able, ink, width, writable

Box = tuple[
    int, int, int, int
]  # left, top, right, bottom; right and bottom are the first pixels outside
CJK = re.compile(r"[\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\uff00-\uffef]")
NEVER_FIRST = frozenset("，。！？、；：）》」』”’…,.!?;:)]}%")  # in a line
SCALE = {"en": 1.0, "zh": 1.25}  # Chinese characters need more pixels


@dataclass(frozen=True, slots=True)
class Word:
    """Text without spaces, drawn with the pen at (x, y) on the base line."""

    text: str
    face: Face
    px: int
    x: int
    y: int

    @property
    def box(self) -> Box:
        """Bounding box of its ink."""
        left, top, right, bottom = ink(self.face, self.px, self.text)
        return self.x + left, self.y + top, self.x + right, self.y + bottom


@dataclass(frozen=True, slots=True)
class Line:
    """Words that are read together."""

    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """The line's text as it is to be read."""
        return " ".join(word.text for word in self.words)

    @property
    def box(self) -> Box:
        """Bounding box of the ink of all its words."""
        lefts, tops, rights, bottoms = zip(*(word.box for word in self.words))
        return min(lefts), min(tops), max(rights), max(bottoms)


@dataclass
class Sheet:
    """A page in the making.

    Args:
      size: width and height in pixels.
      texts: endless supply of texts.
      characters: most that may still be written.
    """

    size: tuple[int, int]
    language: str
    faces: tuple[Face, ...]
    texts: Iterator[str]
    rng: np.random.Generator
    characters: int
    lines: list[Line] = field(default_factory=list)
    rules: list[Box] = field(default_factory=list)  # black strokes of tables

    def px(self, low: int, high: int) -> int:
        """A font size for this language, between those for Latin letters."""
        return round(self.rng.integers(low, high + 1) * SCALE[self.language])

    def text(self) -> tuple[str, tuple[Face, ...]]:
        """The next text that can be written, and the fonts that have its characters."""
        return writable(self.faces, self.texts)

    def choose(self, faces: tuple[Face, ...], usual: Face | None = None) -> Face:
        """The usual font if it is among them, else any."""
        return usual if usual in faces else faces[self.rng.integers(len(faces))]

    def add(self, line: Line) -> bool:
        """Whether the line was written; the first always is."""
        if self.lines and len(line.text) > self.characters:
            self.characters = 0
            return False
        self.characters = max(0, self.characters - len(line.text))
        self.lines.append(line)
        return True


def wrap(text: str, face: Face, px: int, room: int) -> list[list[str]]:
    """Lines of words that are at most `room` wide, but for a single character that is wider.

    Words are broken where they are Chinese, or alone wider than a line; a line does not begin with
    a closing mark if that can be helped."""
    lines, line, used, space = [], [], 0, width(face, px, " ")
    for word in text.split():
        while word:
            left = room - used - (space if line else 0)
            head = 0
            if width(face, px, word) <= left:
                head = len(word)
            elif CJK.search(word) or width(face, px, word) > room:
                head = bisect.bisect_right(
                    range(1, len(word)), left, key=lambda n: width(face, px, word[:n])
                )
                while head > 1 and word[head] in NEVER_FIRST:
                    head -= 1
            head = head or int(not line)  # an empty line takes a character at least
            if head:
                line.append(word[:head])
                used += space * (len(line) > 1) + width(face, px, word[:head])
            word = word[head:]
            if word:
                lines.append(line)
                line, used = [], 0
    return [*lines, line] if line else lines


def row(words: list[str], face: Face, px: int, x: int, y: int) -> Line:
    """Words from (x, y) on, a space apart."""
    placed, space = [], width(face, px, " ")
    for word in words:
        placed.append(Word(word, face, px, x, y))
        x += width(face, px, word) + space
    return Line(tuple(placed))


def write(
    sheet: Sheet,
    text: str,
    face: Face,
    px: int,
    x: int,
    y: int,
    room: int,
    bottom: int,
    spacing: float,
    middle: bool = False,
) -> int:
    """Writes lines from the top `y` on until `bottom`; where the next may begin.

    What finds no place is not written.
    """
    step = round(px * spacing)
    for words in wrap(text, face, px, room):
        if y + step > bottom or not sheet.characters:
            return bottom
        line = row(words, face, px, x, y + px)
        if middle:
            line = row(words, face, px, x + max(0, (room - (line.box[2] - x)) // 2), y + px)
        if not sheet.add(line):
            return bottom
        y += step
    return y


def article(
    sheet: Sheet, low: int = 11, high: int = 17, most_columns: int = 3, tight: bool = False
) -> None:
    """Maybe a heading, then columns of paragraphs.

    `low` and `high`: font sizes; `tight`: as much text as there is room for.
    """
    rng, (w, h) = sheet.rng, sheet.size
    margin = max(4, round((0.02 if tight else rng.uniform(0.04, 0.1)) * min(w, h)))
    px, spacing, top = (
        sheet.px(low, high),
        rng.uniform(1.15, 1.3) if tight else rng.uniform(1.2, 1.6),
        margin,
    )
    columns = int(rng.integers(1, max(1, min(most_columns, w // (px * 14))) + 1))
    _, found = sheet.text()
    usual = sheet.choose(found)
    if not tight and rng.random() < 0.7:
        top = heading(sheet, margin, top, px)
    gap = px * 2
    room = (w - 2 * margin - (columns - 1) * gap) // columns
    for column in range(columns):
        x, y = margin + column * (room + gap), top
        while y + px * spacing <= h - margin and sheet.characters:
            text, found = paragraph(sheet, int(rng.integers(60, 400)))
            y = write(sheet, text, sheet.choose(found, usual), px, x, y, room, h - margin, spacing)
            y += 0 if tight else round(px * rng.uniform(0.3, 1.0))


def heading(sheet: Sheet, x: int, y: int, px: int) -> int:
    """One text in larger letters; where the rest may begin."""
    w, h = sheet.size
    text, found = sheet.text()
    size = round(px * sheet.rng.uniform(1.3, 2.0))
    return (
        write(
            sheet,
            text,
            sheet.choose(found),
            size,
            x,
            y,
            w - 2 * x,
            h // 3,
            1.25,
            bool(sheet.rng.random() < 0.5),
        )
        + px // 2
    )


def paragraph(sheet: Sheet, letters: int) -> tuple[str, tuple[Face, ...]]:
    """Texts after each other, a full stop behind each, until there are so many letters; the fonts
    that have all of it.
    """
    stop, gap = ("。", "") if sheet.language == "zh" else (".", " ")
    made, found = "", sheet.faces
    while len(made) < letters / SCALE[sheet.language]:
        text, _ = sheet.text()
        ended = text if text[-1] in NEVER_FIRST else text + stop
        both = f"{made}{gap if made else ''}{ended}"
        if not able(sheet.faces, both):
            return (made, found) if made else (text, able(sheet.faces, text))
        made, found = both, able(sheet.faces, both)
    return made, found


def dense(sheet: Sheet) -> None:
    """Small letters all over."""
    article(sheet, 9, 11, 2, tight=True)


def items(sheet: Sheet) -> None:
    """A heading and a list, numbered or with dashes."""
    rng, (w, h) = sheet.rng, sheet.size
    margin, px = max(4, round(rng.uniform(0.04, 0.1) * min(w, h))), sheet.px(12, 18)
    y, numbered, spacing = (
        heading(sheet, margin, margin, px),
        rng.random() < 0.5,
        rng.uniform(1.2, 1.6),
    )
    number, usual = 1, sheet.choose(sheet.text()[1])
    while y + px * spacing <= h - margin and sheet.characters:
        text, _ = sheet.text()
        item = f"{f'{number}.' if numbered else '-'} {text}"
        if found := able(sheet.faces, item):
            y = (
                write(
                    sheet,
                    item,
                    sheet.choose(found, usual),
                    px,
                    margin,
                    y,
                    w - 2 * margin,
                    h - margin,
                    spacing,
                )
                + px // 3
            )
            number += 1
        else:
            return


def table(sheet: Sheet) -> None:
    """A grid of short texts, with rules."""
    rng, (w, h) = sheet.rng, sheet.size
    margin, px = max(4, round(rng.uniform(0.04, 0.1) * min(w, h))), sheet.px(11, 15)
    y = heading(sheet, margin, margin, px) if rng.random() < 0.5 else margin
    high, columns = (
        round(px * rng.uniform(1.7, 2.4)),
        int(rng.integers(2, max(2, min(5, w // (px * 7))) + 1)),
    )
    wide, top = (w - 2 * margin) // columns, y
    most, usual = int(rng.integers(3, 13)), sheet.choose(sheet.text()[1])
    while (y - top) // high < most and y + high <= h - margin and sheet.characters:
        cells = []
        for column in range(columns):
            text, found = sheet.text()
            face = sheet.choose(found, usual)
            words = wrap(text, face, px, wide - px)[0]  # what fits
            cells += row(
                words, face, px, margin + column * wide + px // 2, y + (high + round(0.7 * px)) // 2
            ).words
        if not sheet.add(Line(tuple(cells))):
            break
        y += high
    rows = (y - top) // high
    sheet.rules += [
        (margin, top + i * high, margin + columns * wide + 1, top + i * high + 1)
        for i in range(rows + 1)
    ]
    sheet.rules += [
        (margin + i * wide, top, margin + i * wide + 1, top + rows * high + 1)
        for i in range(columns + 1)
    ]


def sign(sheet: Sheet) -> None:
    """A few large words."""
    rng, (w, h) = sheet.rng, sheet.size
    margin, px = (
        max(4, w // 20),
        min(sheet.px(22, 44), h // 3),
    )  # of a third, so that the first line has room
    y = round(h * rng.uniform(0.05, 0.3))
    for _ in range(rng.integers(1, 4)):
        text, found = sheet.text()
        y = write(
            sheet,
            text,
            sheet.choose(found),
            px,
            margin,
            y,
            w - 2 * margin,
            h - margin,
            1.25,
            middle=True,
        )
        px = max(12, round(px * rng.uniform(0.6, 1.0)))


LAYOUTS = {
    "article": (article, 0.35),
    "list": (items, 0.2),
    "table": (table, 0.15),
    "dense": (dense, 0.15),
    "sign": (sign, 0.15),
}


def lay_out(sheet: Sheet, names: Sequence[str]) -> Sheet:
    """Fills `sheet` by a layout drawn from the names in LAYOUTS; a name that occurs twice is drawn
    twice as often.

    Raises ValueError where no line fits.
    """
    made, often = zip(*(LAYOUTS[name] for name in names))
    make = made[sheet.rng.choice(len(made), p=np.array(often) / sum(often))]
    make(sheet)
    if not sheet.lines:
        raise ValueError(
            f"a sheet of {sheet.size[0]} x {sheet.size[1]} pixels has no room for a line: make"
            " ?size= larger"
        )
    return sheet
