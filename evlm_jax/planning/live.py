"""Which buffers a compiled program holds at its fullest moment: an estimate from the schedule of
its optimised HLO.

Arguments are left out; what a loop carries counts where it was made. XLA's buffer assignment packs
a little better or worse, and its own figure is the one to report: this tells who the consumers are.
"""

from typing import NamedTuple

from evlm_jax.planning.hlo import Computation, Instruction, Module


class Buffer(NamedTuple):
    """An array that is written once, or again and again in place."""

    bytes: int  # with the padding of its layout
    shape: str
    op_name: str
    logical: int  # bytes without padding


_ALIAS = {
    "bitcast",
    "get-tuple-element",
    "tuple",
    "while",
    "optimization-barrier",
    "opt-barrier",
    "dynamic-update-slice",
}
_NOTHING = (0, ())


def fullest(module: Module) -> tuple[int, list[Buffer]]:
    """(bytes, the buffers, largest first) of the entry computation at its fullest."""
    total, buffers = _Peaks(module).of(module[module.entry])
    return total, sorted(buffers, reverse=True)


class _Peaks:
    def __init__(self, module: Module):
        self.module, self.known = module, {}

    def of(self, computation: Computation) -> tuple[int, tuple[Buffer, ...]]:
        """Peak of a computation, in bytes and buffers; its parameters count nothing."""
        if computation.name not in self.known:
            self.known[computation.name] = self._walk(computation)
        return self.known[computation.name]

    def _walk(self, computation: Computation) -> tuple[int, tuple[Buffer, ...]]:
        made, last = self._buffers(computation)
        dying = {}
        for buffer, at in last.items():
            dying.setdefault(at, []).append(buffer)
        live, size, best = {}, 0, _NOTHING
        for at, instruction in enumerate(computation.instructions):
            for buffer, what in made.get(at, {}).items():
                live[buffer], size = what, size + what.bytes
            inner = max(
                (self.of(self.module[name]) for name in _runs(instruction)),
                default=_NOTHING,
                key=lambda peak: peak[0],
            )
            if size + inner[0] > best[0]:
                best = size + inner[0], (*live.values(), *inner[1])
            for buffer in dying.get(at, ()):
                size -= live.pop(buffer).bytes
        return best

    def _buffers(
        self, computation: Computation
    ) -> tuple[dict[int, dict[int, Buffer]], dict[int, int]]:
        """{position: {number: buffer made there}}, and {number: position of its last use}."""
        held, made, last, count = (
            {},
            {},
            {},
            0,
        )  # held: {name: numbers of the buffers of its leaves; None where it is no buffer of ours}
        for at, instruction in enumerate(computation.instructions):
            numbers = self._aliased(instruction, held, computation)
            if numbers is None:
                numbers, carried = [], self._carried(instruction, held)
                for place, leaf in enumerate(instruction.leaves):
                    if place in carried:
                        numbers.append(carried[place])
                        continue
                    ours = (
                        leaf.hbm
                        and leaf.bytes
                        and instruction.opcode not in ("parameter", "constant")
                    )
                    if ours:
                        made.setdefault(at, {})[count] = Buffer(
                            leaf.padded,
                            str(leaf),
                            instruction.op_name or instruction.name,
                            leaf.bytes,
                        )
                        last[count] = at
                    numbers.append(count if ours else None)
                    count += ours
            held[instruction.name] = numbers
            for name in (instruction.name, *instruction.operands):
                last.update({number: at for number in held[name] if number is not None})
        last.update(
            {
                number: len(computation.instructions) - 1
                for number in held[computation.root.name]
                if number is not None
            }
        )
        return made, last

    def _carried(self, instruction: Instruction, held: dict) -> dict[int, int | None]:
        """{leaf: buffer of an operand that it is}: what a fusion updates in place; the operands of
        an asynchronous start.

        The operand of a copy stands behind its result, those of other starts in front.
        """
        if instruction.opcode == "fusion":
            fused, of = (
                self.module[instruction.called("calls")[0]],
                [held[name] for name in instruction.operands],
            )
            roots = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
            targets = {place: _target(fused, name) for place, name in enumerate(roots)}
            return {place: of[number][0] for place, number in targets.items() if number is not None}
        if not instruction.opcode.endswith("-start"):
            return {}
        source = [number for name in instruction.operands for number in held[name]]
        return dict(enumerate(source, start=int(instruction.opcode == "copy-start")))

    def _aliased(
        self, instruction: Instruction, held: dict, computation: Computation
    ) -> list[int | None] | None:
        """The buffers of a result that is no new one."""
        opcode, of = instruction.opcode, [held[name] for name in instruction.operands]
        if opcode == "tuple":
            return [number for numbers in of for number in numbers]
        if opcode == "get-tuple-element":
            index, parts = (
                int(instruction.attribute("index")),
                computation.by_name[instruction.operands[0]].parts,
            )
            return of[0][sum(parts[:index]) : sum(parts[: index + 1])]
        if opcode in _ALIAS:
            return of[0]
        if opcode.endswith(
            "-done"
        ):  # (results, operands, context) or (operands, results, context) of a start
            start = computation.by_name[instruction.operands[0]]
            wanted = [(leaf.dtype, leaf.dims) for leaf in instruction.leaves]
            leaves = [(leaf.dtype, leaf.dims) for leaf in start.leaves]
            places = (
                range(len(leaves)) if start.opcode == "copy-start" else reversed(range(len(leaves)))
            )
            begin = next((i for i in places if leaves[i : i + len(wanted)] == wanted), None)
            return None if begin is None else of[0][begin : begin + len(wanted)]
        return None


def _target(fused: Computation, name: str) -> int | None:
    """Number of the parameter that a result of a fused computation updates in place."""
    root = fused.through(name, "bitcast")
    if root.opcode != "dynamic-update-slice":
        return None
    target = fused.through(root.operands[0], "bitcast")
    return int(target.inside) if target.opcode == "parameter" else None


def _runs(instruction: Instruction) -> list[str]:
    """Computations whose temporaries live while an instruction runs."""
    return (
        []
        if instruction.opcode == "fusion"
        else instruction.called("body", "to_apply", "calls", "branch_computations")
    )
