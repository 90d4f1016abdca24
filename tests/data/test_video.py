"""Which frames are seen, and that they are those of PyAV's own decoding from front to back."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from evlm_jax.data import video
from evlm_jax.data.image import ImageError, load, load_all
from evlm_jax.data.samples import ImageRef, RowError
from evlm_jax.data.sources import open_source
from evlm_jax.data.video import VideoError
from tests.data.made import row, write_jsonl
from tests.data.test_images import write_video


def noise(path, times, codec="mpeg4", size=32, options=None, **muxer):
    """A clip of noise whose frames are shown at these times, in hundredths of a second."""
    rng = np.random.default_rng(0)
    with av.open(path, "w", **muxer) as container:
        stream = container.add_stream(codec, rate=100, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = (
            size,
            size // 2,
            "yuv420p",
            12,
        )
        for time in times:
            frame = av.VideoFrame.from_ndarray(
                rng.integers(0, 256, (size // 2, size, 3)).astype(np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path):
    """[(second, pixels)] of all frames."""
    with av.open(str(path)) as container:
        return [
            (frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]


@pytest.mark.parametrize(
    "suffix, codec, options",
    [("mp4", "libx264", {"bf": "2"}), ("mkv", "mpeg4", {}), ("webm", "libvpx", {})],
)
def test_frames_are_those_of_the_whole_decoding(tmp_path, suffix, codec, options):
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.integers(1, 40, 60)).tolist()  # in irregular steps
    path = noise(f"{tmp_path}/v.{suffix}", times, codec, options=options)
    whole = decoded(path)
    start = whole[0][0]
    wanted = [0.0, *rng.uniform(0, whole[-1][0] - start, 40).tolist(), whole[-1][0] - start]
    for second, frame in zip(wanted, video.decode(path, wanted), strict=True):
        shown = [pixels for time, pixels in whole if time <= start + second + 1e-6][-1]
        np.testing.assert_array_equal(frame, shown)


def test_by_number_by_rate_and_by_seconds(tmp_path):
    path = write_video(tmp_path / "v.mp4", seconds=4, fps=5)

    def times(frames):
        return [ref.frame for ref in video.sample(path, frames)]

    assert times(2) == times("2") == [1.0, 3.0]
    assert times("2fps") == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5] and times("0.1fps") == [0.0]
    assert times([3, 0.5, 0.5]) == [3.0, 0.5, 0.5]
    assert load_all(video.sample(path, "1fps"), 8, "squash").mean((1, 2, 3)) == pytest.approx(
        [0, 60, 120, 180], abs=4
    )


def test_a_thousand_frames(tmp_path):
    path = noise(f"{tmp_path}/v.mp4", range(0, 3000, 2), size=16)
    refs = video.sample(path, "1024")
    whole = decoded(path)
    assert len(refs) == 1024 and len(whole) == 1500
    frames = video.decode(path, [ref.frame for ref in refs], each=lambda frame: int(frame.sum()))
    assert frames == [int(whole[int(ref.frame * 50)][1].sum()) for ref in refs]
    assert video.sample(path, "100fps") == refs  # more than the most
    with pytest.raises(ValueError, match="v.mp4: a video has 1 to 1024 frames, not 1025"):
        video.sample(path, "1025")


@pytest.mark.parametrize("frames", ["0", "-3", "x", "fps", "0fps", "2 fps", "1e9"])
def test_wrong_numbers_of_frames(tmp_path, frames):
    path = write_video(tmp_path / "v.mp4", seconds=1, fps=5)
    with pytest.raises(
        ValueError, match=f"frames={frames}: write a number of frames, as 16, or a rate, as 2fps"
    ):
        video.sample(path, frames)
    with pytest.raises(ValueError, match="must not be negative"):
        video.sample(path, [1.0, -1.0])
    with pytest.raises(ValueError, match="a video has 1 to 1024 frames, not 0"):
        video.sample(path, [])


@pytest.mark.parametrize(
    "suffix, codec, options", [("mp4", "mpeg4", {"movflags": "faststart"}), ("mkv", "mpeg4", {})]
)
def test_a_video_that_ends_early(tmp_path, suffix, codec, options):
    """The file tells ten seconds; one with sound of ten seconds and pictures of nine and a half
    would be fine.
    """
    whole = noise(f"{tmp_path}/v.{suffix}", range(0, 1000, 10), codec, container_options=options)
    content, cut = open(whole, "rb").read(), str(tmp_path / f"cut.{suffix}")
    open(cut, "wb").write(content[: len(content) // 2])
    first, *others = video.sample(cut, 4)
    np.testing.assert_array_equal(
        load(first, 8, "squash"), load(ImageRef(whole, first.frame), 8, "squash")
    )
    with pytest.raises(
        ImageError,
        match=rf"cut.{suffix}: cannot decode the video: it ends at [\d.]+ s, but tells 9.91 s",
    ):
        load_all([first, *others], 8, "squash")
    with pytest.raises(ImageError, match=rf"cut.{suffix}: .* (it ends at|there is no frame at)"):
        load(others[-1], 8, "squash")
    open(cut, "wb").write(content[: int(0.96 * len(content))])
    assert len(video.decode(cut, [ref.frame for ref in video.sample(cut, 16)])) == 16


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_pictures_of_a_turned_telephone_are_upright(tmp_path, degrees):
    """The display matrix of an MP4 file, written by hand: (x, y) -> (a x + c y, b x + d y), y
    downwards.
    """
    path = noise(f"{tmp_path}/v.mp4", range(0, 50, 10))
    content = bytearray(open(path, "rb").read())
    turn = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[
        degrees
    ]  # clockwise
    a, b, c, d = (value << 16 for value in turn)
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    open(path, "wb").write(content)
    (frame,), (_, stored), *_ = video.decode(path, [0.0]), *decoded(path)
    np.testing.assert_array_equal(frame, np.rot90(stored, -degrees // 90))


def test_a_video_that_does_not_tell_its_length(tmp_path):
    """As browsers record them: written without going back."""
    buffer = io.BytesIO()
    pipe = type("Pipe", (), {"write": lambda self, data: buffer.write(data)})()
    noise(pipe, range(0, 300, 10), format="matroska", options={})
    path = tmp_path / "v.mkv"
    path.write_bytes(buffer.getvalue())
    with av.open(str(path)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    assert video.duration(path) == pytest.approx(3, abs=0.1)
    assert len(video.decode(path, [ref.frame for ref in video.sample(path, 8)])) == 8


def test_broken_videos_are_bad_rows(tmp_path):
    write_video(tmp_path / "good.mp4", seconds=4, fps=5)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    rows = [
        row(name, None, "<video>What?", "Light.") | {"video": f"{name}.mp4", "frames": [0.5, 2]}
        for name in ("good", "broken")
    ]
    rows += [rows[1] | {"frames": "2fps"}, rows[0] | {"frames": "fast"}]
    source = open_source(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [ref.frame for ref in source[0].refs] == [0.5, 2.0]
    with pytest.raises(
        ImageError, match="broken.mp4"
    ):  # seconds that are given cost no look into the file
        load_all(source[1].refs, 8, "squash")
    with pytest.raises(RowError, match="broken: VideoError: .*broken.mp4: cannot decode"):
        source[2]
    with pytest.raises(RowError, match="good: ValueError: .*good.mp4: frames=fast: write a number"):
        source[3]
    with pytest.raises(VideoError, match="there is no video stream|cannot decode"):
        video.sample(tmp_path / "rows.jsonl", 4)


OPEN_ENDED = [  # an index lacks or is of decoding times; times do not begin at 0
    ("ts", "libx264", {"bf": "2"}, 0, "mpegts"),
    ("ts", "mpeg2video", {}, 500, "mpegts"),
    ("avi", "mpeg4", {"bf": "2"}, 0, None),
    ("avi", "libx264", {"bf": "2"}, 0, None),
    ("mkv", "libx264", {"bf": "2"}, 500, None),
    ("webm", "libvpx", {}, 500, None),
    ("mpg", "mpeg2video", {"bf": "2"}, 0, None),
]


@pytest.mark.parametrize("suffix, codec, options, start, form", OPEN_ENDED)
def test_frames_behind_seeks_of_every_container(tmp_path, suffix, codec, options, start, form):
    """Second 0 is the first picture, a length ends with the last one; a frame that is asked for
    alone is the one of the whole decoding.
    """
    path = noise(
        f"{tmp_path}/v.{suffix}",
        range(start, start + 800, 4),
        codec,
        options=options,
        **({"format": form} if form else {}),
    )
    whole = decoded(path)
    first, last = whole[0][0], whole[-1][0]
    assert video.duration(path) == pytest.approx(last - first, abs=0.6)
    for second in (0.0, 1.3, 3.99, 5.02, last - first):
        shown = [pixels for time, pixels in whole if time <= first + second + 1e-6][-1]
        np.testing.assert_array_equal(video.decode(path, [second])[0], shown)
    seconds = [ref.frame for ref in video.sample(path, 6)]
    shown = [
        [pixels for time, pixels in whole if time <= first + second + 1e-6][-1]
        for second in seconds
    ]
    np.testing.assert_array_equal(video.decode(path, seconds), shown)


@pytest.mark.parametrize("name", ["list.m3u8", "notes.txt"])
def test_a_playlist_or_a_text_is_no_video(tmp_path, name):
    """FFmpeg would open what a playlist names, on this disk or elsewhere, and draw a text."""
    clip = noise(str(tmp_path / "v.mp4"), range(0, 100, 10))
    listed = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{clip}\n#EXT-X-ENDLIST\n"
    path = tmp_path / name
    path.write_text(listed if name == "list.m3u8" else "hello world\n" * 50)
    with pytest.raises(VideoError, match=f"{name}: .* it is none of mov, matroska"):
        video.sample(str(path), 2)
