"""Reads that fail by accident are tried again: a full network, a busy store, a disk that does not
answer.
"""

import errno
import functools
import random
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

WAITS = (0.1, 0.4, 1.6, 6.4)  # seconds, about; then the error stands
ACCIDENTS = {
    "EIO",
    "ESTALE",
    "EAGAIN",
    "EINTR",
    "EBUSY",
    "ETIMEDOUT",
    "ENETDOWN",
    "ENETUNREACH",
    "ENETRESET",
    "EHOSTUNREACH",
    "EREMOTEIO",
}
NUMBERS = {getattr(errno, name) for name in ACCIDENTS if hasattr(errno, name)}
BUSY = {408, 429, 500, 502, 503, 504}  # of HTTP
LOST = {"ClientConnectionError", "ClientPayloadError"}  # aiohttp's, for fsspec's stores

P, R = ParamSpec("P"), TypeVar("R")


def accident(error: BaseException | None) -> bool:
    """Whether the same read may succeed a moment later; also where such an error is the cause of
    this one.
    """
    while error is not None:
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(error, (ConnectionError, TimeoutError)) or (
            isinstance(error, OSError) and error.errno in NUMBERS
        ):
            return True
        if (isinstance(status, int | str) and str(status) in map(str, BUSY)) or LOST & {
            kind.__name__ for kind in type(error).__mro__
        }:
            return True
        error = error.__cause__
    return False


def retried(read: Callable[P, R]) -> Callable[P, R]:
    """`read`, tried again behind each of WAITS while it fails by accident."""

    @functools.wraps(read)
    def call(*args: P.args, **named: P.kwargs) -> R:
        for wait in WAITS:
            try:
                return read(*args, **named)
            except Exception as error:
                if not accident(error):
                    raise
            time.sleep(wait * random.uniform(0.5, 1.5))  # many hosts do not come back at once
        return read(*args, **named)

    return call
