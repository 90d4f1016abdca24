"""Values that Pillow reads otherwise than they mean: of more than 8 bits, transparent ones.

Training and the export share this.
"""

import numpy as np
from PIL import Image

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
)  # of 8 bits a value, or less
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture with 8 bits a value. Grey of 9 to 16 bits keeps the upper 8 of each value: v >>
    (bits - 8).

    Raises ValueError for 32-bit integers, floating-point values and LAB: no file of those records
    which value is white.
    """
    if image.mode in MODES:
        return image
    if not image.mode.startswith("I;16"):
        raise ValueError(
            f"pictures of mode {image.mode} (LAB, or 32 bits a value) are not read: save it with 8"
            " or 16 bits"
        )
    tags = getattr(image, "tag_v2", {})
    bits, values = tags.get(BITS, (16,))[0], np.asarray(image)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values
    made = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def transparent_as_stored(image: Image.Image) -> None:
    """Sets the transparent value of an opened PNG on the scale of Pillow's pixels.

    Raises ValueError where it has none.
    """
    if image.format != "PNG" or "transparency" not in image.info:
        return
    stored = image.tile[0].args if image.tile else ""
    if stored == "RGB;16B":
        raise ValueError(
            "a transparent colour of 16 bits is not read: save it with an alpha channel"
        )
    if stored in ("L;2", "L;4"):
        image.info["transparency"] *= 85 if stored == "L;2" else 17
