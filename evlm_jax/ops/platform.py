"""What the arrays of a traced program will run on, for kernels that differ by platform."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_platform: ContextVar[str] = ContextVar("platform", default="")


def platform() -> str:
    """Of the devices that will run what is traced: "cpu", "gpu" or "tpu"; without a mesh, JAX's own
    choice.
    """
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def compile_for(name: str) -> Iterator[None]:
    """What is traced within is for devices of this platform, which need not be here."""
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)
