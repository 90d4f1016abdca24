"""What the compiler is told when it compiles a training step, by kind of chip.

Options go with the program, not with the process: so `evlm plan`, which has no chip, compiles what
`evlm train` runs, and no kind of chip has to be guessed before JAX has looked for one."""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from evlm_jax.parallel.chips import CHIPS
from evlm_jax.parallel.distributed import log_once

VARIABLES = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # in which a user sets flags
# A layer's matrices are gathered beside the products of those before; its first one is not.
GATHERS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# Sums of gradients over `data` run beside the backward pass.
SUMS = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# Fused products have larger tiles in half of a core's vector memory, here in MiB (D-OPS-26).
TILES = {
    name: {"xla_tpu_scoped_vmem_limit_kib": size * 1024}
    for name, size in {"v5p": 32, "v5e": 64, "v6e": 64}.items()
}
# How a compiler refuses an option: libtpu 0.0.50 takes the first three of GATHERS for v5e alone.
REFUSED = re.compile(r"No such compile option: '(\w+)'|disable it with (\w+)=false")
# by jax.Device.device_kind
OPTIONS = {
    chip.kind: GATHERS | SUMS | TILES.get(name, {})
    for name, chip in CHIPS.items()
    if chip.kind.startswith("TPU")
}


def step_options(devices: Iterable[jax.Device]) -> dict[str, bool | int]:
    """Options for the compilation of a training step on these devices, which are of one kind.

    Left out are those that the user has set in one of VARIABLES, and, with a line that says so,
    those that this version of the compiler does not know, or does not take for this chip.
    """
    own = {
        flag
        for variable in VARIABLES
        for flag in re.findall(r"--(\w+)", os.environ.get(variable, ""))
    }
    # only a device of this process compiles for itself alone
    device = next(d for d in devices if d.process_index == jax.process_index())
    wanted = OPTIONS.get(device.device_kind, {})
    options = {name: value for name, value in wanted.items() if name not in own}
    return dict(_known(device, tuple(options.items())))


@functools.cache
def _known(device: jax.Device, options: tuple) -> Mapping[str, bool | int]:
    """Those of `options` that the device's compiler takes."""
    options = dict(options)
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    lowered = jax.jit(jnp.negative).lower(one)
    while options:
        try:
            with uncached(device):
                lowered.compile(options)
            break
        except jax.errors.JaxRuntimeError as error:
            found = REFUSED.search(str(error))
            names = [name for name in options if found and name.startswith(found[1] or found[2])]
            if not names:
                raise
            for name in names:
                del options[name]
                log_once(f"this compiler does not take {name} for {device.device_kind}")
    return options


def told(options: Mapping[str, bool | int]) -> str:
    """One line about options, in the form that LIBTPU_INIT_ARGS takes."""
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
    return f"compiler options of the step: {flags}"


@contextlib.contextmanager
def uncached(device: jax.Device) -> Iterator[None]:
    """What is compiled meanwhile for TPUs or GPUs does not enter the compilation cache: without one
    it cannot be loaded again.
    """
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    if device.platform != "cpu":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
