"""References to pixels: decode, orient, flatten, resize. uint8 RGB; the tower's normalisation is
done on the device.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO, TypeVar

import numpy as np
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg

from evlm_jax.config import EVLMConfig
from evlm_jax.convert.torch_model.tiles_evlm import box
from evlm_jax.convert.torch_model.values_evlm import eight_bits, transparent_as_stored
from evlm_jax.data import video
from evlm_jax.data.containers.rows import open_ref
from evlm_jax.data.repair import foreign, mend
from evlm_jax.data.retry import retried
from evlm_jax.data.samples import ImageRef
from evlm_jax.data.tiling import laid_on_tiles

MOST_PIXELS = 1 << 27  # of a file: a larger one is taken for a decompression bomb
MOST_BYTES = 1 << 28
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # Pillow knows others, some of which start programs (docs/decisions.md, D-IMAGE-5)
WHITE = (255, 255, 255)
SIDEWAYS = (5, 6, 7, 8)  # orientations of EXIF that exchange width and height
# Pillow's BICUBIC by another name (docs/decisions.md, D-IMAGE-2).
BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)
MAKING = 3  # counts changes of how pixels are made: caches of features made otherwise are not used
Made = TypeVar("Made")
Size = int | tuple[int, int]  # the side of a square, or height and width
Picture = str | os.PathLike | Image.Image | np.ndarray | ImageRef
# A list in the list is a video: its frames are seen together.
Images = Picture | Sequence[Picture | Sequence[Picture]] | None


class ImageError(ValueError):
    """An image or frame cannot be read. The message names the file."""


def load(
    ref: ImageRef, size: Size, resize: str, fill: tuple[int, int, int] = WHITE, scaled: bool = False
) -> np.ndarray:
    """One image or video frame as uint8 [h, w, 3].

    Args:
      size: the side of a square, or (h, w).
      resize: "squash" stretches; "crop" cuts the middle to h : w; "pad" keeps everything and fills
        the rest with `fill`.
      scaled: decode JPEG at 1/2, 3/8, 1/4 or 1/8 where that is not smaller than `size`: faster, and
        slightly other pixels.
    Raises:
      ImageError: missing, damaged, or too large.
    """
    return load_all([ref], size, resize, fill, scaled)[0]


def load_all(
    refs: Sequence[ImageRef],
    size: Size,
    resize: str,
    fill: tuple[int, int, int] = WHITE,
    scaled: bool = False,
) -> np.ndarray:
    """uint8 [n, h, w, 3], read-only where there is one."""
    height, width = sides(size)
    images = decode_all(
        refs,
        max(height, width) if scaled else 0,
        lambda image: np.asarray(_fit(image, (width, height), resize, fill)),
        (width, height),
    )
    if len(images) == 1:  # as captions have: a copy less is 6% of the pipeline
        return images[0][None]
    return np.stack(images) if refs else np.zeros((0, height, width, 3), np.uint8)


def sides(size: Size | list[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else tuple(size)


def pixels(refs: Sequence[ImageRef], cfg: EVLMConfig) -> np.ndarray:
    """`load_all` with the size and resizing of `cfg`; padding has the tower's mean colour, which is
    0 after normalisation. With the grid of each, as data/tiling.py has them, where `cfg` says so.
    """
    if cfg.vit.grid_by_picture:
        made = decode_all(refs, 0, lambda image: laid_on_tiles(image, cfg.vit))
        return np.stack(made) if refs else np.zeros((0, *cfg.vit.input_shape), np.uint8)
    fill = tuple(round(255 * channel) for channel in cfg.vit.mean)
    return load_all(refs, cfg.vit.size, cfg.data.resize, fill, cfg.data.scaled_decoding)


def decode_all(
    refs: Sequence[ImageRef],
    least: int = 0,
    each: Callable[[Image.Image], Made] = lambda image: image,
    tile: tuple[int, int] = (1, 1),
) -> list[Made]:
    """`decode` of every reference, each result passed to `each` at once, so that large pictures do
    not accumulate; frames of one video are decoded in one pass, and tiles of one picture.

    Args:
      tile: width and height of one.
    """
    times: dict[str, list[float]] = {}
    cut: dict[str, list[ImageRef]] = {}
    for ref in refs:
        if ref.frame is not None:
            times.setdefault(ref.path, []).append(ref.frame)
        elif ref.tile is not None:
            cut.setdefault(ref.path, []).append(ref)
    parts = {
        ImageRef(path, second): frame
        for path, seconds in times.items()
        for second, frame in zip(seconds, _frames(path, seconds, each))
    }
    for tiles in cut.values():
        parts |= zip(tiles, map(each, _tiles(tiles, least, tile)))
    return [
        parts[ref] if ref in parts else each(ref.picture or decode(ref.path, least)) for ref in refs
    ]


def visuals_of(images: Images) -> tuple[tuple[ImageRef, ...], ...]:
    """The visuals of a Sample: pictures as callers have them.

    Raises ImageError as `in_memory`, and for a video without frames.
    """
    if images is None:
        return ()
    if not isinstance(images, (list, tuple)):
        images = [images]
    visuals = tuple(
        tuple(map(_ref, one)) if isinstance(one, (list, tuple)) else (_ref(one),) for one in images
    )
    if () in visuals:
        raise ImageError(
            "images has a video without frames: give at least one picture in each list"
        )
    return visuals


def _ref(picture: Picture) -> ImageRef:
    if isinstance(picture, (str, os.PathLike)):
        return ImageRef(os.fspath(picture))
    return picture if isinstance(picture, ImageRef) else in_memory(picture)


def in_memory(picture: Image.Image | np.ndarray) -> ImageRef:
    """A picture that is no file, read as a file with the same content is. Later changes of
    `picture` do not show.

    Args:
      picture: of Pillow, in any mode; or uint8 [h, w, 3].
    Raises:
      ImageError: another type, shape or dtype, nothing in it, or values that no file has.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(
                f"a picture as an array is uint8 [height, width, 3], got {picture.dtype}"
                f" {list(picture.shape)}: convert it"
            )
        picture = Image.fromarray(np.ascontiguousarray(picture))
    elif not isinstance(picture, Image.Image):
        raise ImageError(
            "a picture is a path, a Pillow image or a uint8 array [height, width, 3], got"
            f" {type(picture).__name__}"
        )
    try:
        transparent_as_stored(picture)
        made = picture.copy()
        with suppress(Exception):  # as in a file
            ImageOps.exif_transpose(made, in_place=True)
        made = _rgb(made)
        if 0 in made.size:
            raise ValueError("it has no pixels")
    except Exception as error:  # a damaged file that was opened, and not yet read
        raise ImageError(
            f"cannot read the picture of mode {picture.mode} and size {picture.size}: {error}"
        ) from error
    return ImageRef(
        f"picture {hashlib.sha256(f'{made.size}'.encode() + made.tobytes()).hexdigest()}",
        picture=made,
    )


def decode(path: str, least: int = 0) -> Image.Image:
    """RGB, upright, transparency over white; the first picture of an animation.

    Args:
      path: a file, or a reference to a member of a container.
      least: if not 0, a JPEG may come out at 1/2 or less, but with no side below this.
    Raises:
      ImageError: missing, damaged, or too large.
    """
    try:
        return _read(path, least)
    except Exception as error:  # damaged files make the decoders raise errors of any kind
        why = error.strerror if isinstance(error, OSError) else None  # there is none, or no file
        if isinstance(error, FileNotFoundError):  # of fsspec, it says the name alone
            why = why or "No such file, or its host does not answer"
        raise ImageError(f"{path}: {why or f'cannot decode the image: {error}'}") from error


@retried
def _read(path: str, least: int) -> Image.Image:
    with open_ref(path, MOST_BYTES) as file:
        size = file.seek(0, os.SEEK_END)
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes, the limit is {MOST_BYTES}")
        try:
            return _decoded(file, least)
        except Exception as error:
            file.seek(0)
            content = file.read()
            if mended := mend(content):
                return _decoded(io.BytesIO(mended), least)
            if other := foreign(content):
                raise other from error
            if isinstance(error, UnidentifiedImageError):  # says no more than an address in memory
                raise ValueError(
                    f"it is none of {', '.join(FORMATS)}: it begins with {content[:8]!r}"
                ) from error
            raise  # not `from` itself: who follows causes would go round for ever


def _decoded(file: BinaryIO, least: int) -> Image.Image:
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MOST_PIXELS}")
        transparent_as_stored(image)
        made = _scaled(image, file, least) if least and image.format == "JPEG" else image
        made.load()
        with suppress(Exception):  # without EXIF that can be read, a picture is upright
            ImageOps.exif_transpose(made, in_place=True)
        return _rgb(made)


def bicubic(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """An RGB picture, or its part in `box` (left, top, width, height), at `size` (width, height):
    Pillow's pixels but for rounding.

    Values between the two passes are clipped to 0..255, so the order of passes matters: across,
    then down, unless the height shrinks by more than twice as much as the width.
    """
    width, height = image.size
    left, top, wide, high = box or (0, 0, width, height)
    if height - size[1] > max(0, 2 * (width - size[0])):
        passes = ((0, top, width, high), (width, size[1])), ((left, 0, wide, size[1]), size)
    else:
        passes = ((left, 0, wide, height), (size[0], height)), ((0, top, size[0], high), size)
    resizer = Resizer()
    for cut, to in passes:
        whole, image = image, Image.new("RGB", to, None)  # not filled
        resizer.resize_pil(whole, image, ResizeOptions(BICUBIC, crop_box=CropBox(*cut)))
    return image


def _scaled(image: Image.Image, file: BinaryIO, least: int) -> Image.Image:
    """A JPEG at 1/2 or less. simplejpeg reads it in one call, in which other threads run; what it
    refuses is for Pillow to judge.
    """
    if image.mode in ("RGB", "L"):
        file.seek(0)
        with suppress(ValueError):
            made = Image.fromarray(
                decode_jpeg(file.read(), min_height=least, min_width=least, min_factor=2)
            )
            made.info = image.info
            return made
    image.draft(None, (least, least))
    return image


def _frames(path: str, seconds: list[float], each: Callable[[Image.Image], Made]) -> list[Made]:
    try:
        return retried(video.decode)(path, seconds, lambda frame: each(Image.fromarray(frame)))
    except video.VideoError as error:
        raise ImageError(str(error)) from error


def _tiles(refs: Sequence[ImageRef], least: int, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Tiles of one picture, each of `size` (width, height): it is stretched to their grid."""
    _, down, across = refs[0].tile
    whole = refs[0].picture or decode(refs[0].path, least * max(down, across))
    width, height = size
    whole = bicubic(whole, (across * width, down * height))
    for ref in refs:
        yield whole.crop(box(ref.tile[0], across, (height, width)))


def size_of(ref: ImageRef) -> tuple[int, int] | None:
    """Width and height of a picture, upright, of which no more than the header is read; None where
    it has none that can be read.
    """
    if ref.picture is not None:
        return ref.picture.size
    with suppress(Exception), open_ref(ref.path, MOST_BYTES) as file:
        with Image.open(file, formats=FORMATS) as image:
            size = image.size
            with suppress(Exception):  # without EXIF that can be read, a picture is upright
                if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
                    return size[::-1]
            return size
    return None


def _rgb(image: Image.Image) -> Image.Image:
    """Without a copy where there is nothing to do."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image)
    return image.convert("RGB")


def _fit(
    image: Image.Image, size: tuple[int, int], resize: str, fill: tuple[int, int, int]
) -> Image.Image:
    """A picture of `size` (width, height)."""
    width, height = image.size
    wide = width * size[1] > height * size[0]  # wider for its height than `size`
    if resize == "squash":
        return bicubic(image, size)
    if resize == "crop":
        cut = (size[0] / size[1] * height, height) if wide else (width, size[1] / size[0] * width)
        return bicubic(image, size, ((width - cut[0]) / 2, (height - cut[1]) / 2, *cut))
    whole = (
        (size[0], max(1, round(height / width * size[0])))
        if wide
        else (max(1, round(width / height * size[1])), size[1])
    )
    return ImageOps.pad(bicubic(image, whole), size, color=fill)
