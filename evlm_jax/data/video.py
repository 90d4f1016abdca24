"""Frames of a video: which ones (as references, cheap), and their pixels (PyAV)."""

from collections.abc import Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np

from evlm_jax.data.containers.rows import open_ref
from evlm_jax.data.samples import ImageRef

SEEK = 4.0  # seconds: over larger gaps, jumping to a key frame beats decoding on


class VideoError(ValueError):
    """A video cannot be read. The message names the file."""


def uniform(path: str, frames: int) -> tuple[ImageRef, ...]:
    """The middles of `frames` equal parts of the video."""
    length = duration(path)
    return tuple(ImageRef(str(path), (i + 0.5) * length / frames) for i in range(frames))


def duration(path: str) -> float:
    """Seconds. Raises VideoError."""
    with _opened(path) as (container, stream):
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None:
            return container.duration / av.time_base
        raise ValueError("it does not tell its duration; remux it")


def decode(path: str, seconds: Sequence[float]) -> list[np.ndarray]:
    """The frames shown at these times, uint8 [height, width, 3] each, in the order asked for; past the end, the last. Raises VideoError."""
    found: dict[float, np.ndarray] = {}
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        first = stream.start_time or 0
        current = ahead = frames = None
        for second in sorted(set(seconds)):
            due = first + Fraction(round(second * 1e6), 10**6) / stream.time_base  # 1.9 means 19/10
            if current is None or due - current.pts > SEEK / stream.time_base:
                container.seek(int(due), stream=stream, backward=True)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None)
                current = next(frames, current)
                if current is None:
                    raise ValueError(f"there is no frame at {second:g} s")
                ahead = next(frames, None)
            while ahead is not None and ahead.pts <= due:
                current, ahead = ahead, next(frames, None)
            found[second] = current.to_ndarray(format="rgb24")
    return [found[second] for second in seconds]


@contextmanager
def _opened(path: str):
    """(container, video stream)."""
    try:
        with open_ref(str(path)) as file, av.open(file, metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError("there is no video stream")
            yield container, container.streams.video[0]
    except Exception as error:  # damaged files make the decoders raise errors of any kind
        raise VideoError(f"{path}: cannot decode the video: {error}") from error
