"""GPUs to compile for where there is none: what XLA's compiler has to know of a card.

Sources: NVIDIA's table of technical specifications by compute capability, and what XLA itself reads
from these cards (openxla/xla, backends/gpu/target_config/specs)."""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from evlm_jax.parallel.chips import CHIPS

HOST = 8  # GPUs that NVLink joins
COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class Card(NamedTuple):
    """Of one kind; sizes in bytes."""

    capability: str
    cores: int
    units: int  # of float32, a core
    shared: int  # memory of a core
    cache: int
    clock: float  # GHz


_HOPPER = Card("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 233472, 50 << 20, 1.98)
CARDS = {
    "a100": Card("major: 8", 108, 64, 167936, 40 << 20, 1.41),
    "h100": _HOPPER,
    "h200": _HOPPER,
}
_TARGET = """
gpu_device_info {{
  name: "{chip.kind}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  cuda_compute_capability {{ {card.capability} }}
  core_count: {card.cores} fpus_per_core: {card.units} clock_rate_ghz: {card.clock}
  device_memory_size: {chip.hbm:.0f} memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {card.cache}
  shared_memory_per_core: {card.shared} shared_memory_per_block_optin: {block}
  shared_memory_per_block: 49152
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{chip.kind}"
"""


def has_compiler() -> bool:
    """Whether XLA's compiler for GPUs is installed."""
    return bool(
        importlib.util.find_spec("jax_plugins")
        and any(importlib.util.find_spec(name) for name in COMPILERS)
    )


def devices(kind: str, count: int) -> list[jax.Device]:
    """`count` GPUs of a kind of CARDS, in hosts of HOST.

    Raises:
      ValueError: hosts would not be full; the compiler does not go with this version of JAX.
      ImportError: it is not installed.
    """
    if count > HOST and count % HOST:
        raise ValueError(f"--topology {kind}:{count}: hosts have {HOST} GPUs: give a multiple")
    if not has_compiler():
        raise ImportError('the compiler for GPUs is missing: pip install "evlm-jax[plan-gpu]"')
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # what JAX sets: nobody asked to hear of
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # memory, which the plan tells of itself
    chip, card = CHIPS[kind], CARDS[kind]
    target = _TARGET.format(chip=chip, card=card, block=card.shared - 1024)
    shape = f"1x{-(-count // HOST)}x{min(count, HOST)}"  # one network of hosts of cards
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f'--topology {kind}:{count}: {said} (pip install "evlm-jax[plan-gpu]" brings the'
            f" compiler that goes with JAX {jax.__version__})"
        ) from error
    return list(found.devices)
