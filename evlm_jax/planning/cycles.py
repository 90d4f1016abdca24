"""How long a step takes by the TPU compiler's own account: the cycles that it expects of every
operation, and the transfers that nothing hides.

Nearer to the truth than a roofline, and still no measurement. A collective hides behind operations
only where the program starts it and waits for it later; one that it does not start stands alone.
Where the compiler has no estimate (gathers, sorts, kernels of Pallas) an operation takes what the
roofline says, a kernel's products at half the peak; how many seconds those are is told."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax

from evlm_jax.parallel.chips import Chip
from evlm_jax.planning.compiled import Costs, Operation
from evlm_jax.planning.roofline import link, wire

KERNEL = 2.0  # a kernel's products take so many times what they would at the peak


class CycleSeconds(NamedTuple):
    """Seconds of a step on one device."""

    parts: dict[str, float]  # of operations, by part of the model
    exposed: dict[str, float]  # of transfers that nothing hides, by network: ici, dcn
    hidden: dict[str, float]  # of those that run beside operations
    guessed: float  # of `parts`: where the compiler has no estimate

    @property
    def seconds(self) -> float:
        """Operations and exposed transfers one after the other; hidden ones only where they take
        longer than all operations.
        """
        working = sum(self.parts.values())
        return max(working, *self.hidden.values(), 0.0) + sum(self.exposed.values())


def step(
    chip: Chip, costs: Costs, devices: list[jax.Device], part: Callable[[str], str]
) -> CycleSeconds | None:
    """Of one device of `chip`; None where its compiler gives no cycles.

    Args:
      part: op_name -> part of the model.
    """
    if chip.clock is None or not any(o.cycles for o in costs.operations):
        return None
    parts, guessed = Counter(), 0.0
    for operation, count in costs.operations.items():
        if operation.hidden:
            continue
        seconds = count * _seconds(chip, operation)
        parts[part(operation.op_name)] += seconds
        guessed += seconds if operation.cycles is None else 0.0
    exposed, hidden = Counter(), Counter()
    for transfer, count in costs.transfers.items():
        network, rate = link(chip, devices, transfer.group)
        (hidden if transfer.hidden else exposed)[network] += count * wire(transfer) / rate
    return CycleSeconds(dict(parts), dict(exposed), dict(hidden), guessed)


def _seconds(chip: Chip, operation: Operation) -> float:
    if operation.cycles is not None:
        return operation.cycles / chip.clock
    flops, bandwidth = chip.flops / chip.cores, chip.bandwidth / chip.cores
    return max(KERNEL * operation.flops / flops, operation.bytes / bandwidth)
