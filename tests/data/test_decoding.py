"""Every kind of file against Pillow's plain path; scaled decoding against full decoding; limits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from evlm_jax import assets
from evlm_jax.data import image
from evlm_jax.data.image import ImageError, decode, load, pixels
from evlm_jax.data.samples import ImageRef
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config

RNG = np.random.default_rng(0)


def smooth(width, height, channels=3):
    """A picture that survives lossy formats."""
    y, x = np.mgrid[:height, :width]
    planes = [
        127 + 120 * np.sin((c + 1) * x / 17 + y / 23) * np.cos((c + 2) * y / 29)
        for c in range(channels)
    ]
    return np.stack(planes, -1).astype(np.uint8)


RGB = Image.fromarray(smooth(60, 40))
RGBA = Image.fromarray(smooth(60, 40, 4))
KINDS = {  # suffix, picture, how it is saved
    "jpeg": ("jpg", RGB, {}),
    "progressive": ("jpg", RGB, {"progressive": True}),
    "no chroma subsampling": ("jpg", RGB, {"subsampling": 0, "quality": 95}),
    "grey jpeg": ("jpg", RGB.convert("L"), {}),
    "cmyk jpeg": ("jpg", RGB.convert("CMYK"), {}),
    "two pictures in one jpeg": ("mpo", RGB, {"save_all": True, "append_images": [RGB.rotate(90)]}),
    "png": ("png", RGB, {}),
    "palette": ("png", RGB.quantize(16), {}),
    "bits": ("png", RGB.convert("1"), {}),
    "webp": ("webp", RGB, {}),
    "lossless webp": ("webp", RGB, {"lossless": True}),
    "gif": ("gif", RGB.quantize(64), {}),
    "moving gif": ("gif", RGB, {"save_all": True, "append_images": [RGB.rotate(90)]}),
    "moving webp": ("webp", RGB, {"save_all": True, "append_images": [RGB.rotate(90)]}),
    "bmp": ("bmp", RGB, {}),
    "tiff": ("tif", RGB, {"compression": "tiff_lzw"}),
    "cmyk tiff": ("tif", RGB.convert("CMYK"), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_opaque_pictures_are_pillows(tmp_path, kind):
    suffix, picture, options = KINDS[kind]
    picture.save(tmp_path / f"a.{suffix}", **options)
    with Image.open(tmp_path / f"a.{suffix}") as plain:
        expected = plain.convert("RGB")
    found = decode(str(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "suffix, picture", [("png", RGBA), ("webp", RGBA), ("tif", RGBA), ("png", RGBA.convert("LA"))]
)
def test_transparency_over_white(tmp_path, suffix, picture):
    picture.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(tmp_path / f"a.{suffix}") as plain:
        values = np.asarray(plain.convert("RGBA")).astype(float)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    assert (
        np.abs(np.asarray(decode(str(tmp_path / f"a.{suffix}"))).astype(float) - expected).max()
        <= 1
    )


def test_a_transparent_colour_is_white(tmp_path):
    RGB.quantize(8).save(tmp_path / "p.png", transparency=3)
    with Image.open(tmp_path / "p.png") as plain:
        clear, colours = np.asarray(plain) == 3, np.asarray(plain.convert("RGB"))
    found = np.asarray(decode(str(tmp_path / "p.png")))
    assert clear.any() and (found[clear] == 255).all() and (found[~clear] == colours[~clear]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_their_upper_half(tmp_path, suffix):
    values = RNG.integers(0, 1 << 16, (9, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    found = np.asarray(decode(str(tmp_path / f"a.{suffix}")))
    assert (found == (values >> 8)[..., None]).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_camera_orientation(tmp_path, orientation, scaled):
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = Image.fromarray(smooth(320, 160))
    big.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as plain:
        upright = ImageOps.exif_transpose(plain).convert("RGB")
    found = decode(str(tmp_path / "a.jpg"), 80 if scaled else 0)
    assert found.size == tuple(side // (1 + scaled) for side in upright.size)
    difference = np.asarray(found.resize((32, 32))).astype(int) - np.asarray(
        upright.resize((32, 32))
    )
    assert np.abs(difference).max() <= (8 if scaled else 0)


SCALES = [  # size of the file, least side wanted, size decoded
    ((640, 480), 224, (320, 240)),
    ((640, 480), 240, (320, 240)),
    ((640, 480), 241, (640, 480)),
    ((640, 480), 112, (160, 120)),
    ((641, 479), 60, (81, 60)),
    ((641, 479), 61, (161, 120)),
    ((1024, 768), 224, (384, 288)),
    ((64, 64), 224, (64, 64)),
    ((4000, 300), 224, (4000, 300)),
    ((640, 480), 0, (640, 480)),
]


@pytest.mark.parametrize("size, least, expected", SCALES)
def test_scaled_decoding_never_falls_below_the_wanted_size(tmp_path, size, least, expected):
    Image.fromarray(smooth(*size)).save(tmp_path / "a.jpg")
    assert decode(str(tmp_path / "a.jpg"), least).size == expected
    Image.fromarray(smooth(*size)).save(tmp_path / "a.png")
    assert decode(str(tmp_path / "a.png"), least).size == size  # a matter of JPEG


@needs_asset("photos")
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size, most", [(224, 2.5), (448, 0.0), (700, 0.0)])
def test_scaled_decoding_of_photographs_is_close(tmp_path, size, most, resize):
    """At 448 px nothing is decoded smaller."""
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png"):
        with Image.open(assets.path("photos") / name) as photo:
            photo.convert("RGB").resize((640, 480), Image.Resampling.LANCZOS).save(
                tmp_path / "a.jpg", quality=90
            )
        full, fast = (
            load(ImageRef(str(tmp_path / "a.jpg")), size, resize, scaled=scaled).astype(int)
            for scaled in (False, True)
        )
        difference = np.abs(full - fast).mean()
        assert difference <= most, (name, difference)


def test_the_configuration_chooses_scaled_decoding(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / "a.jpg")
    ref = ImageRef(str(tmp_path / "a.jpg"))
    found = {
        scaled: pixels([ref], tiny_config(data=dict(scaled_decoding=scaled)))[0]
        for scaled in (False, True)
    }
    np.testing.assert_array_equal(found[False], load(ref, 8, "squash"))
    np.testing.assert_array_equal(found[True], load(ref, 8, "squash", scaled=True))
    assert (found[False] != found[True]).any()


def png_of(width, height):
    """The header of a PNG that says this size, and no pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    "size", [(12000, 12000), (1 << 20, 1 << 10), (2**31 - 1, 2**31 - 1), (1 << 27, 2), (0, 5)]
)
def test_absurd_sizes_are_refused(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_of(*size))
    with pytest.raises(ImageError, match="bomb.png: cannot decode the image"):
        decode(str(tmp_path / "bomb.png"))


def test_files_that_are_too_large(tmp_path, monkeypatch):
    RGB.save(tmp_path / "a.png")
    monkeypatch.setattr(image, "MOST_BYTES", 99)
    with pytest.raises(ImageError, match="a.png: .*bytes, the limit is 99"):
        decode(str(tmp_path / "a.png"))


@pytest.mark.parametrize("suffix", ["eps", "ppm", "ico", "tga"])
def test_other_formats_are_not_opened(tmp_path, suffix):
    RGB.save(tmp_path / f"a.{suffix}")
    with pytest.raises(ImageError, match=f"a.{suffix}: cannot decode the image: it is none of"):
        decode(str(tmp_path / f"a.{suffix}"))
