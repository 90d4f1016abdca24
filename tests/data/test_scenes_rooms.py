"""Rendered rooms: the truth against pixels that change when a model is taken away."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from evlm_jax import assets
from evlm_jax.data.scenes import render
from evlm_jax.data.scenes.dialogs import relations
from evlm_jax.data.scenes.furniture import NAMES, furnished
from evlm_jax.data.sources import open_source


@pytest.fixture(scope="session")
def rooms():
    """Skips where they cannot be drawn."""
    if not importlib.util.find_spec("vtkmodules"):
        pytest.skip('pip install "evlm_jax[rooms]"')
    try:
        assets.path("furniture")
        render.painter()
    except assets.AssetError as error:
        pytest.skip(f"this machine: {error}")


def taken_away(scene) -> list[np.ndarray]:
    """Of each model [size, size] where the picture is another one without it."""
    standing = [(thing.drawing.path, thing.spot) for thing in scene.objects]

    def pixels(some):
        return np.asarray(render.paint(scene.room, scene.ground, some, scene.size)).astype(int)

    whole = pixels(standing)
    parts = [pixels(standing[:i] + standing[i + 1 :]) for i in range(len(standing))]
    return [np.abs(whole - part).max(-1) > 6 for part in parts]


def box_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.ci
def test_what_is_said_is_what_is_rendered(rooms):
    source = open_source("scenes:rooms?split=test&scenes=10&size=112")
    checked = Counter()
    for sample in source:
        scene = source.scenes.scene(int(sample.key))
        masks = taken_away(scene)
        for mask, thing in zip(masks, scene.objects):
            assert mask.sum() > 12, (scene.number, thing.drawing)
            assert np.abs(box_of(mask) - thing.box).max() <= 3, (scene.number, thing.drawing)
        assert np.sum(masks, 0).max() == 1  # none hides another
        said = {label: dialog[-1].text for label, dialog in zip(sample.labels, sample.dialogs)}
        if "count" in said:
            assert "one two three four five six".split().index(said["count"]) == len(masks) - 1
            checked["count"] += 1
        if scene.kind == "pair":
            sides = [np.ptp(box_of(mask).reshape(2, 2), 0).max() for mask in masks]
            true = [np.ptp(source.scenes.material.hulls[t.drawing.path], 0) for t in scene.objects]
            larger = scene.objects.index(relations(scene)["larger"])
            assert sides[larger] == max(sides) and true[larger].max() == np.max(true)
            checked["larger"] += 1
    assert checked["count"] and checked["larger"]


def test_models_looks_and_fonts_are_of_one_split(rooms):
    parts = [furnished(split) for split in ("train", "validation", "test")]
    for name in NAMES:
        found = [set(part.drawings[name.en]) for part in parts]
        assert all(found) and sum(map(len, found)) == len(set.union(*found))
    for field in ("grounds", "fonts"):
        found = [set(getattr(part, field)) for part in parts]
        assert all(found) and sum(map(len, found)) == len(set.union(*found))
    with pytest.raises(ValueError, match="split style is of cut-outs alone"):
        furnished("style")


def test_threads_paint_the_same_pictures(rooms):
    source = open_source("scenes:rooms?scenes=6")
    alone = list(map(source.picture, range(6)))
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(source.picture, range(6))) == alone
    assert len(set(alone)) == 6


def test_without_opengl_there_is_one_line(rooms):
    code = "from evlm_jax.data.scenes.render import painter; painter()"
    environment = os.environ | {"VTK_DEFAULT_OPENGL_WINDOW": "vtkOSOpenGLRenderWindow"}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if told.returncode == 0:
        pytest.skip("this machine has OSMesa")
    assert (
        "AssetError: rooms are drawn by OpenGL without a screen, and there is none" in told.stderr
    )


def test_without_vtk_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vtkmodules", None)
    render._painter.cache_clear()
    with pytest.raises(assets.AssetError, match=r"rooms need VTK: .*evlm_jax\[rooms\]"):
        open_source("scenes:rooms")
