"""Published peaks of accelerators, a chip. Prices are not here: they change, and
`evlm plan --price` takes yours.

Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (system architecture tables),
NVIDIA's data sheets of A100 80GB, H100 and H200 SXM (dense, without sparsity). Google's
"bidirectional ICI bandwidth" counts both directions; `ici` here is half of it."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Rates a second."""

    name: str
    kind: str  # jax.Device.device_kind
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
POD = 25e9 / 8  # of v5e: 6.4 Tbit/s a pod of 256

CHIPS = {
    "v4": Chip("TPU v4", "TPU v4", 275e12, 32 * GIB, 1.2e12, 300e9, 3, None, clock=1.15e9),
    "v5e": Chip("TPU v5e", "TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9, 2, POD, clock=1.49e9),
    "v5p": Chip("TPU v5p", "TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, 3, 50e9 / 8, clock=1.75e9),
    "v6e": Chip("TPU v6e", "TPU v6 lite", 918e12, 32 * GIB, 1638e9, 400e9, 2, 100e9 / 8, 1, 1.94e9),
    "tpu7x": Chip("TPU7x", "TPU7x", 2307e12, 192 * GIB, 7380e9, 600e9, 3, 100e9 / 8, 2, 2.55e9),
    # NVLink within 8; a network card a GPU, of 200 Gbit/s beside an A100, else of 400
    "a100": Chip("A100 SXM", "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9, 1, 25e9),
    "h100": Chip("H100 SXM", "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9, 1, 50e9),
    "h200": Chip("H200 SXM", "NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 1, 50e9),
}


def peak_flops(device: jax.Device) -> float:
    """FLOPs a second of a device, in bfloat16; 0 where no peak of its kind is known."""
    found = [chip for chip in CHIPS.values() if chip.kind == device.device_kind]
    return found[0].flops / found[0].cores if found else 0.0
