"""A synthetic page: its flat sheet, how the sheet lies in the picture, and the picture itself.

A function of (seed, number).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from evlm_jax.data.ocr.fonts import Face, font
from evlm_jax.data.ocr.layout import Box, Sheet, lay_out

LYING = 0.6  # share of pages that lie on a picture; the others fill theirs


@dataclass(frozen=True)
class Page:
    """Description of a page, before it is drawn.

    Args:
      size: width and height of the picture.
      sheet: its words and lines, flat.
      quad: corners of the sheet (left top, right top, right bottom, left bottom) in the picture,
        float [4, 2].
      lies: on a background; otherwise the sheet is the whole picture.
    """

    size: tuple[int, int]
    sheet: Sheet
    quad: np.ndarray
    lies: bool

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """float [3, 3], from points of the sheet to points of the picture."""
        return homography(self.sheet.size, self.quad)

    def place(self, boxes: Sequence[Box]) -> np.ndarray:
        """The upright boxes in the picture around boxes on the sheet: float [n, 4], as shares of
        width and height.
        """
        corners = np.array(boxes)[:, [(0, 1), (2, 1), (2, 3), (0, 3)]]
        placed = project(self.matrix, corners.reshape(-1, 2)).reshape(-1, 4, 2) / self.size
        return np.concatenate([placed.min(1), placed.max(1)], 1)


def compose(
    seed: tuple[int, ...],
    size: int,
    language: str,
    faces: tuple[Face, ...],
    texts: Callable[..., Iterator[str]],
    characters: int,
    lying: bool,
    layouts: Sequence[str],
) -> Page:
    """The page of a seed.

    Args:
      size: longer side of the picture.
      texts: maps a random generator to an endless iterator of texts.
      characters: most characters of a page.
      lying: whether there are pictures for backgrounds.
      layouts: names of those that are drawn from.
    """
    rng = np.random.default_rng((*seed, 0))
    shape = np.array([1, rng.uniform(0.7, 1)] if rng.random() < 0.5 else [rng.uniform(0.7, 1), 1])
    whole = np.round(size * shape).astype(int)
    quad = whole * np.array([(0, 0), (1, 0), (1, 1), (0, 1)], float)
    lies = bool(lying and rng.random() < LYING)
    if lies:
        inward = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
        quad += whole * inward * rng.uniform(0.01, 0.1, (4, 2))
    sides = np.linalg.norm(quad - np.roll(quad, 1, 0), axis=1)  # left, top, right, bottom
    flat = round((sides[1] + sides[3]) / 2), round((sides[0] + sides[2]) / 2)
    sheet = Sheet(flat, language, faces, texts(rng), rng, characters)
    return Page((int(whole[0]), int(whole[1])), lay_out(sheet, layouts), quad, lies)


def homography(size: tuple[int, int], quad: np.ndarray) -> np.ndarray:
    """float [3, 3] that maps the corners of a sheet of this size to the corners of a quadrilateral
    [4, 2].
    """
    w, h = size
    rows, values = [], []
    for (x, y), (u, v) in zip(((0, 0), (w, 0), (w, h), (0, h)), quad):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows, float), np.array(values)), 1).reshape(3, 3)


def project(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [n, 2] through a homography."""
    u, v, w = matrix @ np.concatenate([points, np.ones((len(points), 1))], 1).T
    return np.stack([u / w, v / w], 1)


def draw(
    page: Page, seed: tuple[int, ...], background: Callable[[np.random.Generator], Image.Image]
) -> tuple[Image.Image, int]:
    """The picture, RGB, and the quality at which it is to be saved as JPEG.

    Args:
      background: maps a random generator to a picture; called if the page lies on one.
    """
    rng = np.random.default_rng((*seed, 1))
    paper, black = colours(rng)
    sheet = textured(paper, page.sheet.size, rng)
    write_words(sheet, page.sheet, black)
    picture = onto(background(rng), sheet, page) if page.lies else sheet
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    return worn(picture, rng), int(rng.integers(50, 96))


def colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours of the paper and of the ink: light and dark, sometimes the other way round."""
    light, dark = (
        rng.uniform(200, 255) + rng.uniform(-20, 10, 3),
        rng.uniform(0, 70) + rng.uniform(-20, 40, 3),
    )
    pair = light.clip(0, 255), dark.clip(0, 255)
    return pair if rng.random() < 0.85 else pair[::-1]


def textured(colour: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Paper: a colour with stains, large and weak, and fibres, small and weaker."""
    stains = Image.fromarray(_noise(rng, 8, (6, 6))).resize(size, Image.Resampling.BICUBIC)
    paper = np.asarray(stains) + _noise(rng, 5, (size[1], size[0]))
    return _picture(colour.astype(np.float32) + paper[..., None])


def write_words(image: Image.Image, sheet: Sheet, colour: np.ndarray) -> None:
    """Words and rules."""
    pen, fill = ImageDraw.Draw(image), tuple(int(value) for value in colour)
    for left, top, right, bottom in sheet.rules:
        pen.rectangle((left, top, right - 1, bottom - 1), fill=fill)
    for line in sheet.lines:
        for word in line.words:
            pen.text(
                (word.x, word.y), word.text, fill=fill, font=font(word.face, word.px), anchor="ls"
            )


def onto(background: Image.Image, sheet: Image.Image, page: Page) -> Image.Image:
    """The sheet pasted on a picture, which is stretched to the page's size."""
    back = np.linalg.inv(page.matrix)

    def warp(image):
        return image.transform(
            page.size,
            Image.Transform.PERSPECTIVE,
            (back / back[2, 2]).ravel()[:8],
            Image.Resampling.BICUBIC,
        )

    picture = background.resize(page.size, Image.Resampling.BICUBIC)
    picture.paste(warp(sheet), mask=warp(Image.new("L", sheet.size, 255)))
    return picture


def worn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A shadow across, and the noise of a camera."""
    w, h = image.size
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    across = np.linspace(-0.5, 0.5, w) * np.cos(angle) + np.linspace(-0.5, 0.5, h)[
        :, None
    ] * np.sin(angle)
    light = (1 - depth * (across + 0.5).clip(0, 1)).astype(np.float32)
    return _picture(np.asarray(image) * light[..., None] + _noise(rng, 8, (h, w, 3)))


def _noise(rng: np.random.Generator, most: float, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, float32, of a strength up to `most` of 255."""
    return rng.standard_normal(shape, np.float32) * np.float32(rng.uniform(0, most))


def _picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
