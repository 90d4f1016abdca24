"""FLOPs of one instruction of an optimised program: dots, convolutions, kernels with a figure."""

import functools
import json
import math
import re

from evlm_jax.planning.hlo import Computation, Instruction


def _dims(computation: Computation, instruction: Instruction, operand: int) -> tuple[int, ...]:
    return computation.by_name[instruction.operands[operand]].leaves[0].dims


def dot(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a dot, batched or not: 2 per multiply-add."""
    contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
    return _contraction(computation, instruction, contracted)


def _contraction(
    computation: Computation, instruction: Instruction, contracted: list[str]
) -> float:
    left = _dims(computation, instruction, 0)
    return 2.0 * math.prod(instruction.leaves[0].dims) * math.prod(left[int(i)] for i in contracted)


def convolution(computation: Computation, instruction: Instruction) -> float:
    """2 per multiply-add that meets no padding and no hole: libtpu writes batched dots as
    convolutions over dilated operands.
    """
    left, kernel, out = re.match(
        r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")
    ).groups()
    sizes = {
        "l": _dims(computation, instruction, 0),
        "k": _dims(computation, instruction, 1),
        "o": instruction.leaves[0].dims,
    }

    def size(which, labels, label):
        return sizes[which][labels.index(label)]

    window = dict(part.split("=") for part in instruction.attribute("window").strip("{}").split())
    reach = 1
    for d in range(len(left) - 2):
        label = str(d)

        def field_of(key, default, d=d):
            return window[key].split("x")[d] if key in window else default

        low = int(field_of("pad", "0_0").split("_")[0])
        stride, base, dilation = (
            int(field_of(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        reach *= meetings(
            size("l", left, label),
            size("k", kernel, label),
            size("o", out, label),
            low,
            stride,
            base,
            dilation,
        )
    groups = int(instruction.attribute("batch_group_count") or 1)
    return (
        2.0 * reach * size("o", out, "f") * size("k", kernel, "i") * size("l", left, "b") / groups
    )


@functools.cache
def meetings(
    inputs: int, kernel: int, outputs: int, low: int, stride: int, base: int, dilation: int
) -> int:
    """Pairs (output, tap of the kernel) of one spatial dimension that meet an element of the input.

    They are those where at = output * stride + tap * dilation - low is a multiple of `base` in
    [0, (inputs - 1) * base]."""
    total, common = 0, math.gcd(stride, base)
    every = base // common  # outputs from one that meets to the next
    for tap in range(kernel):
        shift = low - tap * dilation
        if shift % common == 0:
            first = max(0, -(-shift // stride))
            last = min(outputs - 1, (shift + (inputs - 1) * base) // stride)
            meets = shift // common * pow(stride // common, -1, every) % every
            total += (
                max(0, (last - meets) // every - (first - 1 - meets) // every)
                if last >= first
                else 0
            )
    return total


def reported_flops(computation: Computation, instruction: Instruction) -> float | None:
    """FLOPs that a custom call's kernel declares, or those of cuBLAS's product; None where it
    declares none.
    """
    config = re.search(r"backend_config=(\{.*\})", instruction.rest)
    try:
        said = json.loads(config[1]) if config else {}
    except json.JSONDecodeError:
        return None
    if product := said.get("gemm_backend_config"):
        contracted = product["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        return _contraction(computation, instruction, contracted)
    flops = said.get("custom_call_config", {}).get("cost_estimate", {}).get("flops")
    return None if flops is None else float(flops)
