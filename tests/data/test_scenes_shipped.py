"""Scenes of the shipped pictures: their splits, and the same pixels in every process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evlm_jax import assets
from evlm_jax.data.image import decode
from evlm_jax.data.scenes.dialogs import article, plural
from evlm_jax.data.scenes.draw import shape
from evlm_jax.data.scenes.material import SPLITS, Drawing, place, shipped
from evlm_jax.data.scenes.names import NAMES
from evlm_jax.data.sources import open_source
from tests.helpers.scenes import digest, needs_scenes

# of the pixels of a hundred scenes
PINNED = "eeca4754df0fcb970fee9247911be9a6e369426c6e584873efad4b16d2919d7f"


@needs_scenes
def test_shipped_names_have_drawings_in_every_split():
    made = {split: shipped(split) for split in SPLITS if split != "all"}
    every = shipped("all")
    assert len(every.names) == 40
    assert min(map(len, every.drawings.values())) >= 4
    parts = [made[split] for split in ("train", "validation", "test", "style")]
    for name in every.names:
        found = [set(material.drawings[name]) for material in parts]
        assert all(found) and sum(map(len, found)) == len(set.union(*found))
        assert len(found[0]) >= 2
    places = [{place(Path(file).stem) for file in material.grounds} for material in parts[:3]]
    for found in (places, [set(material.fonts) for material in parts[:3]]):
        assert all(found) and sum(map(len, found)) == len(set.union(*found))


@needs_scenes
def test_pip_alone_has_fewer_names_and_the_same_splits(monkeypatch):
    there = ("cut-openmoji", "photos")
    monkeypatch.setattr(assets, "available", lambda name, cache=None: name in there)
    made = [shipped(split) for split in ("train", "validation", "test")]
    assert len(made[0].names) == 9 and all(material.grounds for material in made)
    for name in made[0].names:
        found = [set(material.drawings[name]) for material in made]
        assert [len(some) for some in found] == [1, 1, 1] and len(set.union(*found)) == 3


def test_places_are_told_apart():
    assert place("room1") == place("room2") == "room"
    assert place("basketball-court1-a") == place("basketball-court1-b")
    assert place("castle") == "castle" and place("train-tracks1") == place("train-tracks2")


@needs_scenes
def test_other_hands_and_photographs_name_what_is_known():
    emoji, hands = open_source("emoji-en"), open_source("emoji-hands-en")
    known = {sample.key: sample.dialogs for sample in emoji}
    assert all(sample.dialogs == known[sample.key.rpartition("/")[2]] for sample in hands)
    style = open_source("emoji-style-en")
    assert {sample.key for sample in style} <= set(known)
    assert not {sample.refs for sample in style} & {sample.refs for sample in hands}
    names = {name.en for name in NAMES}
    photographs = open_source("photographs-en")
    assert {sample.dialogs[0][1].text for sample in photographs} <= names
    assert len(photographs) == 20 == len({sample.refs for sample in photographs})
    for sample in (hands[0], style[0], *photographs):
        assert np.asarray(decode(sample.refs[0].path)).std() > 5
    assert (len(hands), len(style)) == (2446, 1217)


def digests(name: str, processes: int) -> list[str]:
    """Of every tenth of a hundred scenes, made in so many processes."""
    parts = [range(start, start + 10) for start in range(0, 100, 10)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(digest, [name] * len(parts), parts))


@needs_scenes
def test_a_hundred_shipped_scenes_have_the_pinned_pixels():
    assert digest("scenes-en", range(100)) == PINNED


@needs_scenes
@pytest.mark.slow
def test_every_number_of_processes_makes_the_same_scenes():
    one, two, four = (digests("scenes-en", processes) for processes in (1, 2, 4))
    assert one == two == four


def test_english_of_names_of_any_letters():
    said = ["y", "Fly", "BOX", "key", "Bus"]
    assert [*map(plural, said)] == ["ys", "Flies", "BOXes", "keys", "Buses"]
    assert article("Owl") == "an Owl"


def test_a_damaged_cut_out_is_named(tmp_path):
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(ValueError, match="a.png: damaged, or no picture; replace or remove it"):
        shape(Drawing("a", str(file)))
