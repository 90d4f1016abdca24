"""Pictures as cameras, scanners and web sites write them: their pixels, or an error that says what
they are; held against NumPy.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from evlm_jax.data.image import ImageError, decode

RNG = np.random.default_rng(0)
GREY16 = RNG.integers(0, 1 << 16, (6, 8)).astype(np.uint16)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, values, depth, colour, *extra):
    """A PNG of rows of bytes, written by hand."""
    data = zlib.compress(b"".join(b"\0" + row for row in values))
    width, height = (8, len(values))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return str(path)


def grey(path):
    """The first channel of a picture, of which all channels are equal."""
    found = np.asarray(decode(str(path)))
    assert (found == found[..., :1]).all()
    return found[..., 0]


def test_grey_of_16_bits_keeps_the_upper_half(tmp_path):
    for name in ("a.png", "a.tif"):
        Image.fromarray(GREY16).save(tmp_path / name)
        np.testing.assert_array_equal(grey(tmp_path / name), GREY16 >> 8)
    Image.frombytes("I;16B", (8, 6), GREY16.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    np.testing.assert_array_equal(grey(tmp_path / "b.tif"), GREY16 >> 8)
    Image.fromarray(GREY16).save(tmp_path / "c.tif", tiffinfo={262: 0})  # white is zero
    np.testing.assert_array_equal(grey(tmp_path / "c.tif"), (0xFFFF - GREY16) >> 8)


def tiff12(path, values):
    """12 bits a value, packed: two in three bytes."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (
        ((pairs[:, 0] << 12) | pairs[:, 1])
        .astype(">u4")
        .view(np.uint8)
        .reshape(-1, 4)[:, 1:]
        .tobytes()
    )
    height, width = values.shape
    tags = {
        256: width,
        257: height,
        258: 12,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: height,
        279: len(packed),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(
        b"II*\0"
        + struct.pack("<I", 8 + len(packed))
        + packed
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )
    return path


def test_grey_of_12_bits_is_scaled_by_its_own_range(tmp_path):
    values = RNG.integers(0, 1 << 12, (6, 8))
    np.testing.assert_array_equal(grey(tiff12(tmp_path / "a.tif", values)), values >> 4)


def test_transparent_values_of_grey(tmp_path):
    """Of 16 bits one value exactly, not all of its upper half; of 2 and 4 bits on the scale of the
    pixels.
    """
    values = np.full((2, 8), 0x8001, np.uint16)
    values[:, 4:] = 0x8000
    path = png(
        tmp_path / "a.png",
        [row.astype(">u2").tobytes() for row in values],
        16,
        0,
        (b"tRNS", struct.pack(">H", 0x8000)),
    )
    np.testing.assert_array_equal(grey(path), np.where(values == 0x8000, 255, 0x80))
    for depth, rows in ((2, [bytes([0b00011011] * 2)]), (4, [bytes([0x01, 0x23, 0x45, 0x67])])):
        levels = [0, 1, 2, 3] * 2 if depth == 2 else list(range(8))
        path = png(tmp_path / "b.png", rows, depth, 0, (b"tRNS", struct.pack(">H", 1)))
        np.testing.assert_array_equal(
            grey(path)[0],
            [255 if level == 1 else level * 255 // (2**depth - 1) for level in levels],
        )
    rows = [np.zeros((8, 3), ">u2").tobytes()]
    with pytest.raises(
        ImageError,
        match="a transparent colour of 16 bits is not read: save it with an alpha channel",
    ):
        decode(png(tmp_path / "c.png", rows, 16, 2, (b"tRNS", bytes(6))))


def test_what_does_not_tell_its_white_is_refused(tmp_path):
    for name, values in (
        ("i", np.full((4, 4), 100, np.int32)),
        ("f", np.full((4, 4), 0.5, np.float32)),
    ):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with pytest.raises(
            ImageError,
            match=f"pictures of mode {name.upper()} .* are not read: save it with 8 or 16 bits",
        ):
            decode(str(tmp_path / f"{name}.tif"))
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tif")
    with pytest.raises(ImageError, match="pictures of mode LAB"):
        decode(str(tmp_path / "lab.tif"))


BIG = zlib.compress(b"x" * (3 << 20))
TELLING = {
    "zTXt": (b"zTXt", b"Comment\0\0" + BIG),
    "iTXt": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG),
    "iCCP": (b"iCCP", b"icc\0\0" + BIG),
    "eXIf": (b"eXIf", b"\0\x08\0\2\1\x12\0\3"),
}


@pytest.mark.parametrize("kind", TELLING)
def test_what_a_picture_tells_of_itself_does_not_cost_its_pixels(tmp_path, kind):
    values = RNG.integers(0, 256, (5, 8, 3)).astype(np.uint8)
    path = png(tmp_path / "a.png", [row.tobytes() for row in values], 8, 2, TELLING[kind])
    np.testing.assert_array_equal(np.asarray(decode(path)), values)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-30])  # pixels that lack are still an error
    with pytest.raises(ImageError, match="a.png: cannot decode"):
        decode(path)


@pytest.mark.parametrize("least", [0, 8])
def test_a_jpeg_without_its_end_mark(tmp_path, least):
    picture = Image.fromarray(RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8))
    for progressive in (False, True):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", progressive=progressive)
        content = buffer.getvalue()
        (tmp_path / "a.jpg").write_bytes(content)
        whole = np.asarray(decode(str(tmp_path / "a.jpg"), least))
        for cut in (2, 6, len(content) // 2):
            (tmp_path / "a.jpg").write_bytes(content[:-cut])
            if cut == 2 and not progressive:
                np.testing.assert_array_equal(
                    np.asarray(decode(str(tmp_path / "a.jpg"), least)), whole
                )
            else:  # of several passes the last might lack
                with pytest.raises(ImageError, match="a.jpg: cannot decode"):
                    decode(str(tmp_path / "a.jpg"), least)


FOREIGN = {
    b"\0\0\0\x1cftypavis": "it is AVIF, which is not read",
    b"\0\0\0\x18ftyphevc": "it is HEIC, which is not read",
    b"\0\0\0\x18ftypisom": "it is a video, which is not read",
    b"\0\0\0\x0cjP  \r\n": "it is JPEG 2000, which is not read",
    b"\xef\xbb\xbf\n<svg/>": "it is HTML, XML or SVG, which is not read",
    b"version https://git-lfs.github.com/spec/v1": "it is a pointer of Git LFS .git lfs pull",
    b"": "it is an empty file, which is not read",
    b'{"error": 404}': "it is none of JPEG, PNG, .*: it begins with b'{\"error\"'",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_other_files_are_called_by_their_names(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=f"a.jpg: cannot decode the image: {FOREIGN[content]}"):
        decode(str(tmp_path / "a.jpg"))
