"""A picture in memory is read as its file is."""

import numpy as np
import pytest
from PIL import Image

from evlm_jax.data import image
from evlm_jax.data.samples import ImageRef
from tests.helpers.tiny import tiny_config


def made_of(mode: str) -> tuple[Image.Image, dict]:
    """A picture, and how it is saved."""
    values = np.random.default_rng(0).integers(0, 256, (9, 14, 4)).astype(np.uint8)
    rgba = Image.fromarray(values)
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return rgba.convert("RGB"), {"format": "JPEG", "exif": exif}
    if mode == "I;16":
        return Image.fromarray(values[..., :2].copy().view(np.uint16)[..., 0]), {"format": "PNG"}
    if mode == "clear":
        return rgba.convert("L"), {"format": "PNG", "transparency": int(values[0, 0, 0])}
    return rgba.convert(mode), {"format": "TIFF" if mode == "CMYK" else "PNG"}


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "turned", "clear"]
)
def test_a_picture_in_memory_is_read_as_its_file(tmp_path, mode):
    made, how = made_of(mode)
    made.save(tmp_path / "picture", **how)
    cfg = tiny_config()
    wanted = image.pixels([ImageRef(str(tmp_path / "picture"))], cfg)
    opened = Image.open(tmp_path / "picture")
    for _ in range(2):
        assert np.array_equal(image.pixels([image.in_memory(opened)], cfg), wanted)
    array = np.asarray(image.decode(str(tmp_path / "picture")))
    assert np.array_equal(image.pixels([image.in_memory(array)], cfg), wanted)
    assert image.in_memory(array) == image.in_memory(opened) != image.in_memory(255 - array)
