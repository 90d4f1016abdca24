"""What the kernels of ops/ do, by the shapes of their arrays: in a compiled program a kernel is a
call that shows nothing of its inside, and what it says of itself is not asked."""

import math
import re
from typing import NamedTuple

from evlm_jax.planning.hlo import Computation, Instruction

# {kernel of ops/attention_kernels.py: products of a pair of blocks, arrays read and written}, which
# have blocks of queries "q" or of keys "k"
KERNELS = {
    "forward": (2, "qkk", "qq"),
    "queries": (3, "qkkqqq", "qq"),
    "keys": (4, "qkkqqq", "kk"),
}
NAME = re.compile(r"\b\w+_attention_(forward|queries|keys)\b")
SUBLANES, LANES = 32, 128  # of a tile: bytes down, numbers across


class Charge(NamedTuple):
    """One execution of a kernel."""

    flops: float  # of all scores of its blocks, heads filled up to whole lanes
    padded: float  # the same, and tiles of scores counted whole
    bytes: float  # of the blocks that it reads and writes
    note: str


def charge(computation: Computation, instruction: Instruction) -> Charge | None:
    """Costs of a custom call, all pairs that there is room for counted as visited; None where it is
    no kernel of ops/.
    """
    name = NAME.search(instruction.op_name) if instruction.opcode == "custom-call" else None
    if name is None:
        return None
    products, reads, writes = KERNELS[name[1]]
    operands = [computation.by_name[operand].leaves[0] for operand in instruction.operands]
    pairs = max(leaf.dims[0] for leaf in operands if len(leaf.dims) == 1)
    arrays = [leaf for leaf in operands if len(leaf.dims) > 2 and leaf.dtype != "s32"]
    (_, rows, width), (blocks, columns, _) = (leaf.dims for leaf in arrays[:2])
    pairs -= blocks if name[1] == "keys" else 0  # it has room for a step of zeros for each
    size = arrays[0].bytes // math.prod(arrays[0].dims)
    flops = 2.0 * products * pairs * rows * columns * width
    tiles = _whole(rows, SUBLANES // size) * _whole(columns, LANES) / (rows * columns)
    # an owner's blocks stay while its pairs come one after the other
    moved = sum(
        leaf.bytes if kind == writes[0] else pairs * leaf.bytes / leaf.dims[0]
        for kind, leaf in zip(reads + writes, (*arrays, *instruction.leaves), strict=True)
    )
    note = (
        f"{name[0]}, charged by its {pairs:,} blocks of {rows} x {columns} scores: {tiles:.2f} of"
        " their products, as tiles pad them, at half the peak, or its bytes"
    )
    return Charge(flops, flops * tiles, moved, note)


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile
