"""What the arrays of a traced program will run on, for kernels that differ by platform."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

LANES = 128  # numbers of a row of a TPU's vector register

_platform: ContextVar[str] = ContextVar("platform", default="")


def platform() -> str:
    """Platform of the devices that will run what is traced: "cpu", "gpu" or "tpu"; without a mesh,
    JAX's default.
    """
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def compile_for(name: str) -> Iterator[None]:
    """Context in which programs are traced for devices of this platform, whether or not they are
    attached.
    """
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)
