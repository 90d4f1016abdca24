"""Reads the text of an optimised HLO module (`Compiled.as_text()`), as XLA:CPU and libtpu print it.

%fusion.2 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[]) fusion(%a, %b), kind=kOutput,
calls=%fused.2, metadata={op_name="..."}
 name        shape, as leaves; S(1): on the chip, not in HBM     opcode   operands    attributes
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
}  # all other types end their name with their bits, or begin with them (f8e4m3fn)
_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_REFERENCE = re.compile(r"%([^\s,(){}]+)")


@dataclass(frozen=True)
class Leaf:
    """An array, alone or in a tuple."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # between the braces, as 1,0:T(8,128)(2,1); "" where there is none

    @property
    def hbm(self) -> bool:
        """Whether it lies in HBM, and not in a memory of the core."""
        return not re.search(r"S\([1-9]", self.layout)

    @property
    def bytes(self) -> int:
        """Size without the padding of layout tiles."""
        return math.prod(self.dims) * self._bits // 8

    @property
    def padded(self) -> int:
        """Bytes that it takes: the dimensions that change fastest in memory are whole tiles.

        Of T(8,128)(2,1) the first pair pads, the second says how a tile lies. Raises ValueError for
        tiles of another form.
        """
        found = re.search(r"T\(([^)]*)\)", self.layout)
        if not found:
            return self.bytes
        if not re.fullmatch(r"\d+(,\d+)*", found[1]):
            raise ValueError(f"HLO: {self} has tiles of an unknown form: {self.layout}")
        tile = [int(size) for size in found[1].split(",")]
        order = [int(d) for d in self.layout.partition(":")[0].split(",") if d]
        sides = [1] * len(tile) + [self.dims[d] for d in reversed(order)]
        whole = [math.ceil(side / size) * size for side, size in zip(sides[-len(tile) :], tile)]
        return math.prod(sides[: -len(tile)]) * math.prod(whole) * self._bits // 8

    @property
    def _bits(self) -> int:
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        if found := re.match(r"[a-z]+(\d+)", self.dtype):
            return int(found[1])
        raise ValueError(f"HLO: unknown element type {self.dtype}")

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    rest: str  # attributes
    root: bool

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Arrays of the result."""
        return tuple(
            Leaf(dtype, tuple(int(d.strip("<=")) for d in dims.split(",") if d), layout)
            for dtype, dims, layout in _LEAF.findall(self.shape)
        )

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Number of leaves of each element of a tuple; (1,) of an array."""
        if not self.shape.startswith("("):
            return (len(self.leaves),)
        return _tuple_parts(re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", self.shape))

    @cached_property
    def op_name(self) -> str:
        """Where it comes from in the traced program, with jax.named_scope; "" if the compiler made
        it.
        """
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, key: str) -> str:
        """The value of an attribute up to the next comma outside of braces;
        "" where there is none.
        """
        found = re.search(rf"(?:^|, ){key}=", self.rest)
        if not found:
            return ""
        depth, at = 0, found.end()
        for end in range(at, len(self.rest)):
            char = self.rest[end]
            if char == "," and depth == 0:
                return self.rest[at:end]
            depth += (char in "{[(") - (char in "}])")
        return self.rest[at:]

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under these attributes."""
        return [name for key in keys for name in _REFERENCE.findall(self.attribute(key))]


class Computation:
    """Instructions in the order of the schedule."""

    def __init__(self, name: str, instructions: list[Instruction]):
        self.name, self.instructions = name, instructions
        self.by_name = {instruction.name: instruction for instruction in instructions}
        self.root = next((i for i in instructions if i.root), instructions[-1])

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """{name: instructions that read it}."""
        out = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                out[operand].append(instruction)
        return out

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """{number: instruction}."""
        return {int(i.inside): i for i in self.instructions if i.opcode == "parameter"}

    def through(self, name: str, *opcodes: str) -> Instruction:
        """The instruction that `name` is, behind single-operand ones of these opcodes."""
        found = self.by_name[name]
        while found.opcode in opcodes:
            found = self.by_name[found.operands[0]]
        return found


class Module:
    """`entry` and the other computations by name."""

    def __init__(self, text: str):
        """Raises ValueError for text that is no HLO module."""
        self.computations, self.entry, name, lines = {}, "", None, []
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name, lines = found[2], []
                self.entry = name if found[1] else self.entry
            elif line.startswith("}") and name:
                self.computations[name] = Computation(
                    name, [i for i in map(_instruction, lines) if i]
                )
                name = None
            elif name:
                lines.append(line)
        if self.entry not in self.computations:
            raise ValueError("not the text of an HLO module: it has no ENTRY computation")

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    text = line[head.end() :]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    stop = _closing(text, len(opcode))
    inside = text[len(opcode) + 1 : stop]
    operands = tuple(_REFERENCE.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(
        head[2], shape, opcode, operands, inside, text[stop + 1 :].removeprefix(", "), bool(head[1])
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"HLO: unbalanced parentheses in {text[:200]}")


def _tuple_parts(shape: str) -> tuple[int, ...]:
    """Leaves of each element of "(f32[2], (s32[], u32[2]))", written without layouts: (1, 2)."""
    parts, depth = [], 0
    for token in re.findall(r"\(|\)|[a-z]\w*\[", shape):
        if token == "(" and depth == 1 or token not in "()" and depth == 1:
            parts.append(0)
        depth += (token == "(") - (token == ")")
        if token not in "()":
            parts[-1] += 1
    return tuple(parts)


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\}.*?)?\}")


def replica_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Device numbers of the first group of a collective.

    Read are {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0))
    {'x','y':(1)2} and, of permutes, the first cycle or chain of source_target_pairs. Raises
    ValueError for other forms."""
    rest, ints = instruction.rest, lambda text: [int(n) for n in (text or "").split(",") if n]
    if instruction.opcode.startswith("collective-permute"):
        after = {
            int(a): int(b)
            for a, b in re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs"))
        }
        starts = [a for a in after if a not in after.values()] or list(after)
        group = dict.fromkeys(starts[:1])
        while (at := after.get(list(group)[-1])) is not None and at not in group:
            group[at] = None
        return tuple(group)
    if found := _MESH.search(rest):
        sizes = [int(size) for size in re.findall(r"=(\d+)", found[1])]
        ids = _iota(ints(found[2]) or sizes, ints(found[3])).reshape(sizes)
        inside = {
            name: (int(before or 1), int(size or 0))
            for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[4])
        }
        at = []
        for name, size in re.findall(r"'(\w+)'=(\d+)", found[1]):
            before, part = inside.get(name, (1, 1))
            stride = int(size) // (before * part) if part else 1
            at.append(np.arange(part or int(size)) * stride)
        return tuple(ids[np.ix_(*at)].ravel().tolist())
    if found := _IOTA.search(rest):
        return tuple(_iota(ints(found[2]), ints(found[3])).reshape(ints(found[1]))[0].tolist())
    if found := _LISTED.search(rest):
        return tuple(ints(found[1])) or tuple(range(devices))
    raise ValueError(f"HLO: {instruction.name} has replica groups of an unknown form: {rest[:200]}")


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    return np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
