"""What is made of the unpacked wheels of two kinds of assets: drawn emoji, captioned pictures."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

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
    # fully qualified, not newer than OpenMoji 17, a single code point
    keep = {
        e.rstrip("\ufe0f"): e
        for e, facts in tables["en"].items()
        if facts["status"] == 2 and facts["E"] <= 17 and len(e.rstrip("\ufe0f")) == 1
    }
    font = ImageFont.truetype(
        raw / "font/glyf_colr0.ttf", EMOJI_FONT_SIZE, layout_engine=ImageFont.Layout.BASIC
    )

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
        image = Image.new("RGB", (EMOJI_PIXELS, EMOJI_PIXELS), "white")
        position = (EMOJI_PIXELS / 2, EMOJI_BASELINE)
        ImageDraw.Draw(image).text(position, character, font=font, embedded_color=True, anchor="ms")
        image.save(out / f"{code}.png", compress_level=1)
    (out / "names.json").write_text(json.dumps(names, ensure_ascii=False, indent=0), "utf-8")


def with_captions(captions: dict[str, str]) -> Callable[[Path, Path, bool], None]:
    """Copies the files and writes captions.json: {file name: caption}."""

    def build(raw: Path, out: Path, progress: bool) -> None:
        for name in captions:
            shutil.copy(raw / name, out / name)
        (out / "captions.json").write_text(json.dumps(captions, indent=0), "utf-8")

    return build
