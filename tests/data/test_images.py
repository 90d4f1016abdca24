"""Pixels of the awkward kinds of image, geometry of the resizings, frames of videos."""

import av
import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from evlm_jax.data import image, video
from evlm_jax.data.image import WHITE, ImageError, load, load_all, pixels, sides
from evlm_jax.data.samples import ImageRef
from tests.helpers.tiny import tiny_config


def saved(path, picture, **options):
    picture.save(path, **options)
    return ImageRef(str(path))


def write_video(path, seconds, fps, size=32):
    """Frame i is grey of brightness 12 * i (modulo 240); a key frame every two seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 2 * fps, 4_000_000
        for i in range(seconds * fps):
            grey = np.full((size, size, 3), 12 * i % 240, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_transparency_goes_over_white(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (4, 0, 8, 8))
    out = load(saved(tmp_path / "a.png", picture), 8, "squash")
    assert (out[:, 0] == 255).all() and (out[:, 7] == (0, 0, 255)).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    out = load(saved(tmp_path / "p.gif", palette, transparency=0), 8, "squash")
    assert (out == 255).all()


@pytest.mark.parametrize(
    "mode, color, rgb",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255,) * 3),
        ("I;16", 0x80FF, (128,) * 3),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LA", (9, 255), (9,) * 3),
    ],
)
def test_modes(tmp_path, mode, color, rgb):
    suffix = "tif" if mode == "CMYK" else "png"
    assert (
        load(saved(tmp_path / f"a.{suffix}", Image.new(mode, (8, 8), color)), 8, "squash") == rgb
    ).all()


def test_camera_orientation_is_undone(tmp_path):
    picture = Image.new("RGB", (8, 4), "white")
    picture.paste((0, 0, 0), (0, 0, 4, 4))  # the left half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    out = load(saved(tmp_path / "a.png", picture, exif=exif), 8, "squash")
    assert (out[0] == 0).all() and (out[7] == 255).all()


def test_resizings(tmp_path):
    """A picture twice as wide as high, of four vertical stripes."""
    stripes = np.repeat(np.array([10, 60, 120, 180], np.uint8), 8)
    ref = saved(tmp_path / "a.png", Image.fromarray(np.tile(stripes, (16, 1))))

    def middle(how):
        return load(ref, 16, how)[8, :, 0]

    assert middle("squash")[[1, 6, 9, 14]].tolist() == pytest.approx([10, 60, 120, 180], abs=1)
    assert middle("crop")[[1, 6, 9, 14]].tolist() == [60, 60, 120, 120]
    padded = load(ref, 16, "pad", fill=(1, 2, 3))
    assert (padded[:4] == (1, 2, 3)).all() and (padded[-4:] == (1, 2, 3)).all()
    assert padded[8, [1, 6, 9, 14], 0].tolist() == pytest.approx([10, 60, 120, 180], abs=1)


PILLOWS = {
    "squash": lambda image, square: image.resize(square, Image.Resampling.BICUBIC),
    "crop": lambda image, square: ImageOps.fit(image, square, Image.Resampling.BICUBIC),
    "pad": lambda image, square: ImageOps.pad(image, square, Image.Resampling.BICUBIC, color=WHITE),
}


@pytest.mark.parametrize("resize", PILLOWS)
@pytest.mark.parametrize(
    "width, height", [(640, 480), (333, 500), (64, 64), (100, 31), (1, 1), (2000, 9), (31, 1500)]
)
def test_resizing_is_pillows_but_for_rounding(tmp_path, resize, width, height):
    """Noise is the worst there is: every intermediate value may be cut off at 0 and 255."""
    if int(PIL.__version__.split(".")[0]) < 13 and height > width:
        pytest.skip("Pillow 12 resizes tall pictures across first; ours are as 13 makes them")
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    )
    ref = saved(tmp_path / "a.png", noise)
    for size in (112, 224, (448, 448), (224, 448), (448, 168)):
        high, wide = sides(size)
        difference = np.abs(
            load(ref, size, resize).astype(int) - np.asarray(PILLOWS[resize](noise, (wide, high)))
        )
        assert difference.max() <= 2 and (difference > 0).mean() < 0.015, size


def test_the_thinnest_picture_keeps_a_row(tmp_path):
    assert (
        load(saved(tmp_path / "a.png", Image.new("RGB", (3000, 2))), 8, "pad") == 0
    ).sum() == 8 * 3


def test_padding_has_the_towers_mean_colour(tmp_path):
    cfg = tiny_config(data=dict(resize="pad"))
    out = pixels([saved(tmp_path / "a.png", Image.new("RGB", (8, 2), "white"))], cfg)
    assert out.shape == (1, 8, 8, 3) and out[0, 0, 0].tolist() == [
        round(255 * m) for m in cfg.vit.mean
    ]


def test_no_images_is_an_empty_array():
    assert load_all([], 8, "squash").shape == (0, 8, 8, 3)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "MOST_PIXELS", 63)
    with pytest.raises(ImageError, match="a.png: .*8 x 8 pixels, the limit is 63"):
        load(saved(tmp_path / "a.png", Image.new("L", (8, 8))), 8, "squash")


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["png", "jpg", "webp", "gif", "tif", "mp4"]), data=st.data())
def test_damage_never_gets_further_than_an_image_error(tmp_path_factory, kind, data):
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f"whole.{kind}"
    if not whole.exists():
        noise = Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
        )
        write_video(whole, 2, 5) if kind == "mp4" else noise.save(whole)
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
    damaged = folder / f"damaged.{kind}"
    damaged.write_bytes(content)
    try:
        out = load(ImageRef(str(damaged), 0.5 if kind == "mp4" else None), 8, "squash")
    except ImageError as error:
        assert str(damaged) in str(error)
    else:
        assert (out.shape, out.dtype) == ((8, 8, 3), np.uint8)


def brightness(path, seconds):
    return [round(float(frame.mean()) / 12) for frame in video.decode(path, seconds)]


def test_video_shows_the_frame_of_that_time(tmp_path):
    path = write_video(tmp_path / "v.mp4", seconds=2, fps=10)
    assert brightness(path, [0.0, 0.05, 0.1, 0.95, 1.0, 1.9, 99.0]) == [0, 0, 1, 9, 10, 19, 19]
    assert brightness(path, [1.0, 0.0, 1.0]) == [10, 0, 10]  # in the order asked for


def test_far_apart_frames_are_sought(tmp_path):
    path = write_video(tmp_path / "v.mp4", seconds=30, fps=5)
    times = [0.1, 3.3, 4.1, 9.9, 10.1, 17.5, 29.9]
    assert brightness(path, times) == [int(t * 5) % 20 for t in times]


def test_uniform_frames_are_the_middles_of_equal_parts(tmp_path):
    path = write_video(tmp_path / "v.mp4", seconds=4, fps=5)
    assert video.sample(path, 4) == tuple(ImageRef(str(path), t) for t in (0.5, 1.5, 2.5, 3.5))
    assert load_all(video.sample(path, 4), 8, "squash").mean((1, 2, 3)) == pytest.approx(
        [24, 84, 144, 204], abs=4
    )


def test_images_and_frames_keep_their_order(tmp_path):
    path = write_video(tmp_path / "v.mp4", seconds=2, fps=5)
    white = saved(tmp_path / "a.png", Image.new("L", (8, 8), 255))
    out = load_all([ImageRef(str(path), 1.0), white, ImageRef(str(path), 0.0)], 8, "squash").mean(
        (1, 2, 3)
    )
    assert out == pytest.approx([60, 255, 0], abs=4)
