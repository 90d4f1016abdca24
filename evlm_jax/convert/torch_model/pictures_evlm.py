"""Pictures in every form that callers have them -> RGB as training reads it -> the square of the
vision tower.
"""

import base64
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

from .tiles_evlm import box, grid_for, tag
from .values_evlm import eight_bits, transparent_as_stored

MOST_PIXELS = 1 << 27  # of a picture: a larger one is taken for a decompression bomb
MOST_BYTES = 1 << 28
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # Pillow knows others, some of which start programs
CHANNELS = (1, 3, 4)


def is_picture(value):
    """A picture, or where one is; not a list of them."""
    return isinstance(value, (str, Path, bytes, Image.Image)) or (
        isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3)
    )


def read_picture(source):
    """RGB, upright, transparency over white.

    Args:
      source: a PIL image; an array [h, w], [h, w, C] or [C, h, w] of uint8, or of floats from 0 to
        1; a file; an http(s) or data URL; bytes of a file.
    Raises:
      ValueError: nothing of these, or damaged, too large, or of another format than FORMATS.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _rgb(_of_array(source))
    if isinstance(source, Image.Image):
        return _upright(source)
    said = (
        source
        if isinstance(source, (str, Path)) and len(str(source)) < 200
        else f"{type(source).__name__} of {len(source)}"
    )
    try:
        with Image.open(_file(source), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, the limit is {MOST_PIXELS}"
                )
            return _upright(image)
    except Exception as error:  # damaged files make the decoders raise errors of any kind
        raise ValueError(f"cannot read the picture {said}: {error}") from error


def _file(source):
    """A path, or the bytes of a file."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if str(source).startswith(("http://", "https://")):
        with urlopen(str(source), timeout=30) as answer:
            data = answer.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return BytesIO(data)
    if str(source).startswith("data:image/"):
        return BytesIO(from_base64(str(source).partition(",")[2]))
    return source


def from_base64(text):
    """Bytes. Raises ValueError for other letters."""
    return base64.b64decode(text, validate=True)


def _of_array(array):
    array = array.detach().cpu() if isinstance(array, torch.Tensor) else array
    array = np.asarray(array.float() if getattr(array, "dtype", None) == torch.bfloat16 else array)
    if array.ndim == 3:
        first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
        if first == last:
            raise ValueError(
                f"which axis of a picture {array.shape} are its channels? give [h, w, 3] or [3, h,"
                " w], larger than 4 pixels"
            )
        array = np.moveaxis(array, 0, -1) if first else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.dtype.kind == "f" and array.size and 0 <= array.min() and array.max() <= 1:
        array = (255 * array).round().astype(np.uint8)
    if array.dtype != np.uint8:
        span = f"from {array.min()} to {array.max()}" if array.size else "without pixels"
        raise ValueError(f"a picture of {array.dtype} {span}: give uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright(image):
    transparent_as_stored(image)
    image.load()
    with suppress(Exception):  # without EXIF that can be read, a picture is upright
        image = ImageOps.exif_transpose(image)
    return _rgb(image)


def _rgb(image):
    """Without transparency, which lies over white; of more than 8 bits the upper 8."""
    image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def fitted(image, size, how, fill):
    """RGB of `size`, the side of a square or height and width: "squash" stretches, "crop" cuts the
    middle to their ratio, "pad" fills the rest with the colour `fill`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    sides, bicubic = (width, height), Image.Resampling.BICUBIC
    if how == "squash":
        return image.resize(sides, bicubic)
    if how == "crop":
        return ImageOps.fit(image, sides, bicubic)
    return ImageOps.pad(image, sides, bicubic, color=fill)


def tagged(visual, size, tiles):
    """(tag or "", picture) of each image: of a video, a list, its frames; of a picture itself, and
    where it is large at most `tiles` tiles of `size`, the side of a square or height and width.
    """
    frames = visual if isinstance(visual, list) else [visual]
    yield from (("", frame) for frame in frames)
    if tiles and frames is not visual:
        height, width = (size, size) if isinstance(size, int) else size
        picture = read_picture(visual)
        down, across = grid_for(picture.size, (height, width), tiles)
        if down * across > 1:
            whole = fitted(picture, (down * height, across * width), "squash", None)
            for i in range(down * across):
                yield tag(i), whole.crop(box(i, across, (height, width)))
