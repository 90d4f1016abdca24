"""What is made of unpacked packages: drawn emoji, captioned pictures, cut-outs on no ground."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from evlm_jax.qt_resources import read_resources

EMOJI_PIXELS, EMOJI_FONT_SIZE, EMOJI_BASELINE = 224, 156, 170  # the tallest glyph just fits
PHOTOS = {  # after the docstrings of skimage.data
    "astronaut.png": "An astronaut in an orange suit in front of a flag and a space shuttle.",
    "brick.png": "A brick wall.",
    "camera.png": "A man with a camera on a tripod.",
    "chelsea.png": "Chelsea the cat.",
    "clock_motion.png": "A clock blurred by motion.",
    "coffee.png": "A cup of coffee on a red saucer with a spoon.",
    "coins.png": "Greek coins from Pompeii.",
    "grass.png": "Grass.",
    "gravel.png": "Gravel.",
    "horse.png": "The black silhouette of a horse.",
    "hubble_deep_field.jpg": "Galaxies in the Hubble deep field.",
    "ihc.png": "Stained colon tissue under a microscope.",
    "moon.png": "The surface of the moon.",
    "motorcycle_left.png": "A red motorcycle in a garage.",
    "page.png": "A scanned page of printed text.",
    "retina.jpg": "The retina of a human eye.",
    "rocket.jpg": "A rocket on a launch pad at night.",
    "text.png": "Handwritten formulas on paper.",
}
CLIPS = {
    "bigbuckbunny.mp4": "A grey cartoon rabbit comes out of its burrow and stretches.",
    "bikes.mp4": "A street with cars and parked bicycles.",
    "carphone_pristine.mp4": "A man with a red bow tie talks in a car.",
}

CUT_OUT = 192  # most pixels a side: more than a scene shows of one
PHOTO = 640
GCOMPRIS = {  # file of resources -> folder of photographs in it; of `lang` pictures of words
    "lang.rcc": "words_sample/",
    "erase.rcc": "resource/",
    "explore_farm_animals.rcc": "resource/animals/",
    "explore_world_animals.rcc": "resource/animals/",
}


def draw_emoji(raw: Path, out: Path, progress: bool) -> None:
    """One PNG for each emoji that is a single code point (so no skin tones, joined sequences or
    flags), and names.json.

    names.json: {"1F34E": {"en": "red apple", "zh": "红苹果", "split": "train"}}; a tenth, chosen by
    a hash of the code point, is "test".
    """
    tables = {
        language: json.loads((raw / f"{file}.json").read_text("utf-8"))
        for language, file in (("en", "emoji"), ("zh", "emoji_zh"))
    }
    keep, font = _single(tables["en"]), _emoji_font(raw)

    def clean(text):
        return text.strip(":").replace("_", " ")

    names = {}
    for character, e in tqdm(keep.items(), desc="drawing emoji", disable=not progress):
        code = f"{ord(character):04X}"
        held_out = int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10 == 0
        names[code] = {
            "en": clean(tables["en"][e]["en"]),
            "zh": clean(tables["zh"][e]),
            "split": "test" if held_out else "train",
        }
        _drawn(character, font, "white").save(out / f"{code}.png", compress_level=1)
    (out / "names.json").write_text(json.dumps(names, ensure_ascii=False, indent=0), "utf-8")


def draw_cut_outs(raw: Path, out: Path, progress: bool) -> None:
    """The same drawings without a ground: how they look on black and on white says how far each
    pixel covers it.
    """
    font = _emoji_font(raw)
    table = json.loads((raw / "emoji.json").read_text("utf-8"))
    for character in tqdm(_single(table), desc="drawing cut-outs", disable=not progress):
        black, white = (
            np.asarray(_drawn(character, font, ground), np.float32) for ground in ("black", "white")
        )
        cover = 255 - (white - black).mean(-1, keepdims=True)
        colour = black * 255 / np.maximum(cover, 1)
        pixels = np.concatenate([colour, cover], -1).round().clip(0, 255).astype(np.uint8)
        _cut_out(Image.fromarray(pixels)).save(out / f"{ord(character):04X}.png", compress_level=1)


def _single(table: dict) -> dict[str, str]:
    """Emoji that are fully qualified, not newer than OpenMoji 17, and a single code point: without
    and with their selector.
    """
    return {
        e.rstrip("\ufe0f"): e
        for e, facts in table.items()
        if facts["status"] == 2 and facts["E"] <= 17 and len(e.rstrip("\ufe0f")) == 1
    }


def _emoji_font(raw: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        raw / "font/glyf_colr0.ttf", EMOJI_FONT_SIZE, layout_engine=ImageFont.Layout.BASIC
    )


def _drawn(character: str, font: ImageFont.FreeTypeFont, ground: str) -> Image.Image:
    image = Image.new("RGB", (EMOJI_PIXELS, EMOJI_PIXELS), ground)
    position = (EMOJI_PIXELS / 2, EMOJI_BASELINE)
    ImageDraw.Draw(image).text(position, character, font=font, embedded_color=True, anchor="ms")
    return image


def _cut_out(image: Image.Image) -> Image.Image:
    """Without an empty border, and not larger than scenes need."""
    image = image.convert("RGBA")
    image = image.crop(inked(image))
    image.thumbnail((CUT_OUT, CUT_OUT), Image.Resampling.LANCZOS)
    return image


def inked(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of what is seen of an RGBA picture: a pixel that is hardly there belongs to the
    border.
    """
    return image.getchannel("A").point([255 * (alpha > 16) for alpha in range(256)]).getbbox()


def emoji_by_code(raw: Path, out: Path, progress: bool) -> None:
    """Square drawings of one hand under the names of `draw_emoji`: `1f408-fe0f.png` is
    `1F408.png`.
    """
    for file in sorted(raw.iterdir()):
        code = file.stem.removesuffix("-fe0f").upper()
        if re.fullmatch(r"[0-9A-F]{4,5}", code):
            with Image.open(file) as image:
                drawing = image.convert("RGBA")
            drawing.thumbnail((CUT_OUT, CUT_OUT), Image.Resampling.LANCZOS)
            drawing.save(out / f"{code}.png", compress_level=1)


def stamps(raw: Path, out: Path, progress: bool) -> None:
    """Cut-outs of all captioned stamps in their folders, and captions.json = {file: {"en": ...,
    "zh": ...}}, with Chinese where there is some.
    """
    captions = {}
    for file in tqdm(sorted(raw.rglob("*.png")), desc="stamps", disable=not progress):
        told = file.with_suffix(".txt")
        if not told.is_file():
            continue
        english, *others = told.read_text("utf-8").splitlines()
        name = file.relative_to(raw)
        chinese = [line.partition("=")[2] for line in others if line.startswith("zh_CN.utf8=")]
        captions[name.as_posix()] = {"en": english.strip()} | dict(zip(["zh"], chinese))
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            _cut_out(image).save(out / name, compress_level=1)
    (out / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=0), "utf-8")


def gcompris_pictures(raw: Path, out: Path, progress: bool) -> None:
    """words/NAME.png, cut-outs of drawings, and photos/NAME.jpg; of two photographs of one name the
    second is `NAME-2.jpg`.
    """
    (out / "words").mkdir()
    (out / "photos").mkdir()
    for resources, folder in GCOMPRIS.items():
        found = read_resources((raw / resources).read_bytes())
        for name in tqdm(sorted(found), desc=resources, disable=not progress):
            stem, dot, suffix = name.rpartition("/")[2].partition(".")
            if not name.rpartition("/")[0].endswith(folder.rstrip("/")) or suffix != "webp":
                continue
            with Image.open(io.BytesIO(found[name])) as image:
                if resources == "lang.rcc":
                    _cut_out(image).save(out / "words" / f"{stem}.png", compress_level=1)
                    continue
                image.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
                target = out / "photos" / f"{stem}.jpg"
                target = target.with_stem(f"{stem}-2") if target.exists() else target
                image.convert("RGB").save(target, quality=95)


def with_captions(captions: dict[str, str]) -> Callable[[Path, Path, bool], None]:
    """Copies the files and writes captions.json: {file name: caption}."""

    def build(raw: Path, out: Path, progress: bool) -> None:
        for name in captions:
            shutil.copy(raw / name, out / name)
        (out / "captions.json").write_text(json.dumps(captions, indent=0), "utf-8")

    return build
