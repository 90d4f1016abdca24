"""Frames of a video: which ones (as references, cheap), and their pixels (PyAV)."""

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from evlm_jax.data.samples import ImageRef

SEEK = 4.0  # seconds: over larger gaps, jumping to a key frame beats decoding on


def uniform(path: str, frames: int) -> tuple[ImageRef, ...]:
    """The middles of `frames` equal parts of the video."""
    length = duration(path)
    return tuple(ImageRef(str(path), (i + 0.5) * length / frames) for i in range(frames))


def duration(path: str) -> float:
    """Seconds. Raises OSError (av.FFmpegError is one) for what is no video, ValueError for one that does not tell its length."""
    with av.open(str(path)) as container:
        stream = _stream(container, path)
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None:
            return container.duration / av.time_base
    raise ValueError(f"{path}: the video does not tell its duration; give time stamps, or remux it")


def decode(path: str, seconds: Sequence[float]) -> list[np.ndarray]:
    """The frames shown at these times, uint8 [height, width, 3] each, in the order asked for; past the end, the last frame."""
    found: dict[float, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = _stream(container, path)
        stream.thread_type = "AUTO"
        first = stream.start_time or 0
        current = ahead = frames = None
        for second in sorted(set(seconds)):
            due = first + Fraction(second) / stream.time_base
            if current is None or due - current.pts > SEEK / stream.time_base:
                container.seek(int(due), stream=stream, backward=True)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None)
                current = next(frames, current)
                if current is None:
                    raise ValueError(f"{path}: no frame can be decoded at {second:g} s")
                ahead = next(frames, None)
            while ahead is not None and ahead.pts <= due:
                current, ahead = ahead, next(frames, None)
            found[second] = current.to_ndarray(format="rgb24")
    return [found[second] for second in seconds]


def _stream(container, path: str):
    if not container.streams.video:
        raise ValueError(f"{path}: there is no video stream")
    return container.streams.video[0]
