"""How long a step takes at least, from the costs of the compiled program and the published rates of
a chip.

A model, not a measurement: every product at the peak rate, every byte once, transfers behind
computation. Real runs of others reach 40 to 65% of the peak.
"""

from collections import Counter
from typing import NamedTuple

import jax

from evlm_jax.parallel.chips import Chip
from evlm_jax.planning.cards import HOST
from evlm_jax.planning.compiled import Costs, Transfer


class StepSeconds(NamedTuple):
    """Seconds of a step, and of what it is made of."""

    products: float  # of operations that the matrix units hold up
    hbm: float  # of operations that HBM holds up
    ici: float
    dcn: float
    bound: float  # if all overlapped with all: no arrangement of this program can be faster

    @property
    def seconds(self) -> float:
        """Seconds of the step: its operations one after the other, with transfers hidden behind
        them, or the other way round.
        """
        return max(self.products + self.hbm, self.ici, self.dcn, self.bound)

    @property
    def binds(self) -> str:
        """The resource that bounds the step."""
        parts = {"products": self.products, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}
        return max(parts, key=parts.get)


def step(chip: Chip, costs: Costs, devices: list[jax.Device]) -> StepSeconds:
    """Seconds of one device of `chip` for a program of these costs."""
    flops, bandwidth = chip.flops / chip.cores, chip.bandwidth / chip.cores
    seconds = Counter()
    for operation, count in costs.operations.items():
        compute, memory = operation.flops / flops, operation.bytes / bandwidth
        if not operation.hidden:
            seconds["products" if compute >= memory else "hbm"] += count * max(compute, memory)
    for transfer, count in costs.transfers.items():
        network, rate = link(chip, devices, transfer.group)
        seconds[network] += count * wire(transfer) / rate
    bound = max(costs.flops / flops, costs.bytes / bandwidth, seconds["ici"], seconds["dcn"])
    return StepSeconds(seconds["products"], seconds["hbm"], seconds["ici"], seconds["dcn"], bound)


def wire(transfer: Transfer) -> float:
    """Bytes that a device sends, by ring algorithms; between slices those that its host sends."""
    n = len(transfer.group)
    if transfer.kind == "collective-permute" or "between slices" in transfer.kind:
        return transfer.bytes
    return transfer.bytes * (n - 1) / n * (2 if transfer.kind == "all-reduce" else 1)


def link(chip: Chip, devices: list[jax.Device], group: tuple[int, ...]) -> tuple[str, float]:
    """("ici" | "dcn", bytes a second of a device): of the torus, the links along the axes in which
    the group's devices differ.

    Raises ValueError where a group leaves its slice and the chip's rate there is not published.
    """
    members = [devices[i] for i in group]

    def apart(key):
        return len({key(device) for device in members}) > 1

    if devices[0].platform != "tpu":
        leaves, axes = apart(lambda device: device.id // HOST), 1
    else:
        leaves = apart(lambda device: getattr(device, "slice_index", 0))
        axes = sum(
            apart(lambda device, axis=axis: device.coords[axis])
            for axis in range(len(members[0].coords))
        )
    if not leaves:
        return "ici", chip.ici * min(max(axes, 1), chip.axes) / chip.axes / chip.cores
    if chip.dcn is None:
        raise ValueError(
            f"{chip.name}: no rate of its data-centre network is published, so several slices"
            " cannot be planned"
        )
    return "dcn", chip.dcn / chip.cores
