"""What the kernels of ops/ and cuDNN's do, by the shapes of their arrays: in a compiled program a
kernel is a call that shows nothing of its inside, and what it says of itself is not asked."""

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
CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
SUBLANES, LANES = 32, 128  # of a tile: bytes down, numbers across


class Charge(NamedTuple):
    """One execution of a kernel."""

    flops: float  # of all scores of its blocks, heads filled up to whole lanes
    padded: float  # the same, and tiles of scores counted whole
    bytes: float  # of the blocks that it reads and writes
    note: str


def charge(computation: Computation, instruction: Instruction) -> Charge | None:
    """Costs of a custom call, all pairs that there is room for counted as visited; None where it is
    no kernel of ops/ nor of cuDNN.
    """
    if instruction.opcode != "custom-call":
        return None
    if found := CUDNN.search(instruction.rest):
        return _cudnn(computation, instruction, 5 if found[1] else 2)
    name = NAME.search(instruction.op_name)
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


def _cudnn(computation: Computation, instruction: Instruction, products: int) -> Charge:
    """`products` of queries [B, T, N, H] by keys [B, S, K, H], all of them; arrays once."""
    operands = [computation.by_name[operand].leaves[0] for operand in instruction.operands]
    (rows, asking, heads, width), keys = operands[0].dims, operands[1].dims[1]
    flops = 2.0 * products * rows * heads * asking * keys * width
    moved = sum(leaf.bytes for leaf in (*operands, *instruction.leaves))
    note = f"cuDNN's attention, charged {products} products of {asking:,} x {keys:,} scores a head"
    return Charge(flops, flops, moved, note)


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile
