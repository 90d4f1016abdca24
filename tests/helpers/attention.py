"""Values and gradients of a form of attention, for comparison with another."""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from evlm_jax.ops.platform import compile_for
from evlm_jax.parallel.compiler import uncached
from evlm_jax.planning import chips

needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason='pip install -e ".[plan]"'
)


def values_and_gradients(
    attend: Callable, arrays: list[np.ndarray], precision: str = "highest"
) -> list[np.ndarray]:
    """Outputs, and the gradients of q, k and v under random weights."""
    weight = np.random.default_rng(9).standard_normal(arrays[0].shape).astype(np.float32)

    def weighed(*arrays):
        out = attend(*arrays)
        return (out * weight).sum(), out

    step = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))
    with jax.default_matmul_precision(precision):
        (_, out), gradients = step(*arrays)
    return [np.asarray(x) for x in (out, *gradients)]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """To 1e-5 of the largest magnitude of each array."""
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, 0, 1e-5 * np.abs(theirs).max() + 1e-30, name)


def compiled_text(topology: str, attend: Callable, *shapes: tuple, rest: tuple = ()) -> str:
    """The program of values and gradients for one chip of a topology: q, k and v in bfloat16, the
    rest int32.
    """
    device = chips.devices(topology)[0][0]

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def step(q, k, v, *rest):
        def total(*arrays):
            return attend(*arrays, *rest).astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    arrays = [spec(shape, "bfloat16") for shape in shapes], [spec(shape, "int32") for shape in rest]
    with compile_for(device.platform), uncached(device):
        return jax.jit(step).lower(*arrays[0], *arrays[1]).compile().as_text()
