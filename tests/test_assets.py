"""Fetching: only whole, pinned contents ever appear; every failure names the asset and the mend.

No network: wheels come from a folder.
"""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evlm_jax import asset_packages, assets
from evlm_jax.qt_resources import read_resources
from tests.helpers.parity import needs_asset

CONTENTS = {
    "data/b.txt": b"second",
    "data/a.txt": b"first",
    "data/unwanted.bin": b"x",
    "code.py": b"",
}
CONTROL = (
    b"Package: toy\nVersion: 1.0-1\nArchitecture: all\nMaintainer: N <n@n.n>\nDescription: d\n"
)
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
    package = assets.Wheel("toy-data==1.0", 0.1, "data/", ("*.txt",), PIN)
    monkeypatch.setattr(assets, "ASSETS", {"toy": assets.Asset((package,), "MIT")})
    monkeypatch.setattr(asset_packages.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    return index, tmp_path / "cache"


def write_wheel(file: Path, contents: dict = CONTENTS, name: str = "toy-data") -> None:
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata = {f"{info}/METADATA": head.encode()}
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
    assert "has sha256" in asset_packages._extract(
        tmp_path / "other.whl", assets.ASSETS["toy"].packages[0], tmp_path / "raw"
    )
    assert not (tmp_path / "raw").exists()


@pytest.mark.ci
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

    monkeypatch.setitem(
        assets.ASSETS, "toy", assets.Asset(asset.packages, "MIT", build=interrupted)
    )
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


def test_parts_of_several_wheels_become_one_file(toy, monkeypatch):
    index, _ = toy
    parts = {
        f"big-part{i + 1}": (f"big.gguf.part0{i}", text) for i, text in enumerate((b"a", b"b"))
    }
    for name, (file, text) in parts.items():
        write_wheel(index / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", {file: text}, name)
    packages = [
        assets.Wheel(f"{name}==1.0", 0.1, "", (file,), hashlib.sha256(text).hexdigest())
        for name, (file, text) in parts.items()
    ]
    asset = assets.Asset(
        tuple(packages[::-1]), "-", "big.gguf", "big", asset_packages.join("big.gguf")
    )
    monkeypatch.setitem(assets.ASSETS, "big", asset)
    assert set(assets.fetch(progress=False)) == {"toy"}  # by its name alone
    assert assets.fetch(["big"], progress=False)["big"].read_bytes() == b"ab"


@needs_asset("gemma3-270m")
def test_the_parts_of_gemma_are_the_published_file():
    with open(assets.path("gemma3-270m"), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def write_tar(file: Path, mode: str, contents: dict[str, bytes]) -> None:
    with tarfile.open(file, mode) as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("package/data/c.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)


@pytest.fixture
def group(toy, monkeypatch):
    """A group of two assets, of npm and of Debian, whose packages have arrived; the cache."""
    _, cache = toy
    (cache / "wheels").mkdir(parents=True)
    of_npm = assets.Npm("@some/toy@1.0", 0.1, "package/data/", ("*.txt",), PIN)
    of_debian = assets.Debian("toy=1.0-1", 0.1, "./data/", ("*.txt",), PIN)
    for package, name in ((of_npm, "of-npm"), (of_debian, "of-debian")):
        asset = assets.Asset((package,), "MIT", group="toys")
        monkeypatch.setitem(assets.ASSETS, name, asset)
    write_tar(
        cache / "wheels/some-toy-1.0.tgz", "w:gz", {f"package/{n}": d for n, d in CONTENTS.items()}
    )
    tree = cache.parent / "tree"
    for name, data in (CONTENTS | {"DEBIAN/control": CONTROL}).items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    if shutil.which("dpkg-deb"):
        command = ["dpkg-deb", "--build", str(tree), str(cache / "wheels/toy_1.0-1_all.deb")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return cache


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="this machine has no dpkg-deb")
def test_a_group_of_debian_and_npm_packages_is_fetched_by_its_name_alone(group):
    assert set(assets.fetch(progress=False)) == {"toy"}
    found = assets.fetch(["toys"], progress=False)
    assert set(found) == {"of-npm", "of-debian"}
    for folder in found.values():
        texts = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert texts == {"a.txt": b"first", "b.txt": b"second"}


def test_without_a_client_a_group_is_smaller_and_says_so(group, monkeypatch, capsys):
    for package in (group / "wheels").iterdir():
        package.unlink()
    monkeypatch.setenv("PATH", str(group))
    assert assets.fetch(["toys"], progress=False) == {}
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "left out of toys: asset 'of-npm': @some/toy@1.0 needs npm, which is not installed here",
        "left out of toys: asset 'of-debian': toy=1.0-1 needs apt-get, which is not installed here",
    ]
    with pytest.raises(assets.NoClient, match="needs npm"):
        assets.fetch(["of-npm"], progress=False)
    with pytest.raises(assets.AssetError, match="run `evlm fetch toys`"):
        assets.path("of-npm")


def test_every_asset_has_a_licence_that_is_said():
    lines = assets.licences().splitlines()
    assert len(lines) == len(assets.ASSETS)
    assert any("tuxpaint-stamps-default=2022.06.04-1: GPL-2" in line for line in lines)


def qt_file(flags: int, content: bytes, version: int = 3) -> bytes:
    """Resources with the one file /a/b, as rcc lays them out."""
    time = b"\0" * (8 if version > 1 else 0)
    names = b"".join(
        struct.pack(">HI", len(name), 0) + name.encode("utf-16-be") for name in ("a", "b")
    )
    tree = struct.pack(">IHII", 0, 2, 1, 1) + time + struct.pack(">IHII", 0, 2, 1, 2) + time
    tree += struct.pack(">IHHHI", 8, flags, 0, 0, 0) + time
    data = struct.pack(">I", len(content)) + content
    start = 20
    places = (start, start + len(tree), start + len(tree) + len(data))
    return b"qres" + struct.pack(">4I", version, *places) + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_resources_of_qt_are_read(version):
    packed = struct.pack(">I", 5) + zlib.compress(b"hello")
    assert read_resources(qt_file(0, b"hello", version)) == {"/a/b": b"hello"}
    assert read_resources(qt_file(1, packed, version)) == {"/a/b": b"hello"}


def test_other_files_and_damaged_resources_are_refused():
    whole = qt_file(0, b"hello")
    for content in (b"qres", whole[:30], whole[:4] + b"\0\0\0\x09" + whole[8:], b"PK" + whole):
        with pytest.raises(ValueError, match="resources of Qt"):
            read_resources(content)


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
