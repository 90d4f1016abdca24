"""A scene as a picture. Cut-outs and grounds are kept in memory at the size that scenes need."""

import functools
import io

from PIL import Image, ImageDraw

from evlm_jax.asset_pictures import inked
from evlm_jax.data.ocr.fonts import font, ink
from evlm_jax.data.scenes.compose import COLOURS, Scene, Thing, stroke
from evlm_jax.data.scenes.material import Drawing
from evlm_jax.data.scenes.render import paint

LONGEST = 0.5  # of a cut-out over the side of the picture
ROOM = 1.35  # side of the part of a ground that windows are taken of, over that of the picture
FINE = 4  # a disc is drawn so many times as large, and made small


def shape(drawing: Drawing) -> tuple[int, int]:
    """Width and height of a cut-out."""
    return _opened(drawing.path).size


def _read(path: str, mode: str) -> Image.Image:
    """Raises ValueError that names a damaged file."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError) as error:  # Pillow raises either
        raise ValueError(
            f"{path}: damaged, or no picture; replace or remove it: {error}"
        ) from error


@functools.cache
def _opened(path: str) -> Image.Image:
    """RGBA without an empty border. Raises ValueError for one that is nothing but border."""
    image = _read(path, "RGBA")
    box = inked(image)
    if box is None:
        raise ValueError(f"{path}: the cut-out is empty")
    return image.crop(box)


@functools.cache
def _cut_out(path: str, most: int, mirrored: bool) -> Image.Image:
    """At the largest size that a scene shows it in, or its own."""
    image = _opened(path).copy()
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


@functools.cache
def _ground(path: str, side: int, mirrored: bool) -> Image.Image:
    """The square in the middle of a photograph."""
    image = _read(path, "RGB")
    width, height = image.size
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    box = (left, top, left + square, top + square)
    image = image.resize((side, side), Image.Resampling.LANCZOS, box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def draw(scene: Scene, bare: bool = False) -> Image.Image:
    """RGB; `bare`: without disc and texts."""
    image = _pasted(scene) if scene.room is None else _rendered(scene)
    if bare:
        return image
    _place_disc(image, scene.disc)
    for text in scene.texts:
        _write(image, text)
    return image


def _pasted(scene: Scene) -> Image.Image:
    size, room = scene.size, round(ROOM * scene.size)
    left, top = (round(share * (room - size)) for share in scene.window)
    image = _ground(scene.ground, room, scene.mirrored).crop((left, top, left + size, top + size))
    for thing in scene.objects:
        place_object(image, thing)
    return image


def _rendered(scene: Scene) -> Image.Image:
    standing = [(thing.drawing.path, thing.spot) for thing in scene.objects]
    return paint(scene.room, scene.ground, standing, scene.size)


def place_object(image: Image.Image, thing: Thing) -> None:
    """Pastes a cut-out into its box."""
    left, top, right, bottom = thing.box
    most = round(LONGEST * max(image.size))
    cut = _cut_out(thing.drawing.path, most, thing.mirrored)
    cut = cut.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    image.paste(cut, (left, top), cut)


@functools.cache
def _disc(wide: int) -> tuple[Image.Image, Image.Image]:
    """How far a disc with and one without its border cover their pixels."""
    masks = []
    for border in (0, FINE):
        mask = Image.new("L", (FINE * wide, FINE * wide))
        ImageDraw.Draw(mask).ellipse(
            (border, border, FINE * wide - 1 - border, FINE * wide - 1 - border), 255
        )
        masks.append(mask.resize((wide, wide), Image.Resampling.BOX))
    return tuple(masks)


def _place_disc(image: Image.Image, disc: Thing) -> None:
    """With a border of the contrary brightness, so that a white one is seen on snow."""
    colour = COLOURS[disc.what]
    whole, inner = _disc(disc.box[2] - disc.box[0])
    image.paste((0, 0, 0) if sum(colour) > 250 else (255, 255, 255), disc.box[:2], whole)
    image.paste(colour, disc.box[:2], inner)


def _write(image: Image.Image, text: Thing) -> None:
    """In capitals, with a border."""
    edge, letters = stroke(max(image.size)), text.what.upper()
    left, top, _, _ = ink(text.face, text.px, letters)
    at = (text.box[0] + edge - left, text.box[1] + edge - top)
    fill, border = ("white", "black") if text.light else ("black", "white")
    ImageDraw.Draw(image).text(
        at,
        letters,
        fill,
        font(text.face, text.px),
        anchor="ls",
        stroke_width=edge,
        stroke_fill=border,
    )


def encoded(scene: Scene, bare: bool = False) -> bytes:
    """As a file without loss, the fastest to write."""
    file = io.BytesIO()
    draw(scene, bare).save(file, "BMP")
    return file.getvalue()
