"""Real pages: a detector has said where text is, what it is and how sure it is; rules say which
pages are worth training on.

A row, of any container:

    {"image": "a.jpg", "width": 800, "height": 600, "boxes": [{"box": [x1, y1, x2, y2], "text":
    "Exit", "confidence": 0.97}, ...]}

in pixels and reading order; a box may also be four corners [[x, y], ...], and what has no
confidence is sure. Rules, in the order in which they are asked:

    page_characters                         too little text that is legible
    damaged, single colour, aspect, side    of the picture, as for captions
    page_similarity                         much the same text as an earlier page that was kept

Of pages that are kept, texts below page_confidence are painted over.
"""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from evlm_jax.config import EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.clean import Cleaner, Receipt, clean, picture_rule
from evlm_jax.data.containers import files, rows
from evlm_jax.data.formats.fields import facts, files_of, listed, members, number, pixels, words
from evlm_jax.data.ocr.dialogs import ASKED, DIALOGS, dialogs
from evlm_jax.data.ocr.twins import Twins
from evlm_jax.data.samples import ImageRef, Sample, literal
from evlm_jax.data.source import Chain, Source, key_of
from evlm_jax.paths import local

MARGIN, RADIUS = 2, 3  # pixels: around an illegible box; of what its new pixels are made of


@dataclass(frozen=True, slots=True)
class Found:
    """A text and its corners in pixels, clockwise from the left top."""

    text: str
    corners: tuple[tuple[float, float], ...]
    confidence: float

    def shares(self, size: tuple[int, int]) -> np.ndarray:
        """Corners as shares of width and height, float [4, 2]."""
        return np.array(self.corners) / size

    def box(self, size: tuple[int, int]) -> np.ndarray:
        """Upright, as shares: left, top, right, bottom."""
        corners = self.shares(size)
        return np.concatenate([corners.min(0), corners.max(0)])


@dataclass(frozen=True, slots=True)
class Scan:
    """A picture and the texts that were found in it, in reading order."""

    key: str
    source: str
    file: str
    size: tuple[int, int]
    found: tuple[Found, ...]


def scan(name: str, root: str, row: dict) -> Scan:
    """The scan of a row. Raises KeyError for a missing field, ValueError for an invalid box."""
    told = facts(row)
    (file,) = files_of(row, root, "image") or members(row)
    return Scan(
        key_of(row),
        name,
        file,
        pixels(told),
        tuple(_found(entry) for entry in told["boxes"]),
    )


def _found(entry: dict) -> Found:
    box = listed(entry["box"], "box")
    if len(box) == 4 and not isinstance(box[0], Sequence):
        x1, y1, x2, y2 = box
        box = (x1, y1), (x2, y1), (x2, y2), (x1, y2)
    if [len(corner) if isinstance(corner, Sequence) else 0 for corner in box] != [2] * 4:
        raise ValueError(f"a box must be x1, y1, x2, y2 or four corners, not {entry['box']}")
    corners = tuple((number(x, "box"), number(y, "box")) for x, y in box)
    text, sure = entry["text"], entry.get("confidence", 1)
    return Found(" ".join(words(text, "text").split()), corners, number(sure, "confidence"))


def open_scans(path: str, images: str = "") -> Chain:
    """The pages of all container files of a path, for `build`.

    Pictures are in the folder `images` beside each file.
    """
    return _open(path, path, images, lambda page: page)


def detected(name: str, path: str, *, images: str = "", language: str = "en") -> Chain:
    """Scanned pages as samples, with the questions of synthetic pages about the detected texts.

    `language`: of the questions, en or zh.
    """
    if language not in ASKED:
        raise ValueError(
            f"data source {name!r}: language must be one of {', '.join(ASKED)}, not {language!r}"
        )

    def sample(page: Scan) -> Sample:
        if not page.found:
            raise ValueError("there is no text in `boxes`")
        lines = [(literal(found.text), found.box(page.size)) for found in page.found]
        asked = dialogs(
            language, lines, lines, np.random.default_rng(zlib.crc32(page.key.encode()))
        )
        return Sample(page.key, name, ((ImageRef(page.file),),), asked)

    return _open(name, path, images, sample)


def _open(name: str, path: str, images: str, make: Callable[[Scan], Scan | Sample]) -> Chain:
    parts = []
    for file in rows.find(path):
        root = files.join(files.parent(file), images)

        def mapper(row, root=root):
            return make(scan(name, root, row))

        parts.append(Source(name, rows.open_rows(file), mapper, lambda row: DIALOGS, where=file))
    return Chain(name, parts)


@dataclass
class Pages(Cleaner):
    """Cleans scans, as `clean.Captions` cleans captions; the receipt counts pages, and boxes."""

    def __post_init__(self):
        self._twins = Twins(self.cfg.clean.page_similarity)

    def judge(self, page: Scan) -> str:
        """The rule that objects to a page by itself; empty if none does. May run in a thread."""
        legible = "".join(found.text for found in self.split(page)[0])
        if len("".join(legible.split())) < self.cfg.clean.page_characters:
            return "page_characters"
        return picture_rule((ImageRef(page.file),), self.cfg.clean)

    def note(self, page: Scan, rule: str) -> Scan | None:
        """Enters a judgement in the receipt; the page, or None if it is dropped, also for what came
        before.
        """
        legible, faint = self.split(page)
        if not rule and self._twins.seen("\n".join(found.text for found in legible)):
            rule = "page_similarity"
        name = f"{page.source}/{page.key}"
        self.receipt.add("page", rule, name)
        for found in page.found:
            self.receipt.add(
                "box",
                "of a dropped page" if rule else "page_confidence" if found in faint else "",
                name,
            )
        return None if rule else page

    def split(self, page: Scan) -> tuple[list[Found], list[Found]]:
        """What is legible, what is not."""

        def sure(found):
            return bool(found.text) and found.confidence >= self.cfg.clean.page_confidence

        return [found for found in page.found if sure(found)], [
            found for found in page.found if not sure(found)
        ]


def build(source: Chain, out: str | Path, cfg: EVLMConfig, workers: int | None = None) -> Receipt:
    """Writes the pages that are kept to `out`/pages.jsonl, which `detected:` reads, and what was
    painted over to `out`/NUMBER.png.

    A picture with nothing to paint over stays where it is, with a link to it in `out`. The file
    appears when all is done."""
    out, cleaner = local(out, "the folder of cleaned pages"), Pages(cfg)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "pages.jsonl.part", "w", encoding="utf-8") as lines:
        for number, page in clean(source, cleaner, workers):
            legible, faint = cleaner.split(page)
            file = f"{number}.png"
            if not faint:
                file = _keep(page.file, out, number)
            else:
                paint_over(
                    image.decode(page.file), [found.shares(page.size) for found in faint]
                ).save(out / file)
            boxes = [
                {"box": found.corners, "text": found.text, "confidence": found.confidence}
                for found in legible
            ]
            row = {
                "id": page.key,
                "image": file,
                "width": page.size[0],
                "height": page.size[1],
                "boxes": boxes,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(lines.name, out / "pages.jsonl")
    return cleaner.receipt


def _keep(path: str, out: Path, number: int) -> str:
    """The name in `out` of a picture that stays as it is: a link to a file on this disk, a copy of
    what lies elsewhere.
    """
    link = out / f"{number}{os.path.splitext(path)[1] or '.jpg'}"
    link.unlink(missing_ok=True)
    if isinstance(path, files.Ref) or files.remote(path):
        with rows.open_ref(path) as file:
            link.write_bytes(file.read())
    else:
        link.symlink_to(os.path.abspath(path))
    return link.name


def paint_over(picture: Image.Image, quads: Sequence[np.ndarray]) -> Image.Image:
    """The picture with these quadrilaterals [4, 2], shares of width and height, inpainted from
    around them (Telea).
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            'illegible boxes are painted over by OpenCV: pip install -e ".[clean]", or set'
            " clean.page_confidence to 0"
        ) from error
    mask = Image.new("L", picture.size, 0)
    pen = ImageDraw.Draw(mask)
    for quad in quads:
        pen.polygon([tuple(corner) for corner in quad * picture.size], fill=255)
    mask = mask.filter(ImageFilter.MaxFilter(2 * MARGIN + 1))
    return Image.fromarray(
        cv2.inpaint(np.asarray(picture), np.asarray(mask), RADIUS, cv2.INPAINT_TELEA)
    )
