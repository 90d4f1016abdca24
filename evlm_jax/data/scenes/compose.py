"""The truth of a scene: what is in it and where, a function of the seed and the number alone.

Sizes are of a picture with 112 pixels a side, and grow with it. Three kinds of scenes: `one` large
object, a `group` of one to six copies, a `pair` of two objects of different names and sizes. Each
has a coloured disc and a written digit, word, or both; the disc is clearly to the left or right of
one of the others, or above or below it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from evlm_jax.data.ocr.fonts import Face, able, ink
from evlm_jax.data.scenes.boxes import MARGIN, Box, close
from evlm_jax.data.scenes.material import Drawing, Material
from evlm_jax.data.scenes.room import Room, Spot, stand

UNIT = 112
KINDS = {"one": 0.35, "group": 0.45, "pair": 0.2}
COLOURS = {
    "red": (226, 32, 32),
    "green": (32, 168, 48),
    "blue": (40, 64, 228),
    "yellow": (244, 220, 32),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "purple": (146, 44, 178),
    "orange": (250, 138, 20),
}
SIDES = ("left", "right", "above", "below")
MOST = 6  # of one name
DIGITS = tuple("0123456789")
CLEAR = 1.5  # the longer way between two centres over the shorter one; also of distances and sizes
TRIES = 40
SHRINK = 0.96  # where things did not fit


class Thing(NamedTuple):
    """Something in a scene."""

    kind: str  # object, disc, digit or word
    what: str  # its name, colour or text
    box: Box  # of all its pixels
    drawing: Drawing | None = None  # of an object
    mirrored: bool = False
    face: Face | None = None  # of a text
    px: int = 0
    light: bool = False  # white with a dark border; else the other way round
    spot: Spot | None = None  # where a model stands

    @property
    def centre(self) -> tuple[float, float]:
        """Of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """What is drawn, and what is true of it."""

    number: int
    size: int  # pixels a side
    kind: str
    ground: str  # file
    window: tuple[float, float]  # where the part of the ground that is shown begins, 0 to 1
    mirrored: bool  # the ground
    objects: tuple[Thing, ...]
    disc: Thing
    texts: tuple[Thing, ...]
    reference: Thing  # what the disc is placed beside
    side: str  # of SIDES: where the disc is from there
    room: Room | None = None  # that models stand in, whose looks are the ground's

    @property
    def things(self) -> tuple[Thing, ...]:
        """All of them."""
        return (*self.objects, self.disc, *self.texts)


def compose(
    material: Material,
    words: tuple[str, ...],
    seed: str,
    number: int,
    size: int,
    shape: Callable[[Drawing], tuple[int, int]],
) -> Scene:
    """Scene `number`.

    Args:
      seed: names the scenes of a source; another one has other scenes.
      shape: width and height of a cut-out; models have their own.
    """
    rng = random.Random(f"scene {seed} {number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    ground, window = rng.choice(material.grounds), (rng.random(), rng.random())
    mirrored = rng.random() < 0.5
    objects, texts = _chosen(material, words, kind, rng)
    colour, side = rng.choice(list(COLOURS)), rng.choice(SIDES)
    scale = size / UNIT
    diameter = rng.uniform(15, 20)
    beside, count = rng.randrange(len(texts) + (kind == "one")), len(objects) + len(texts)
    while True:
        if material.hulls:
            where, things = _standing(objects, scale, material, size, rng)
        else:
            where, things = None, [_sized(thing, long * scale, shape) for thing, long in objects]
        things += [_written(text, long * scale, size) for text, long in texts]
        disc = Thing("disc", colour, (0, 0, *[round(diameter * scale)] * 2))
        at = len(objects) + beside if beside < len(texts) else 0
        placed = len(things) == count and _placed(things, disc, at, side, size, rng)
        if placed:
            break
        objects = [(thing, long * SHRINK) for thing, long in objects]
        texts = [(text, long * SHRINK) for text, long in texts]
    *things, disc = placed
    return Scene(
        number,
        size,
        kind,
        ground,
        window,
        mirrored,
        tuple(things[: len(objects)]),
        disc,
        tuple(things[len(objects) :]),
        things[at],
        side,
        where,
    )


def _chosen(material: Material, words: tuple[str, ...], kind: str, rng: random.Random):
    """Objects and texts, each with its longer side, or its size of letters."""
    names = sorted(material.names)
    first, second = rng.sample(names, 2)

    def drawn(name):
        return Thing("object", name, (0, 0, 0, 0), rng.choice(material.drawings[name]))

    if kind == "one":
        objects, wanted = [(drawn(first), rng.uniform(40, 56))], ["digit", "word"]
    elif kind == "pair":
        objects = [(drawn(first), rng.uniform(42, 52)), (drawn(second), rng.uniform(24, 30))]
        wanted = [rng.choice(["digit", "word"])]
        rng.shuffle(objects)
    else:
        count, long, thing = rng.randint(1, MOST), rng.uniform(25, 32), drawn(first)
        objects = [(thing, long * rng.uniform(0.94, 1.0)) for _ in range(count)]
        wanted = ["digit"] + ["word"] * (count <= 2)
    objects = [(thing._replace(mirrored=rng.random() < 0.5), long) for thing, long in objects]
    texts = []
    for text in wanted:
        what = rng.choice(DIGITS if text == "digit" else words)
        face = rng.choice(able(material.fonts, what.upper()))
        px = rng.uniform(24, 31) if text == "digit" else rng.uniform(19, 24)
        texts.append((Thing(text, what, (0, 0, 0, 0), face=face, light=rng.random() < 0.5), px))
    return objects, texts


def _sized(thing: Thing, long: float, shape: Callable[[Drawing], tuple[int, int]]) -> Thing:
    """An object of this longer side, at the corner."""
    width, height = shape(thing.drawing)
    scale = long / max(width, height)
    return thing._replace(box=(0, 0, max(1, round(width * scale)), max(1, round(height * scale))))


def _standing(
    objects: list[tuple[Thing, float]],
    scale: float,
    material: Material,
    size: int,
    rng: random.Random,
) -> tuple[Room | None, list[Thing]]:
    """Objects in a room, or (None, []) where they did not fit; models are never mirrored."""
    hulls = [material.hulls[thing.drawing.path] for thing, _ in objects]
    found = stand(hulls, [long * scale for _, long in objects], size, rng)
    if found is None:
        return None, []
    where, placed = found
    return where, [
        thing._replace(box=box, spot=spot, mirrored=False)
        for (thing, _), (box, spot) in zip(objects, placed)
    ]


def _written(text: Thing, px: float, size: int) -> Thing:
    """A text of this size of letters, smaller where it would be wider than most of the picture."""
    edge = stroke(size)
    while True:
        left, top, right, bottom = ink(text.face, max(8, round(px)), text.what.upper())
        if right - left <= 0.66 * size or px <= 8:
            box = (0, 0, right - left + 2 * edge, bottom - top + 2 * edge)
            return text._replace(box=box, px=max(8, round(px)))
        px *= SHRINK


def stroke(size: int) -> int:
    """Pixels of the border of letters."""
    return max(1, round(size / UNIT))


def _placed(
    things: list[Thing], disc: Thing, at: int, side: str, size: int, rng: random.Random
) -> list[Thing] | None:
    """All things in free places, the disc behind them; None where they did not fit. What stands in
    a room stays where it is.
    """
    standing = {i: thing for i, thing in enumerate(things) if thing.spot}
    placed: dict[int, Thing] = {}
    for _ in range(TRIES):
        reference = standing.get(at) or _anywhere(things[at], size, rng)
        found = _beside(disc, reference, side, size, rng)
        if found and is_beside(found.box, reference.box) == side:
            if not any(
                close(thing.box, own.box)
                for i, thing in standing.items()
                for own in ((found,) if i == at else (found, reference))
            ):
                placed = standing | {at: reference, len(things): found}
                break
    others = sorted(
        (i for i in range(len(things)) if i not in placed), key=lambda i: -_area(things[i].box)
    )
    for i in others if placed else ():
        for _ in range(TRIES):
            thing = _anywhere(things[i], size, rng)
            if not any(close(thing.box, other.box) for other in placed.values()):
                placed[i] = thing
                break
        else:
            return None
    return [placed[i] for i in range(len(things) + 1)] if placed else None


def _anywhere(thing: Thing, size: int, rng: random.Random) -> Thing:
    _, _, width, height = thing.box
    return _moved(
        thing,
        rng.randint(MARGIN, max(MARGIN, size - width - MARGIN)),
        rng.randint(MARGIN, max(MARGIN, size - height - MARGIN)),
    )


def _moved(thing: Thing, left: int, top: int) -> Thing:
    _, _, width, height = thing.box
    return thing._replace(box=(left, top, left + width, top + height))


def _beside(
    disc: Thing, reference: Thing, side: str, size: int, rng: random.Random
) -> Thing | None:
    """The disc on one side of the reference, not far from straight; None where there is no room."""
    left, top, right, bottom = reference.box
    wide = disc.box[2]
    along = {
        "left": (MARGIN, left - MARGIN - wide),
        "right": (right + MARGIN, size - MARGIN - wide),
        "above": (MARGIN, top - MARGIN - wide),
        "below": (bottom + MARGIN, size - MARGIN - wide),
    }[side]
    if along[0] > along[1]:
        return None
    first = rng.randint(*along)
    x, y = reference.centre
    straight = x if side in ("left", "right") else y
    across = y if side in ("left", "right") else x
    most = abs(first + wide / 2 - straight) / CLEAR
    second = round(across - wide / 2 + rng.uniform(-most, most))
    if not MARGIN <= second <= size - MARGIN - wide:
        return None
    return _moved(disc, *((first, second) if side in ("left", "right") else (second, first)))


def is_beside(box: Box, reference: Box) -> str:
    """On which side of the reference a box is; "" where that is not clear."""
    dx = (box[0] + box[2] - reference[0] - reference[2]) / 2
    dy = (box[1] + box[3] - reference[1] - reference[3]) / 2
    if abs(dx) >= CLEAR * abs(dy):
        if box[2] <= reference[0]:
            return "left"
        return "right" if box[0] >= reference[2] else ""
    if abs(dy) >= CLEAR * abs(dx):
        if box[3] <= reference[1]:
            return "above"
        return "below" if box[1] >= reference[3] else ""
    return ""


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
