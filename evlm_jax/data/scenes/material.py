"""What scenes are made of, split by identity: drawings of every name, grounds and fonts are each of
train, validation or test, whatever the seed.

`known` shows the drawings of train on grounds and in fonts of test; `style` drawings of a hand that
none of the others has."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evlm_jax import assets
from evlm_jax.data.containers.lines import load
from evlm_jax.data.ocr.fonts import Face, faces
from evlm_jax.data.scenes.names import CATEGORIES, NAMES, Name
from evlm_jax.paths import local

HANDS, NEW_HAND = ("cut-openmoji", "cut-google", "cut-twitter"), "cut-fluent"
PICTURES = (".png", ".webp", ".jpg", ".jpeg")
# split of scenes -> split of drawings, of grounds and fonts; `all` of a folder is not split
SPLITS = {
    "train": ("train", "train"),
    "validation": ("validation", "validation"),
    "test": ("test", "test"),
    "known": ("train", "test"),
    "style": ("style", "test"),
    "all": ("all", "train"),
}
FACTS = ("zh", "plural", "category")  # of names.json
TEST, VALIDATION, LEAST = 0.2, 0.1, 3  # shares, and members that a split needs
# written in scenes of all splits, and in those of `words=unseen` alone; in capitals
WORDS = tuple(
    "sun moon tree book milk rain gold fire home love park road ship star time wind king open"
    " help jazz".split()
)
UNSEEN_WORDS = tuple(
    "farm lake bird snow door city song ring leaf bell wolf sand rock blue west hand note wood"
    " gate yes".split()
)


class Drawing(NamedTuple):
    """A cut-out."""

    name: str
    path: str


class Material(NamedTuple):
    """What the scenes of a split are made of."""

    names: dict[str, Name]  # by what they are called in English
    drawings: dict[str, tuple[Drawing, ...]]
    grounds: tuple[str, ...]  # files; of rendered rooms their looks
    fonts: tuple[Face, ...]
    hulls: Mapping[str, np.ndarray] = {}  # of the models of rendered rooms, by path


def shipped(split: str) -> Material:
    """Of the assets that were fetched: with the group `scenes` 40 names of four drawings and more,
    without it those names that have three in the hands that are there.

    Raises:
      AssetError: no cut-outs at all, or not the new hand for `style`.
    """
    of_drawings, of_grounds = SPLITS[split]
    names, drawings = {}, {}
    for name in NAMES:
        if len(of_name := _cut_outs(name, HANDS)) < LEAST:
            continue
        if split == "style":
            chosen = _cut_outs(name, (NEW_HAND,))
            if not chosen:
                assets.path(NEW_HAND)  # says how it is fetched
        else:
            part = divided(of_name)
            chosen = [key for key in of_name if of_drawings in ("all", part[key])]
        names[name.en] = name
        drawings[name.en] = tuple(Drawing(name.en, str(_file(key))) for key in sorted(chosen))
    if not names:
        assets.path(HANDS[0])
        raise assets.AssetError("no name has three drawings here; run `evlm fetch scenes`")
    return Material(names, drawings, _grounds(of_grounds), fonts(of_grounds))


def _cut_outs(name: Name, hands: Sequence[str]) -> list[str]:
    """ASSET/FILE of each drawing of a name that is there."""
    found = [f"{hand}/{ord(c):04X}.png" for c in name.emoji for hand in hands]
    if hands == HANDS:
        found += [f"stamps/{file}.png" for file in name.stamps]
        found += [f"gcompris/words/{file}.png" for file in name.words]
    return [key for key in found if assets.available(key.partition("/")[0]) and _file(key).exists()]


def _file(key: str) -> Path:
    asset, _, file = key.partition("/")
    return assets.path(asset) / file


def _grounds(split: str) -> tuple[str, ...]:
    """Scratch's photographs; without them those of `photos` that are no test of their own."""
    if assets.available("grounds"):
        folder = assets.path("grounds")
        files = sorted(path for path in folder.rglob("*.jpg"))
    else:
        folder = assets.path("photos")
        names = sorted(load(str(folder / "captions.json")))
        files = [folder / name for i, name in enumerate(names) if i % 3]
    part = divided({place(file.stem) for file in files})
    return tuple(str(file) for file in files if part[place(file.stem)] == split)


def place(stem: str) -> str:
    """Two pictures of one place are one identity: `room1` and `room2`, `court-a` and `court-b`."""
    return re.sub(r"([-_]?\d+)?([-_][a-z])?$", "", stem)


def fonts(split: str) -> tuple[Face, ...]:
    """The installed ones that are of this split."""
    every = faces("en")
    part = divided(os.path.basename(face.path) for face in every)
    return tuple(face for face in every if part[os.path.basename(face.path)] == split)


def divided(identities: Iterable[str]) -> dict[str, str]:
    """{identity: its split}, by the order of their hashes: at least one each of test and
    validation.
    """
    order = sorted(set(identities), key=lambda name: hashlib.sha256(name.encode()).digest())
    test = max(1, round(TEST * len(order)))
    validation = test + max(1, round(VALIDATION * len(order)))
    return {
        name: "test" if i < test else "validation" if i < validation else "train"
        for i, name in enumerate(order)
    }


def from_folder(folder: str, split: str) -> Material:
    """Of a user's own pictures: `objects/NAME/*.png` (cut-outs with alpha), `grounds/*.jpg`, and
    where names are asked in Chinese or have odd plurals names.json = {NAME: {"zh", "plural",
    "category"}}.

    Raises ValueError for too few of them, for a split that only the shipped ones have, and for what
    names.json says that is not understood.
    """
    if split == "style":
        raise ValueError(f"{folder}: split style is of the shipped drawings alone")
    of_drawings, of_grounds = SPLITS[split]
    folder = local(folder, "scenes:DIR")
    objects, names, drawings = Path(folder, "objects"), {}, {}
    folders = sorted(path for path in objects.glob("*") if path.is_dir())
    facts = _facts(Path(folder, "names.json"), [own.name for own in folders])
    for own in folders:
        facts_of = facts.get(own.name, {})
        names[own.name] = Name(
            own.name,
            facts_of.get("zh", ""),
            facts_of.get("category", "thing"),
            "",
            plural=facts_of.get("plural", ""),
        )
        drawings[own.name] = tuple(Drawing(own.name, file) for file in _own(own, of_drawings))
    if len(names) < 2:
        raise ValueError(f"{objects}: {len(names)} folders of cut-outs, scenes need two names")
    grounds = tuple(_own(Path(folder, "grounds"), "all" if split == "all" else of_grounds))
    return Material(names, drawings, grounds, fonts(of_grounds))


def _facts(told: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What names.json says of these names; nothing where it is not there.

    Raises ValueError for a name without a folder, and what is not understood of one.
    """
    facts = load(str(told)) if told.is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{told}: there must be an object of names, not {type(facts).__name__}")
    for name, said in facts.items():
        if name not in names:
            raise ValueError(f"{told} has {name!r}, of which there is no folder of cut-outs")
        if wrong := _odd(said):
            raise ValueError(
                f"{told}: {name!r} has {', '.join(wrong)}; texts are understood of"
                f" {', '.join(FACTS)} ({', '.join(CATEGORIES)})"
            )
    return facts


def _odd(said: object) -> list[str]:
    if not isinstance(said, dict):
        return [repr(said)]
    return [
        f"{field} {value!r}"
        for field, value in said.items()
        if field not in FACTS
        or not isinstance(value, str)
        or (field == "category" and value not in CATEGORIES)
    ]


def _own(folder: Path, split: str) -> list[str]:
    """The pictures of a folder that are of this split."""
    files = sorted(str(file) for file in folder.glob("*") if file.suffix.lower() in PICTURES)
    least = 1 if split == "all" else LEAST
    if len(files) < least:
        raise ValueError(
            f"{folder}: {len(files)} pictures, {least} are needed"
            + (": give more, or split=all" if split != "all" else "")
        )
    part = divided(os.path.basename(file) for file in files)
    return [file for file in files if split in ("all", part[os.path.basename(file)])]
