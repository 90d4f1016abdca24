"""Fetching: only whole, pinned contents ever appear; every failure names the asset and the mend.

No network: wheels come from a folder.
"""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evlm_jax import assets
from tests.helpers.parity import needs_asset

CONTENTS = {
    "data/b.txt": b"second",
    "data/a.txt": b"first",
    "data/unwanted.bin": b"x",
    "code.py": b"",
}
PIN = hashlib.sha256(b"firstsecond").hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Registers an asset "toy" whose wheel lies in a folder that pip installs from; returns (that
    folder, the cache).
    """
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index / "toy_data-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(assets, "SHA256", {"toy-data==1.0": PIN})
    monkeypatch.setattr(
        assets,
        "ASSETS",
        {"toy": assets.Asset((assets.Wheel("toy-data==1.0", 0.1, "data/", ("*.txt",)),))},
    )
    monkeypatch.setattr(assets.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    return index, tmp_path / "cache"


def write_wheel(file: Path, contents: dict = CONTENTS) -> None:
    info = "toy_data-1.0.dist-info"
    metadata = {f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n"}
    metadata |= {
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (contents | metadata).items():
            archive.writestr(name, data)


def leftovers(cache: Path) -> list[str]:
    """What lies in the cache, besides the (then empty) folder of wheels."""
    return sorted(p.name for p in cache.iterdir() if p.name != "wheels" or any(p.iterdir()))


def test_fetch_unpacks_the_wanted_files_only(toy):
    _, cache = toy
    assert not assets.available("toy")
    folder = assets.fetch(progress=False)["toy"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "a.txt": b"first",
        "b.txt": b"second",
    }
    assert assets.path("toy") == folder == cache / f"toy-{PIN[:8]}"
    assert leftovers(cache) == [folder.name]


def test_what_is_there_is_not_fetched_again(toy):
    index, _ = toy
    assets.fetch(progress=False)
    (index / "toy_data-1.0-py3-none-any.whl").unlink()
    assets.fetch(progress=False)


def test_a_wheel_that_had_arrived_is_used_without_the_network(toy):
    index, cache = toy
    (cache / "wheels").mkdir(parents=True)
    (index / "toy_data-1.0-py3-none-any.whl").rename(cache / "wheels/toy_data-1.0-py3-none-any.whl")
    assert assets.fetch(progress=False)["toy"].is_dir()


def test_a_damaged_wheel_is_fetched_again(toy):
    _, cache = toy
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels/toy_data-1.0-py3-none-any.whl").write_bytes(b"half a download")
    assert assets.fetch(progress=False)["toy"].is_dir()


def test_other_contents_are_refused_and_leave_nothing(toy):
    index, cache = toy
    write_wheel(index / "toy_data-1.0-py3-none-any.whl", CONTENTS | {"data/a.txt": b"evil"})
    with pytest.raises(
        assets.AssetError, match=f"'toy'.*toy-data==1.0 has sha256 .* pinned is {PIN}"
    ):
        assets.fetch(progress=False)
    assert not assets.available("toy") and leftovers(cache) == []


@pytest.mark.parametrize(
    "name",
    [
        "data/../../../out.txt",
        "/data/out.txt",
        "data/..\\..\\out.txt",
        "../data/out.txt",
        "C:/out.txt",
    ],
)
@pytest.mark.parametrize("contents", [b"", b"evil"], ids=["pinned sum", "other sum"])
def test_a_wheel_that_leads_outside_is_refused_and_nothing_is_written(toy, name, contents):
    """Also where the contents have the pinned sum, as they do with an empty file more."""
    _, cache = toy
    (cache / "wheels").mkdir(
        parents=True
    )  # as if it had been put there by hand: pip itself may refuse it
    write_wheel(cache / "wheels/toy_data-1.0-py3-none-any.whl", CONTENTS | {name: contents})
    before = sorted(cache.parent.rglob("*.txt"))
    with pytest.raises(
        assets.AssetError,
        match="'toy': toy-data==1.0 has a file .*out.txt', which leads out of it; the package",
    ):
        assets.fetch(progress=False)
    assert sorted(cache.parent.rglob("*.txt")) == before and leftovers(cache) == []


def test_nothing_is_unpacked_before_the_sum_is_right(toy, tmp_path):
    write_wheel(tmp_path / "other.whl", CONTENTS | {"data/a.txt": b"evil"})
    assert "has sha256" in assets._extract(
        tmp_path / "other.whl", assets.ASSETS["toy"].wheels[0], tmp_path / "raw"
    )
    assert not (tmp_path / "raw").exists()


def test_no_download_names_the_asset_and_the_mend(toy):
    index, cache = toy
    (index / "toy_data-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        assets.AssetError,
        match=(
            r"'toy': cannot download toy-data==1.0 \(ERROR: .*\). Check the"
            r" network.*toy_data-1.0-\*.whl"
        ),
    ):
        assets.fetch(progress=False)
    assert leftovers(cache) == []


def test_an_interrupted_build_leaves_nothing_that_looks_complete(toy, monkeypatch):
    _, cache = toy
    asset = assets.ASSETS["toy"]

    def interrupted(raw, out, progress):
        (out / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset(asset.wheels, build=interrupted))
    with pytest.raises(KeyboardInterrupt):
        assets.fetch(progress=False)
    assert not assets.available("toy") and leftovers(cache) == [
        "wheels"
    ]  # the wheel is kept for the next try
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    assert assets.fetch(progress=False)["toy"].is_dir()


def test_missing_and_unknown_names(toy):
    with pytest.raises(assets.AssetError, match="'toy' is not in .*run `evlm fetch`"):
        assets.path("toy")
    with pytest.raises(assets.AssetError, match="unknown asset 'toys'; there are toy"):
        assets.fetch(["toys"])


@needs_asset("openmoji")
def test_openmoji_is_drawn_in_full_and_split_by_code_point():
    folder = assets.path("openmoji")
    names = json.loads((folder / "names.json").read_text("utf-8"))
    assert len(names) == len(list(folder.glob("*.png"))) == 1391
    assert names["1F34E"] == {"en": "red apple", "zh": "红苹果", "split": "train"}
    assert sum(entry["split"] == "test" for entry in names.values()) == 162
    for code in list(names)[::40]:
        picture = np.asarray(Image.open(folder / f"{code}.png"))
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert picture.shape == (224, 224, 3) and (border == 255).all() and picture.std() > 5


@needs_asset("easy-vqa")
def test_easy_vqa_has_its_published_size():
    folder = assets.path("easy-vqa")
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        assert len(list((folder / split / "images").glob("*.png"))) == images
        assert len(json.loads((folder / split / "questions.json").read_text())) == questions


@needs_asset("photos")
@needs_asset("clips")
def test_every_photo_and_clip_has_a_caption():
    for name in ("photos", "clips"):
        folder = assets.path(name)
        captions = json.loads((folder / "captions.json").read_text())
        assert set(captions) == {p.name for p in folder.iterdir()} - {"captions.json"}
