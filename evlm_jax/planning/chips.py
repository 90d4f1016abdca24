"""Devices of a machine that is not there, to compile for."""

import contextlib
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from evlm_jax.parallel.chips import CHIPS, Chip
from evlm_jax.planning import cards


def devices(topology: str, slices: int = 1) -> tuple[list[jax.Device], Chip | None]:
    """Devices to compile for, and what they are; no accelerator is needed.

    Args:
      topology: of a slice, "v5p:4x4x4"; or "v5p:1", one chip; or "h100:8", GPUs; or "cpu:8", whose
        devices may also run.
      slices: how many, joined by the data-centre network.
    Raises:
      ValueError: an unknown kind or shape.
      ImportError: the compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    with contextlib.suppress(RuntimeError):  # devices exist already
        jax.config.update(
            "jax_platforms", "cpu"
        )  # nobody looks for a TPU, whose compiler is all that is wanted
    if kind == "cpu" or kind in cards.CARDS:
        if not shape.isdecimal() or not int(shape) or slices > 1:
            raise ValueError(
                f"--topology {topology}: give a number of devices, such as {kind}:8, and"
                " mesh.slices = 1"
            )
        found = _cpus(int(shape)) if kind == "cpu" else cards.devices(kind, int(shape))
        return found, CHIPS.get(kind)
    if kind not in CHIPS or not re.fullmatch(r"1|\d+(x\d+)+", shape):
        raise ValueError(
            f"--topology {topology}: unknown; use cpu:8, h100:8, v5p:4x4x4 and the like, of"
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
