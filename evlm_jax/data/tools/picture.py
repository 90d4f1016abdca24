"""Rows of `evlm data inspect` as one picture to share: documents with their pictures and tokens,
without masks.
"""

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

from evlm_jax.assets import available
from evlm_jax.data.ocr.fonts import CJK, Face, able, faces, font, width

WIDE, TALL = 1000, 20_000  # pixels; what a picture may grow to, it is cut behind the last row
PX, STEP, GAP, THUMB = 17, 28, 14, 84  # letters, lines, between things, pictures
PAPER, CARD, INK, SOFT, LINE = "#fbfaf7", "#ffffff", "#23252b", "#6b6f7a", "#e6e3dc"
GROUND = {"given": "#f0eee8", "learned": "#c8efd4"}


def draw(rows: Sequence[dict], colours: Sequence[str]) -> Image.Image:
    """The picture.

    Args:
      rows: as `inspect.row` makes them.
      colours: of images, in turn.
    """
    sheet = Image.new("RGB", (WIDE, TALL), PAPER)
    pen, y = ImageDraw.Draw(sheet), GAP
    for number, row in enumerate(rows):
        fill = ", ".join(f"{name} {used} of {room}" for name, used, room, _ in row["fill"])
        _write(pen, GAP, y, f"Row {number}: {fill}", SOFT)
        y += STEP + 4
        for document in row["documents"]:
            bottom = _document(None, document, y, colours)  # measured, for the card lies below
            pen.rounded_rectangle((GAP, y, WIDE - GAP, bottom), 10, CARD, LINE)
            y = _document(sheet, document, y, colours) + GAP // 2
        y += GAP
    return sheet.crop((0, 0, WIDE, y))


def _document(sheet: Image.Image | None, document: dict, top: int, colours: Sequence[str]) -> int:
    """Draws a document's card, where there is a sheet; its bottom."""
    pen = ImageDraw.Draw(sheet or Image.new("RGB", (1, 1)))
    _write(pen, 2 * GAP, top + 6, document["name"], SOFT)
    x, y = 2 * GAP, top + 6 + STEP
    for i, picture in enumerate(document["pictures"]):
        at = (x + i % 2 * (THUMB + 8), y + i // 2 * (THUMB + 8))  # two beside each other
        if sheet:
            image = Image.open(io.BytesIO(base64.b64decode(picture["data"].partition(",")[2])))
            sheet.paste(image.resize((THUMB, THUMB), Image.Resampling.LANCZOS), at)
        pen.rectangle(
            (at[0] - 3, at[1] - 3, at[0] + THUMB + 2, at[1] + THUMB + 2),
            outline=colours[picture["colour"]],
            width=3,
        )
    across, down = min(2, len(document["pictures"])), (len(document["pictures"]) + 1) // 2
    bottom = _tokens(
        pen, document["tokens"], x + across * (THUMB + 8) + 8 * (across > 0), y, colours
    )
    return max(bottom, y + down * (THUMB + 8)) + 8


def _tokens(
    pen: ImageDraw.ImageDraw, tokens: Sequence[dict], left: int, y: int, colours: Sequence[str]
) -> int:
    """Writes tokens from (left, y) on, in lines; where the last one ends.

    A branch begins a line, as on the page.
    """
    x = left
    for token in tokens:
        media, text = token["kind"] == "media", token["text"].replace("\n", "\u21b5")
        long = _width(text) + (12 if media else 2)
        if token["branch"] or x + long > WIDE - 2 * GAP:
            x, y = left, y + STEP
        colour = colours[token["colour"]] if token["see"][1] > token["see"][0] else None
        if media:
            pen.rounded_rectangle((x, y, x + long - 2, y + STEP - 5), 6, colour)
        else:
            pen.rectangle((x, y, x + long - 2, y + STEP - 6), GROUND[token["kind"]])
            if colour:
                pen.line((x, y + STEP - 5, x + long - 2, y + STEP - 5), colour, 2)
        _write(pen, x + (5 if media else 0), y, text, "white" if media else INK)
        x += long
        if token["ends"]:
            text = f" \u2192 {' | '.join(token['ends'])} "
            if x + _width(text) > WIDE - 2 * GAP:
                x, y = left, y + STEP
            _write(pen, x, y, text, SOFT)
            x += _width(text)
    return y + STEP


def _face(text: str) -> Face:
    """DejaVu Sans, or the Chinese font where that lacks a character and this is there."""
    usual = faces("en")[0]
    return usual if able([usual], text) or not available(CJK) else faces("zh")[1]


def _width(text: str) -> int:
    return width(_face(text), PX, text)


def _write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: str) -> None:
    pen.text((x, y + PX), text, colour, font(_face(text), PX), anchor="ls")
