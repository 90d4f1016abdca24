"""Frames of a video: which ones (as references, cheap), and their pixels (PyAV)."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TypeVar

import av
import numpy as np

from evlm_jax.data.containers.rows import open_ref
from evlm_jax.data.samples import ImageRef

MOST_FRAMES = 1024  # of one video
SEEK = 4.0  # seconds: over larger gaps, jumping to a key frame beats decoding on
LOST = 0.1  # share of its length that may lack at the end: sound often lasts longer than pictures
# PyAV before 19 refuses metadata that are not UTF-8 unless it is told to; since then it takes them,
# and knows the argument no more.
LENIENT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Containers that hold what they show, by FFmpeg's names. Of others, as playlists, it would open the
# files and hosts that they name, and of a text it would make a picture.
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,ogg,flv,asf,gif,apng,mxf,nut,ivf,rm,dv"
Made = TypeVar("Made")


class VideoError(ValueError):
    """A video cannot be read. The message names the file."""


def sample(path: str, frames: int | str | Sequence[float]) -> tuple[ImageRef, ...]:
    """The frames of a video that are seen, 1024 at most.

    Args:
      frames: a number: the middles of so many equal parts; "2fps": so many a second from its
        beginning on, of a longer video 1024 by number; a list: those at these seconds.
    Raises:
      VideoError: the video cannot be read; ValueError: `frames` is none of that, or too many.
    """
    if isinstance(frames, Sequence) and not isinstance(frames, str):
        seconds = [float(second) for second in frames]
        if not all(0 <= second < math.inf for second in seconds):
            raise ValueError(
                f"{path}: seconds of frames must not be negative, they are {list(frames)}"
            )
    else:
        length = duration(path)
        try:
            seconds = spread(str(frames), length)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if not 1 <= len(seconds) <= MOST_FRAMES:
        raise ValueError(f"{path}: a video has 1 to {MOST_FRAMES} frames, not {len(seconds)}")
    return tuple(ImageRef(str(path), second) for second in seconds)


def spread(frames: str, length: float) -> list[float]:
    """Seconds of the frames of a video of `length` seconds. Raises ValueError, as `sample`."""
    number, rate = frames.removesuffix("fps"), frames.endswith("fps")
    if not re.fullmatch(r"\d+(\.\d+)?" if rate else r"\d+", number) or not float(number):
        raise ValueError(f"frames={frames}: write a number of frames, as 16, or a rate, as 2fps")
    if rate and (count := max(1, math.ceil(length * float(number)))) <= MOST_FRAMES:
        return [i / float(number) for i in range(count)]
    count = MOST_FRAMES if rate else int(number)
    if count > MOST_FRAMES:
        raise ValueError(f"a video has 1 to {MOST_FRAMES} frames, not {count}")
    return [(i + 0.5) * length / count for i in range(count)]


def duration(path: str) -> float:
    """Length in seconds: of the header, else to the end of the last picture. Raises VideoError."""
    with _opened(path) as (container, stream):
        return _told(container, stream) or _counted(container, stream)


def decode(
    path: str, seconds: Sequence[float], each: Callable[[np.ndarray], Made] = lambda frame: frame
) -> list[Made]:
    """The frames shown at these times, upright uint8 [height, width, 3] each, in the given order;
    past the end, the last.

    Args:
      each: applied to a frame as soon as it is decoded: a thousand large ones would not fit into
        memory.
    Raises:
      VideoError: damaged, or shorter than nine tenths of the length in its header.
    """
    found: dict[float, Made] = {}
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        first = _first(container, stream)
        told = (_told(container, stream) or 0) / stream.time_base
        current = ahead = frames = None
        for second in sorted(set(seconds)):
            due = first + Fraction(round(second * 1e6), 10**6) / stream.time_base  # 1.9 means 19/10
            if current is None or due - current.pts > SEEK / stream.time_base:
                begin, frames = _sought(container, stream, due, first)
                current = begin or current
                if current is None:
                    raise ValueError(f"there is no frame at {second:g} s")
                ahead = next(frames, None)
            while ahead is not None and ahead.pts <= due:
                current, ahead = ahead, next(frames, None)
            shown = current.pts + (current.duration or 0) - first
            if ahead is None and shown < min(due - first, (1 - LOST) * told):
                raise ValueError(
                    f"it ends at {float(shown * stream.time_base):g} s, but tells"
                    f" {float(told * stream.time_base):g} s"
                )
            found[second] = each(
                np.rot90(current.to_ndarray(format="rgb24"), round(current.rotation / 90))
            )
    return [found[second] for second in seconds]


def _first(container, stream) -> int:
    """When the first picture is shown.

    AVI stores no such times: they are made of when pictures are decoded, which is later for all.
    """
    if (
        container.format.name == "avi"
        and (found := next(container.decode(stream), None)) is not None
    ):
        return found.pts or 0
    return stream.start_time or 0


def _sought(
    container, stream, due: Fraction, first: int
) -> tuple[av.VideoFrame | None, Iterator[av.VideoFrame]]:
    """The first frame behind a seek to a time, and those that follow. Where files have no index a
    seek may end behind the time: then from further ahead, at last from in front of the first
    picture."""
    target, back = due, 1 / stream.time_base
    while True:
        try:
            container.seek(int(target), stream=stream, backward=True)
        except OSError:
            if target >= first:
                raise
            container.seek(
                stream.start_time or 0, stream=stream, backward=True
            )  # some cannot go in front of it
        frames = (frame for frame in container.decode(stream) if frame.pts is not None)
        found = next(frames, None)
        if target < first or (found is not None and found.pts <= due):
            return found, frames
        target, back = due - back, 2 * back


def _told(container, stream) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None:
        return None
    return container.duration / av.time_base - float(
        max(stream.start_time or 0, 0) * stream.time_base
    )  # what it tells is when it ends


def _counted(container, stream) -> float:
    """Without decoding. Raises ValueError where there is nothing."""
    ends = [
        packet.pts + (packet.duration or 0)
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    if not ends:
        raise ValueError("there is no frame")
    return float((max(ends) - (stream.start_time or 0)) * stream.time_base)


@contextmanager
def _opened(path: str):
    """(container, video stream)."""
    try:
        with open_ref(str(path)) as file, _container(file) as container:
            if not container.streams.video:
                raise ValueError("there is no video stream")
            yield container, container.streams.video[0]
    except Exception as error:  # damaged files make the decoders raise errors of any kind
        why = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: cannot decode the video: {why}") from error


def _container(file) -> av.container.InputContainer:
    """Raises ValueError for none of CONTAINERS."""
    try:
        return av.open(file, options={"format_whitelist": CONTAINERS}, **LENIENT)
    except av.ArgumentError as error:
        kinds = CONTAINERS.replace(",", ", ")
        raise ValueError(f"in FFmpeg's words it is none of {kinds}") from error
