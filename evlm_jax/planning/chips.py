"""Published peaks of accelerators, a chip. Prices are not here: they change, and
`evlm plan --price` takes yours.

Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (system architecture tables),
NVIDIA's data sheets of H100 SXM and H200 SXM (dense, without sparsity). Google's "bidirectional ICI
bandwidth" counts both directions; `ici` here is half of it."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """Rates a second."""

    name: str
    flops: float  # bfloat16
    hbm: float  # bytes
    bandwidth: float  # bytes of HBM, read and written
    # bytes that a chip sends over all its links together, receiving as many at the same time
    ici: float
    axes: int  # of the torus: a collective along one axis uses 1 / axes of the links
    dcn: float | None  # bytes that a chip sends to other slices or hosts; None: not published
    cores: int = 1  # devices of a chip as JAX sees them
    # cycles a second of the TPU compiler's estimates. v5p's is published; of the others such that a
    # bfloat16 product of 4096 x 4096 x 4096 has v5p's share of the peak (tests/planning)
    clock: float | None = None


GIB = 2**30

CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1.2e12, 300e9, 3, None, clock=1.15e9),
    "v5e": Chip(
        "TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 2, 25e9 / 8, clock=1.49e9
    ),  # 6.4 Tbit/s a pod of 256
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, 3, 50e9 / 8, clock=1.75e9),
    "v6e": Chip("TPU v6e (Trillium)", 918e12, 32 * GIB, 1638e9, 400e9, 2, 100e9 / 8, clock=1.94e9),
    "tpu7x": Chip("TPU7x (Ironwood)", 2307e12, 192 * GIB, 7380e9, 600e9, 3, 100e9 / 8, 2, 2.55e9),
    "h100": Chip(
        "H100 SXM", 989e12, 80e9, 3350e9, 450e9, 1, 50e9
    ),  # NVLink within 8; a 400 Gbit/s network card a GPU
    "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9, 1, 50e9),
}


def devices(topology: str, slices: int = 1) -> tuple[list[jax.Device], Chip | None]:
    """Devices to compile for, and what they are; no accelerator is needed.

    Args:
      topology: of a slice, "v5p:4x4x4"; or "v5p:1", one chip; or "cpu:8", whose devices may also
        run; or "h100:8", compiled by XLA:CPU, so that FLOPs and collectives are those of the
        partitioned program, and memory is an approximation.
      slices: how many, joined by the data-centre network.
    Raises:
      ValueError: an unknown kind or shape.
      ImportError: libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    with contextlib.suppress(RuntimeError):  # devices exist already
        jax.config.update(
            "jax_platforms", "cpu"
        )  # nobody looks for a TPU, whose compiler is all that is wanted
    if kind == "cpu" or kind in CHIPS and kind.startswith("h"):
        if not shape.isdecimal() or not int(shape) or slices > 1:
            raise ValueError(
                f"--topology {topology}: give a number of devices, such as {kind}:8, and"
                " mesh.slices = 1"
            )
        return _cpus(int(shape)), CHIPS.get(kind)
    if kind not in CHIPS or not re.fullmatch(r"1|\d+(x\d+)+", shape):
        raise ValueError(
            f"--topology {topology}: unknown; use cpu:8, v5p:4x4x4 and the like, with one of"
            f" {', '.join(CHIPS)}"
        )
    if (axes := shape.count("x") + 1) > CHIPS[kind].axes:
        raise ValueError(
            f"--topology {topology}: {CHIPS[kind].name} is a torus of {CHIPS[kind].axes} axes, not"
            f" of {axes}"
        )
    _libtpu()
    whole = (
        f"{kind}:{'x'.join('221'[: CHIPS[kind].axes])}" if shape == "1" else topology
    )  # libtpu knows nothing smaller than a host
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            whole, "tpu", **options, **({"num_slices": slices} if slices > 1 else {})
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {topology}: {str(error).splitlines()[0]}") from error
    return list(found.devices)[: CHIPS[kind].cores if shape == "1" else None], CHIPS[kind]


@contextlib.contextmanager
def uncached(devices: Sequence[jax.Device]) -> Iterator[None]:
    """What is compiled for TPUs meanwhile does not enter the compilation cache: without a TPU it
    cannot be loaded again.
    """
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    if devices[0].platform == "tpu":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def _cpus(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # devices exist already
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(
            f"{len(found)} CPU devices are in use already: set"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def _libtpu() -> None:
    """Makes the compiler of TPUs load where there is none: it asks nobody for a machine, and other
    processes may load it as well.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('the TPU compiler is missing: pip install "evlm-jax[plan]"')
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    settings["TPU_ACCELERATOR_TYPE"] = (
        "v5p-8"  # any: without one libtpu complains, and then takes the topology as it should
    )
    for name, value in settings.items():
        os.environ.setdefault(name, value)
