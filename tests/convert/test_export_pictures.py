"""Pictures of every kind as the exported processor reads them, against what training reads."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from evlm_jax.data import image
from evlm_jax.data.samples import ImageRef

pytest.importorskip("torch", reason="needs the extra parity")


def two_bits():
    """A PNG of 2 bits a value, whose value 1 is transparent."""

    def part(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = zlib.compress(b"".join(b"\0" + bytes([0b00011011] * 15) for _ in range(40)))
    head = part(b"IHDR", struct.pack(">IIBBBBB", 60, 40, 2, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + part(b"tRNS", b"\0\1")
        + part(b"IDAT", rows)
        + part(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [16, (20, 12)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_pictures_of_every_kind_are_those_of_training(tmp_path, resize, size):
    from evlm_jax.convert.torch_model.pictures_evlm import fitted, read_picture

    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    clear = colour.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (40, 60), np.uint8)))
    ramp = (np.linspace(0, 65535, 60)[None] * np.ones((40, 1))).astype(np.uint16)
    turned = Image.Exif()
    turned[0x112] = 6
    for mode in ("L", "1", "LA", "P", "RGBA"):
        colour.convert(mode).save(tmp_path / f"{mode}.png")
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    Image.fromarray(ramp).save(tmp_path / "grey16.tif")
    colour.convert("P").save(tmp_path / "clear_colour.png", transparency=3)
    Image.fromarray(ramp).save(tmp_path / "clear_grey16.png", transparency=0)
    (tmp_path / "clear_grey2.png").write_bytes(two_bits())
    colour.save(tmp_path / "clear_rgb.png", transparency=colour.getpixel((0, 0)))
    clear.save(tmp_path / "clear.png")
    clear.save(tmp_path / "clear.webp", lossless=True)
    colour.save(tmp_path / "turned.jpg", exif=turned, quality=95)
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg")
    colour.save(tmp_path / "animal.gif", save_all=True, append_images=[colour.rotate(180)])
    for file in sorted(tmp_path.iterdir()):
        ours = image.load(ImageRef(str(file)), size, resize, (124, 116, 104)).astype(float)
        for picture in (file, Image.open(file)):
            theirs = np.asarray(fitted(read_picture(picture), size, resize, (124, 116, 104)), float)
            assert np.abs(theirs - ours).max() <= 1, file.name
        assert 20 < ours.mean() < 235, file.name  # neither black nor white
    Image.fromarray(np.float32(ramp / 65535)).save(tmp_path / "fractions.tif")
    for read in (
        lambda: image.decode(str(tmp_path / "fractions.tif")),
        lambda: read_picture(tmp_path / "fractions.tif"),
    ):
        with pytest.raises(ValueError, match="fractions.tif: .*mode F"):
            read()
