"""Scenes as a source of samples: made when they are asked for, a function of seed, split and
number.
"""

import functools
import random
from dataclasses import dataclass
from urllib.parse import urlencode

from evlm_jax.data.samples import ImageRef, Sample
from evlm_jax.data.scenes.compose import Scene, compose
from evlm_jax.data.scenes.dialogs import ASKED, FAMILIES, LANGUAGES, Speaker
from evlm_jax.data.scenes.draw import encoded, shape
from evlm_jax.data.scenes.furniture import furnished
from evlm_jax.data.scenes.material import (
    SPLITS,
    UNSEEN_WORDS,
    WORDS,
    Material,
    from_folder,
    shipped,
)
from evlm_jax.data.scenes.render import painter
from evlm_jax.data.source import Source

SHIPPED, ROOMS = "assets", "rooms"  # instead of a folder
VOCABULARY = {"known": WORDS, "unseen": UNSEEN_WORDS}
# What may be asked of a frame among others: they have neither disc nor texts; and of those others.
OF_CLIPS, OF_BARE = ("colour", "text"), ("name", "count")
PARTS = 8  # of a clip, in turn, where the frame that is asked about stands
OTHERS = 256  # scenes that other frames show


@dataclass(frozen=True)
class Scenes:
    """Scenes by number. Their pictures are `scene://NUMBER::PICTURES`, whatever is asked."""

    name: str
    pictures: str  # all that a picture depends on, as `open_scenes` takes it
    material: Material
    speaker: Speaker
    asked: tuple[str, ...]
    seed: str
    size: int
    frames: int = 1
    bare: bool = False

    def scene(self, number: int) -> Scene:
        """The truth."""
        words = self.speaker.words
        return compose(self.material, words, self.seed, number, self.size, shape)

    def sample(self, number: int) -> Sample:
        """A reference to the picture, and what is asked about it."""
        made = self.speaker.dialogs(
            self.scene(number), self.asked, random.Random(f"words {self.seed} {number}")
        )
        labels, dialogs = zip(*made)
        clip = [ImageRef(f"scene://{number}::{self.pictures}")]
        if self.frames > 1:
            part, rng = number % PARTS, random.Random(f"clip {self.seed} {number}")
            others = f"{self.pictures}&bare=1&ask={OF_BARE[0]}"
            at = int((part + rng.random()) / PARTS * self.frames)
            shown = rng.choices(range(OTHERS), k=self.frames - 1)
            hay = [ImageRef(f"scene://{other}::{others}") for other in shown]
            clip = hay[:at] + clip + hay[at:]
            labels = [f"{label.rpartition('/')[2]}/part {part + 1} of {PARTS}" for label in labels]
        return Sample(str(number), self.name, (tuple(clip),), dialogs, labels=tuple(labels))


class SceneSource(Source):
    """The samples of scenes."""

    def __init__(self, scenes: Scenes, count: int):
        super().__init__(scenes.name, range(count), scenes.sample)
        self.scenes = scenes

    @functools.cached_property
    def _counts(self) -> list[int]:
        return [len(self.scenes.sample(number).dialogs) for number in self.rows]

    def dialog_counts(self) -> list[int]:
        """Dialogs of every sample: all scenes are composed, and none drawn."""
        return list(self._counts)

    def picture(self, number: int) -> bytes:
        """The file of a scene's picture."""
        return encoded(self.scenes.scene(number), self.scenes.bare)

    def state(self) -> str:
        """Of all files that scenes are made of."""
        material = self.scenes.material
        files = [drawing.path for some in material.drawings.values() for drawing in some]
        self._beside = (*files, *(() if material.hulls else material.grounds))
        return super().state()


def open_scenes(
    name: str,
    path: str,
    *,
    scenes: str = "6000",
    split: str = "train",
    language: str = "en",
    ask: str = ",".join(FAMILIES),
    words: str = "known",
    size: str = "112",
    seed: str = "0",
    frames: str = "1",
    bare: str = "0",
) -> SceneSource:
    """Scenes of a folder of one's own (material.py), of the shipped pictures where the path is
    `assets`, or of rendered rooms where it is `rooms`.

    Args:
      scenes: how many.
      split: of SPLITS.
      language: en or zh.
      ask: families of questions, and `caption` and `box`, with commas.
      words: `known`, the twenty of all splits, or `unseen`, twenty others.
      size: pixels a side.
      seed: another one has other scenes of the same split.
      frames: of a clip, in which the scene is one frame; the others are bare scenes.
      bare: 1: without disc and texts.
    Raises:
      ValueError: an option out of range, or too few pictures.
      AssetError: what was not fetched, or cannot be drawn here.
    """
    _check_known(name, split=split, language=language, words=words, bare=bare)
    length, asked = _number(name, "frames", frames, 1), ask.split(",")
    _check_asked(name, asked, "", ASKED)
    if length > 1:
        _check_asked(name, asked, "with frames ", OF_CLIPS)
    if bare == "1":
        _check_asked(name, asked, "with bare ", OF_BARE)
    count, side = _number(name, "scenes", scenes, 1), _number(name, "size", size, 56)
    _number(name, "seed", seed, 0)
    material = _material(path, split)
    if language == "zh":
        _check_chinese(name, path, material)
    speaker = Speaker(language, material, VOCABULARY[words], plain=split not in ("train", "all"))
    shown = dict(split=split, words=words, size=size, seed=seed)
    shown |= dict(bare=bare, ask=ask) if bare == "1" else {}
    made = Scenes(
        name,
        f"scenes:{path}?{urlencode(shown)}",
        material,
        speaker,
        tuple(asked),
        f"{split} {words} {seed}",
        side,
        length,
        bare == "1",
    )
    return SceneSource(made, count)


def _material(path: str, split: str) -> Material:
    if path == ROOMS:
        painter()  # says what is missing here, before a picture is
        return furnished(split)
    return shipped(split) if path == SHIPPED else from_folder(path, split)


def _check_chinese(name: str, path: str, material: Material) -> None:
    if nameless := [english for english, known in material.names.items() if not known.zh]:
        raise ValueError(
            f"data source {name!r}: {path}/names.json has no zh of {nameless[0]!r}: give it, or"
            " language=en"
        )


def _check_known(name: str, **options: str) -> None:
    known = {"split": SPLITS, "language": LANGUAGES, "words": VOCABULARY, "bare": ("0", "1")}
    for option, value in options.items():
        if value not in known[option]:
            raise ValueError(
                f"data source {name!r}: {option} has {value!r}; there are"
                f" {', '.join(known[option])}"
            )


def _check_asked(name: str, asked: list[str], among: str, possible: tuple[str, ...]) -> None:
    if wrong := [family for family in asked if family not in possible]:
        raise ValueError(
            f"data source {name!r}: {among}ask has {wrong[0]!r}; there are {', '.join(possible)}"
        )


def _number(name: str, option: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ValueError(
            f"data source {name!r}: option {option} must be a whole number of at least {least}, not"
            f" {value!r}"
        )
    return int(value)
