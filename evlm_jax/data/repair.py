"""Pictures that Pillow reads otherwise than they mean: values of more than 8 bits, transparent values, files whose pixels are whole."""

import struct

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # of 8 bits a value, or less
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
TELLING = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # parts of a PNG that say something about its pixels, and change none
PNG, JPEG, END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
OTHERS = {b"ftypavif": "AVIF", b"ftypheic": "HEIC", b"ftypheix": "HEIC", b"ftypmif1": "HEIF", b"jP  ": "JPEG 2000", b"JXL ": "JPEG XL"}


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a value. Grey of 9 to 16 bits keeps the upper 8 of each value: v >> (bits - 8).

    Raises ValueError for 32-bit whole numbers, fractions and LAB: no file of those says which value is white.
    """
    if image.mode in MODES:
        return image
    if not image.mode.startswith("I;16"):
        raise ValueError(f"pictures of mode {image.mode} (LAB, or 32 bits a value) are not read: save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    bits, values = tags.get(BITS, (16,))[0], np.asarray(image)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values
    made = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def transparent_as_stored(image: Image.Image) -> None:
    """Sets the transparent value of an opened PNG on the scale of its pixels as Pillow gives them. Raises ValueError where it has none."""
    if image.format != "PNG" or "transparency" not in image.info:
        return
    stored = image.tile[0].args if image.tile else ""
    if stored == "RGB;16B":
        raise ValueError("a transparent colour of 16 bits is not read: save it with an alpha channel")
    if stored in ("L;2", "L;4"):
        image.info["transparency"] *= 85 if stored == "L;2" else 17


def mend(content: bytes) -> bytes | None:
    """The same pixels in a file that Pillow reads, or None: without texts and profiles that are too long, with the end mark of a JPEG."""
    if content.startswith(PNG):
        return _without_telling(content)
    if content.startswith(JPEG) and not content.endswith(END) and _is_baseline(content):
        try:
            decode_jpeg(content + END)  # an error where a single pixel lacks
        except ValueError:
            return None
        return content + END
    return None


def foreign(content: bytes) -> ValueError | None:
    """What a file is that is no picture of ours."""
    kind = next((name for mark, name in OTHERS.items() if mark in content[4:12]), None)
    if kind is None and content.lstrip()[:1] == b"<":
        kind = "HTML, XML or SVG"
    return ValueError(f"it is {kind or 'an empty file'}, which is not read") if kind or not content else None


def _without_telling(content: bytes) -> bytes | None:
    kept, at = [PNG], len(PNG)
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        if kind not in TELLING:
            kept.append(content[at : at + size + 12])
        at += size + 12
    made = b"".join(kept)
    return made if len(made) < len(content) else None


def _is_baseline(content: bytes) -> bool:
    """Whether a JPEG has one pass: of several, one that lacks would not be missed."""
    at = len(JPEG)
    while at + 4 <= len(content) and content[at] == 0xFF:
        if content[at + 1] in (0xC0, 0xC1, 0xC2):
            return content[at + 1] != 0xC2
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return False
