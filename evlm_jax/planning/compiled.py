"""What one execution of a compiled, partitioned program does on one device: products, bytes of HBM,
collectives, live memory.

Read from the optimised HLO, with the body of a loop counted as often as it runs (XLA's own
cost_analysis counts it once). Bytes are an estimate: what each top-level operation reads and writes
in HBM; a slice of a stack counts by itself, an update in place by what it writes, a copy into the
core's memory once. A conditional counts its dearest branch. Why: docs/decisions.md, D-PLAN-3."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from evlm_jax.planning import kernels, products
from evlm_jax.planning.hlo import Computation, Instruction, Module, replica_group

COLLECTIVES = set(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute"
    " collective-broadcast".split()
)
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_CALLS = {"call": ("to_apply",), "call-start": ("to_apply", "calls"), "async-start": ("calls",)}
_NO_PRODUCTS = set(  # targets of custom calls
    "AllocateBuffer AssumeGatherIndicesInBound AsyncCollectiveDone AsyncCollectiveStart"
    " GatherScatterIndicesBitpacked ConcatBitcast PrepareAsyncCallDone PrepareAsyncCallStart TopK"
    " ZeroCrop".split()
)
_SAME = ("bitcast", "reshape", "get-tuple-element", "copy")  # one array, within a fusion
_SLICES = ("dynamic-slice", "slice", "gather")
_UNKNOWN = 1e15  # cycles from which on an estimate of the TPU compiler is none


class Transfer(NamedTuple):
    """A kind of collective."""

    kind: str
    group: tuple[int, ...]  # devices of the first group
    # a device's share before a gather is not counted: the whole result of a gather, the operands of
    # all others
    bytes: int
    hidden: bool = False  # is started, runs beside products, and is waited for later


class Operation(NamedTuple):
    """Costs of a kind of top-level operation."""

    flops: float
    bytes: float
    hidden: bool  # runs beside others: a copy that was started and is waited for later
    cycles: float | None = None  # that the TPU compiler expects; None where it says nothing
    op_name: str = ""


@dataclass
class Costs:
    """Costs of one execution, and how often each thing happens."""

    products: Counter = field(default_factory=Counter)  # {op_name: FLOPs of dots and convolutions}
    operations: Counter = field(default_factory=Counter)  # {Operation: executions}
    transfers: Counter = field(default_factory=Counter)  # {Transfer: executions}
    notes: Counter = field(
        default_factory=Counter
    )  # {what could not be counted exactly: how often}

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """`other`, `times` times."""
        for name, mine in vars(self).items():
            for key, count in getattr(other, name).items():
                mine[key] += count * times

    def beside(self) -> "Costs":
        """The same, run beside other operations."""
        other = Costs()
        other.add(self)
        for name in ("operations", "transfers"):
            setattr(other, name, Counter())
            for key, count in getattr(self, name).items():
                getattr(other, name)[key._replace(hidden=True)] += count
        return other

    @property
    def flops(self) -> float:
        """FLOPs of all operations."""
        return sum(self.products.values())

    @property
    def bytes(self) -> float:
        """Bytes of all operations."""
        return sum(operation.bytes * count for operation, count in self.operations.items())


Trips = Callable[[str, Sequence[float]], Sequence[float] | None]


def costs(module: Module, devices: int, trips: Trips = lambda op_name, flops: None) -> Costs:
    """Costs of the entry computation.

    Args:
      devices: of the whole program.
      trips: (op_name of loops of one computation whose trip counts depend on data, FLOPs of one
        trip of each) -> how often each runs on average; None where that is unknown: such a loop
        counts once and is named in `notes`.
    """
    return _Counting(module, devices, trips).computation(module[module.entry])


class _Counting:
    def __init__(self, module: Module, devices: int, trips: Trips):
        self.module, self.devices, self.trips, self.known = module, devices, trips, {}

    def computation(self, computation: Computation) -> Costs:
        """Costs of one execution of a computation."""
        if computation.name not in self.known:
            total, open_loops = Costs(), {}
            for instruction in computation.instructions:
                if instruction.opcode != "while":
                    self._instruction(total, computation, instruction)
                elif (count := trip_count(self.module, computation, instruction)) is not None:
                    total.add(self._called(instruction, "body"), count)
                else:
                    open_loops.setdefault(instruction.op_name, []).append(
                        self._called(instruction, "body")
                    )
            for name, bodies in open_loops.items():
                counts = self.trips(name, [body.flops for body in bodies])
                what = (
                    "loop of unknown length, counted"
                    f" {'once' if counts is None else 'by its average'}: {name}"
                )
                total.notes[what] += len(bodies)
                for body, count in zip(bodies, counts or [1] * len(bodies), strict=True):
                    total.add(body, count)
            self.known[computation.name] = total
        return self.known[computation.name]

    def _called(self, instruction: Instruction, *keys: str) -> Costs:
        total = Costs()
        for name in instruction.called(*keys):
            total.add(self.computation(self.module[name]))
        return total

    def _instruction(
        self, total: Costs, computation: Computation, instruction: Instruction
    ) -> None:
        opcode, flops = instruction.opcode, 0.0
        if opcode in _FREE or opcode.endswith("-done") or opcode.endswith("-update"):
            return
        if opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [self.computation(self.module[name]) for name in instruction.called(*keys)]
            return total.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
        if opcode in _CALLS:
            called = self._called(instruction, *_CALLS[opcode])
            return total.add(called.beside() if opcode.endswith("-start") else called)
        if opcode == "fusion":
            inner = self._called(instruction, "calls")
            scattered = instruction.called("calls")[0].startswith("all-reduce-scatter")
            total.transfers.update(
                {
                    t._replace(kind="reduce-scatter") if scattered else t: n
                    for t, n in inner.transfers.items()
                }
            )
            total.products.update(inner.products)
            total.notes.update(inner.notes)
            flops = inner.flops
        elif opcode in ("dot", "convolution"):
            count = products.dot if opcode == "dot" else products.convolution
            flops = count(computation, instruction)
            total.products[instruction.op_name] += flops
        elif charged := kernels.charge(computation, instruction):
            return _kernel(total, instruction, charged)
        elif opcode == "custom-call":
            flops = _custom_call(total, computation, instruction)
        elif opcode == "send" and "is_host_transfer=true" in instruction.rest:
            total.transfers[_between_slices(instruction, self.devices)] += 1
        elif (kind := opcode.removesuffix("-start")) in COLLECTIVES:
            transfer = self._transfer(computation, instruction, kind)
            total.transfers[transfer] += len(transfer.group) > 1 and not _goes_on(
                computation, instruction
            )
        size, beside = self._bytes(computation, instruction), opcode.endswith("-start")
        # a collective takes what its transfer takes
        cycles = 0.0 if opcode.removesuffix("-start") in COLLECTIVES else _cycles(instruction)
        total.operations[Operation(flops, size, beside, cycles, instruction.op_name)] += 1

    def _transfer(self, computation: Computation, instruction: Instruction, kind: str) -> Transfer:
        operands = sum(
            leaf.bytes for name in instruction.operands for leaf in computation.by_name[name].leaves
        )
        result = sum(leaf.bytes for leaf in instruction.leaves)
        group, started = (
            replica_group(instruction, self.devices),
            instruction.opcode.endswith("-start"),
        )
        beside = started and '"is_sync":true' not in instruction.rest
        if kind == "ragged-all-to-all":
            # one side has room for all rows of all devices; what travels is, in the mean, the other
            sent = sum(leaf.bytes for leaf in computation.by_name[instruction.operands[0]].leaves)
            return Transfer(kind, group, min(sent, result), beside)
        result -= operands if started else 0  # a started one carries its operands along
        hidden = beside or _begins(computation)
        return Transfer(kind, group, result if kind == "all-gather" else operands, hidden)

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Read and written in HBM."""
        own = sum(leaf.bytes for leaf in instruction.leaves if leaf.hbm)
        if instruction.opcode.endswith("-start"):
            return own  # operands and results stand in its tuple
        if instruction.opcode == "fusion":
            inner = self.module[instruction.called("calls")[0]]
            if _begins(inner) or _begins(inner, "Done"):
                return 0.0  # only says that a collective begins or ends
            reads = (
                self._read(inner, n) * _in_hbm(computation, name)
                for n, name in enumerate(instruction.operands)
            )
            return sum(reads) + self._written(inner)
        if instruction.opcode in _SLICES:
            return own + own * _in_hbm(computation, instruction.operands[0])
        if instruction.opcode == "dynamic-update-slice":
            return (
                2
                * sum(leaf.bytes for leaf in computation.by_name[instruction.operands[1]].leaves)
                * bool(own)
            )
        return own + sum(
            leaf.bytes
            for name in instruction.operands
            for leaf in computation.by_name[name].leaves
            if leaf.hbm
        )

    def _read(self, fused: Computation, number: int) -> float:
        """How much of parameter `number` a fused computation reads."""
        whole, read, behind = fused.parameters[number], 0.0, [fused.parameters[number]]
        size = sum(leaf.bytes for leaf in whole.leaves)
        while behind:
            source = behind.pop()
            if source.name == fused.root.name:
                return size
            for user in fused.users[source.name]:
                if user.opcode in _SAME or self._copies(user):
                    behind.append(user)
                elif user.opcode in _SLICES and user.operands[0] == source.name:
                    read += sum(leaf.bytes for leaf in user.leaves)
                elif user.opcode == "fusion":
                    inner = self.module[user.called("calls")[0]]
                    read += sum(
                        self._read(inner, n)
                        for n, name in enumerate(user.operands)
                        if name == source.name
                    )
                elif not (
                    user.opcode == "dynamic-update-slice" and user.operands[0] == source.name
                ):
                    return size
        return min(read, size)

    def _copies(self, fusion: Instruction) -> bool:
        """Whether it only lays its operand out anew, which within a fusion writes nothing."""
        if fusion.opcode != "fusion":
            return False
        inner = self.module[fusion.called("calls")[0]].instructions
        return all(i.opcode in (*_SAME, "parameter") for i in inner)

    def _written(self, fused: Computation) -> float:
        """What a fused computation writes to HBM; an update in place only its slice."""
        roots = (
            [fused.by_name[name] for name in fused.root.operands]
            if fused.root.opcode == "tuple"
            else [fused.root]
        )
        total = 0.0
        for root in roots:
            source = fused.through(root.name, "bitcast", "reshape", "copy")
            if source.opcode == "dynamic-update-slice":
                source = fused.by_name[source.operands[1]]
                total += sum(leaf.bytes for leaf in source.leaves) * any(
                    leaf.hbm for leaf in root.leaves
                )
            elif source.opcode == "fusion":
                total += self._written(self.module[source.called("calls")[0]])
            else:
                total += sum(leaf.bytes for leaf in root.leaves if leaf.hbm)
        return total


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of a while loop: XLA's own, or from `i < limit` with a constant start, limit and
    step; None where it depends on data.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(found[1])
    condition, body = (module[loop.called(key)[0]] for key in ("condition", "body"))
    compare = condition.root
    if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "LE"):
        return None
    counter, limit = (condition.through(name, "copy", "bitcast") for name in compare.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index = int(counter.attribute("index"))
    start = computation.through(
        computation.through(loop.operands[0], "copy").operands[index],
        "copy",
        "copy-done",
        "copy-start",
    )
    following = body.through(body.root.operands[index], "copy", "copy-done", "copy-start")
    step = [body.by_name[name] for name in following.operands] if following.opcode == "add" else []
    step = [int(i.inside) for i in step if i.opcode == "constant"]
    if start.opcode != "constant" or len(step) != 1 or step[0] < 1:
        return None
    distance = int(limit.inside) - int(start.inside) + (compare.attribute("direction") == "LE")
    return max(0, math.ceil(distance / step[0]))


def _between_slices(instruction: Instruction, devices: int) -> Transfer:
    """libtpu leaves what goes over the data-centre network to the host, as a send.

    Its group here: a device of the first and last slice.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    name = (kind[1].lower().replace("_", "-") if kind else "send") + " between slices"
    return Transfer(name, (0, devices - 1), instruction.leaves[0].bytes)


def _goes_on(computation: Computation, instruction: Instruction) -> bool:
    """libtpu writes a collective that runs beside products into each of their fusions; it begins in
    one of them alone.
    """
    return "chain_id=" in instruction.rest and not _begins(computation)


def _begins(computation: Computation, what: str = "Start") -> bool:
    """Whether a collective that runs beside products begins in this fusion, or is "Done"."""
    return any(
        f'"AsyncCollective{what}"' in other.rest
        for other in computation.instructions
        if other.opcode == "custom-call"
    )


def _cycles(instruction: Instruction) -> float | None:
    """What the TPU compiler expects an operation to take; None where it has no estimate."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return float(found[1]) if found and float(found[1]) < _UNKNOWN else None


def _in_hbm(computation: Computation, name: str) -> bool:
    return any(leaf.hbm for leaf in computation.by_name[name].leaves)


def _kernel(total: Costs, instruction: Instruction, charged: kernels.Charge) -> None:
    """A kernel of ops/: as one operation without an estimate of the compiler."""
    name = instruction.op_name
    total.products[name] += charged.flops
    total.operations[Operation(charged.padded, charged.bytes, False, None, name)] += 1
    total.notes[charged.note] += 1


def _custom_call(total: Costs, computation: Computation, instruction: Instruction) -> float:
    """FLOPs that its kernel reports; targets that report none are noted."""
    if (flops := products.reported_flops(computation, instruction)) is not None:
        total.products[instruction.op_name] += flops
        return flops
    target = instruction.attribute("custom_call_target").strip('"')
    if target not in _NO_PRODUCTS:
        total.notes[f"custom call, counted without FLOPs: {target}"] += 1
    return 0.0
