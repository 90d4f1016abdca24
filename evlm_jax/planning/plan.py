"""`evlm plan`: compiles the real program of a config for a machine that is not there, and says what
it holds, does and takes.

Needed FLOPs are those of flops.py for a batch without padding. Executed ones are read from the
optimised program (compiled.py), and belong to the parts of the model by the jax.named_scope under
which they were traced."""

import re
import resource
import time
from collections import Counter

import jax

from evlm_jax import flops
from evlm_jax.config import EVLMConfig
from evlm_jax.models.moe import block_rows
from evlm_jax.ops.grouped_attention import attention_form
from evlm_jax.parallel.chips import GIB, Chip
from evlm_jax.parallel.compiler import uncached
from evlm_jax.parallel.mesh import Layout, make_layout
from evlm_jax.paths import write
from evlm_jax.planning import chips, compiled, cycles, live, programs, roofline
from evlm_jax.planning.hlo import Module

_SCOPES = re.compile(
    r"\b(patch|vit_\d+|bridge|keys_values|cross|moe|router|experts|ffn|scores|llm|head)\b"
)
_CROSS = {
    "scores": flops.CROSS_SCORES,
    "router": flops.ROUTER,
    "experts": flops.ROUTED,
    "moe": flops.WORLD,
    "ffn": flops.FFN,
}
OTHER = "other"
LARGEST = 10  # buffers that are told


def plan(
    cfg: EVLMConfig,
    topology: str,
    what: str = "train",
    phase: int = 0,
    price: float | None = None,
    consumers: bool = True,
    hlo: str | None = None,
    video: bool = False,
) -> dict:
    """The report on one program, ready for JSON; `show` prints it. Bytes and FLOPs are of one
    device where not said otherwise.

    Args:
      topology: see chips.devices.
      what: one of programs.WHATS.
      phase: number of the phase of training, which decides what is trained.
      price: of a chip-hour.
      consumers: where the program does not fit, compile it for a larger memory to see what fills
        it.
      hlo: file to write the optimised program to.
      video: what a row is, see programs.build.
    Raises:
      ValueError: a mesh, batch or topology that cannot be, before anything is compiled.
    """
    devices, chip = chips.devices(topology, cfg.mesh.slices)
    layout = make_layout(cfg, devices)
    begin = time.monotonic()
    program = programs.build(cfg, layout, what, phase, video)
    report = {"config": cfg.name, "topology": topology, "chip": chip and chip._asdict()}
    report |= {"devices": len(devices), **_asked(cfg, layout), "what": what, "phase": phase}
    report |= _before_compiling(cfg, program)
    report["lower_seconds"] = time.monotonic() - begin
    begin = time.monotonic()
    try:
        with uncached(devices[0]):
            executable, report["fits"] = program.lowered.compile(), True
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        executable, report["fits"], report["says"] = None, False, str(error)
    report["compile_seconds"] = time.monotonic() - begin
    if executable is None:
        report["largest"] = (
            _roomy(cfg, topology, what, phase, len(devices), video) if consumers else None
        )
    else:
        if hlo:
            write(hlo, executable.as_text())
        report |= _read(cfg, layout, chip, program, executable, price)
        if devices[0].platform == "gpu" and report["memory"]["peak"] > chip.hbm:
            report |= _too_large(report, chip)
    report["ram_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return report


def _asked(cfg: EVLMConfig, layout: Layout) -> dict:
    """How the config has the model split, what is kept or computed again, and the form of the
    language model's attention.
    """
    with layout.active():
        form = attention_form(cfg.train.attention, cfg.train.dtype)
    mesh = {"slices": cfg.mesh.slices, "zero": cfg.mesh.zero, "frozen": cfg.mesh.frozen}
    return {
        "mesh": layout.sizes | mesh,
        "policies": {
            "remat": cfg.train.remat,
            "accumulate": cfg.train.accumulate,
            "images": cfg.mesh.images,
            "attention": form,
        },
    }


def _before_compiling(cfg: EVLMConfig, program: programs.Program) -> dict:
    """Facts of the program as it was traced: its arguments, and the FLOPs that it needs."""
    needed = flops.needed(cfg, program.trained, program.work)
    return {
        "rows": cfg.train.batch,
        "options": dict(program.options),
        "arguments": {name: share._asdict() for name, share in program.arguments.items()},
        "needed": {part: cost._asdict() for part, cost in needed.items()},
    }


def _read(
    cfg: EVLMConfig,
    layout: Layout,
    chip: Chip | None,
    program: programs.Program,
    executable,
    price: float | None,
) -> dict:
    """What the compiled program tells."""
    memory, module = executable.memory_analysis(), Module(executable.as_text())
    devices = list(layout.mesh.devices.flat)
    costs = compiled.costs(
        module, len(devices), lambda name, trips: _trips(cfg, layout, program, name, trips)
    )
    kinds = Counter()
    for transfer, count in costs.transfers.items():
        kinds[transfer.kind, len(transfer.group)] += count
    collectives = [
        {
            "kind": kind,
            "group": size,
            "count": count,
            "bytes": sum(
                t.bytes * n
                for t, n in costs.transfers.items()
                if (t.kind, len(t.group)) == (kind, size)
            ),
            "sent": sum(
                roofline.wire(t) * n
                for t, n in costs.transfers.items()
                if (t.kind, len(t.group)) == (kind, size)
            ),
        }
        for (kind, size), count in kinds.items()
    ]
    out = {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        },
        "executed": executed(cfg, program.trained, costs),
        "bytes": costs.bytes,
        "collectives": sorted(collectives, key=lambda c: -c["sent"]),
        "notes": dict(costs.notes),
        "largest": _buffers(module),
        "scores": _scores(cfg, program, costs, len(devices)),
        "padding": _padding(module),
    }
    return out | ({"time": _time(cfg, program, chip, costs, devices, price)} if chip else {})


def executed(
    cfg: EVLMConfig, trained: set[str], costs: compiled.Costs
) -> dict[str, dict[str, float]]:
    """{part: FLOPs of one device, forward, computed again, backward}."""
    lowest, out = flops.lowest_trained_block(cfg, trained), {}
    for name, count in costs.products.items():
        part = out.setdefault(_part(name, lowest), {"forward": 0.0, "again": 0.0, "backward": 0.0})
        part[
            "again" if "rematted" in name else "backward" if "transpose(" in name else "forward"
        ] += count
    return {part: out[part] for part in (*flops.PARTS, OTHER) if part in out}


def _part(op_name: str, lowest: int) -> str:
    scopes = _SCOPES.findall(op_name)
    if vit := [scope for scope in scopes if scope.startswith("vit_") or scope == "patch"]:
        first = 0 if vit[0] == "patch" else int(vit[0].removeprefix("vit_"))
        return flops.TRAINED_VIT if first >= lowest else flops.FROZEN_VIT
    if "bridge" in scopes:
        return flops.BRIDGE
    if "keys_values" in scopes:
        return flops.KEYS
    if "cross" in scopes:
        return next((part for scope, part in _CROSS.items() if scope in scopes), flops.CROSS)
    if "llm" in scopes:
        return flops.LLM_SCORES if "scores" in scopes else flops.LLM
    return flops.HEAD if "head" in scopes else OTHER


def _trips(
    cfg: EVLMConfig, layout: Layout, program: programs.Program, op_name: str, trips: list[float]
) -> list[float] | None:
    """Trip counts of the loops over an expert's blocks: those of a balanced load, in the largest
    strides first. Such a load has no second round of rows that change devices.

    There is a loop for each stride, with one product forward and two backward; where a device has
    one expert, those of several matrices are in one. Of decoding on CPUs some have no products, but
    sums of scaled rows: how often those run is not known.
    """
    if "/overflow/" in op_name:
        return [0.0] * len(trips)
    if "experts" not in _SCOPES.findall(op_name) or not all(trips):
        return None
    mesh, hidden = layout.sizes, cfg.xattn.ffn // cfg.moe.slices
    choices = (
        program.work.tokens
        / cfg.train.accumulate
        / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
        * cfg.moe.top_k
    )
    row = 2 * cfg.llm.hidden * hidden / mesh["tensor"]
    products = max(1, round(min(trips) / (block_rows(int(choices), cfg.moe) * row)))
    rest = products * row * choices * mesh["expert"] / cfg.moe.experts
    counts, strides = {}, sorted(set(trips), reverse=True)
    for trip in strides:
        counts[trip] = rest / trip if trip == strides[-1] else rest // trip
        rest -= counts[trip] * trip
    return [counts[trip] for trip in trips]


def _time(
    cfg: EVLMConfig,
    program: programs.Program,
    chip: Chip,
    costs: compiled.Costs,
    devices: list,
    price: float | None,
) -> dict:
    step, count = roofline.step(chip, costs, devices), len(devices) / chip.cores
    needed = sum(cost.total for cost in flops.needed(cfg, program.trained, program.work).values())
    out = step._asdict() | {"seconds": step.seconds, "binds": step.binds}
    out |= {
        "tokens_per_s": program.work.tokens / step.seconds,
        "images_per_s": program.work.images / step.seconds,
    }
    out["mfu"] = needed / (step.seconds * count * chip.flops)
    lowest = flops.lowest_trained_block(cfg, program.trained)
    if modelled := cycles.step(chip, costs, devices, lambda name: _part(name, lowest)):
        out["cycles"] = modelled._asdict() | {"seconds": modelled.seconds}
        out["cycles"]["mfu"] = needed / (modelled.seconds * count * chip.flops)
    if program.trained:
        out["steps"] = program.steps
        out["days"] = out["steps"] * step.seconds / 86400
        out["chip_days"] = out["days"] * count
        out |= {"price": out["chip_days"] * 24 * price} if price else {}
    return out


def _buffers(module: Module) -> list[dict]:
    """What fills the memory, arguments left out; equal ones together."""
    buffers = Counter(b._replace(op_name=_short(b.op_name)) for b in live.fullest(module)[1])
    largest = sorted(buffers.items(), key=lambda item: -item[0].bytes * item[1])[:LARGEST]
    return [
        {
            "shape": buffer.shape,
            "where": buffer.op_name,
            "count": count,
            "bytes": count * buffer.bytes,
            "logical": count * buffer.logical,
        }
        for buffer, count in largest
    ]


def _padding(module: Module) -> dict[str, dict[str, int]]:
    """Bytes in the chip's layouts, whose tiles pad, and without: of arguments, and of what is held
    beside them at the fullest moment.
    """
    leaves = [leaf for i in module[module.entry].parameters.values() for leaf in i.leaves]
    buffers = live.fullest(module)[1]
    return {
        "arguments": {
            "bytes": sum(leaf.padded for leaf in leaves),
            "logical": sum(leaf.bytes for leaf in leaves),
        },
        "the rest at the fullest moment": {
            "bytes": sum(buffer.bytes for buffer in buffers),
            "logical": sum(buffer.logical for buffer in buffers),
        },
    }


def _scores(
    cfg: EVLMConfig, program: programs.Program, costs: compiled.Costs, devices: int
) -> dict[str, dict[str, float]]:
    """{part: (query, key) pairs of all layers and devices in one pass}: visible ones, and those
    whose scores the forward and the backward pass compute, without what is computed again.
    """
    need = flops.needed(cfg, program.trained, program.work)
    done, out = executed(cfg, program.trained, costs), {}
    for part, visible in flops.visible_scores(cfg, program.work).items():
        if part in need and part in done:
            passes = {"forward": need[part].forward, "backward": need[part].inputs}
            out[part] = {"visible": visible} | {
                name: visible * done[part][name] * devices / count
                for name, count in passes.items()
                if count
            }
    return out


def _short(op_name: str) -> str:
    """The scopes and the operation, with the pass."""
    scopes = [*dict.fromkeys(_SCOPES.findall(op_name)), op_name.rpartition("/")[2]]
    return "/".join(scopes) + (
        " again" if "rematted" in op_name else " backward" if "transpose(" in op_name else ""
    )


def _roomy(
    cfg: EVLMConfig, topology: str, what: str, phase: int, count: int, video: bool
) -> dict | None:
    """What would fill the memory: the same program for as many chips of 95 GiB; None where it does
    not fit them either.
    """
    wide = f"v5p:{cube(count // cfg.mesh.slices)}"
    if topology.startswith("v5p") or count < 4 * cfg.mesh.slices:
        return None
    report = plan(cfg, wide, what, phase, consumers=False, video=video)
    return (
        {"topology": wide, "memory": report["memory"], "buffers": report["largest"]}
        if report["fits"]
        else None
    )


def _too_large(report: dict, chip: Chip) -> dict:
    """What a report says instead where GPUs, whose compiler refuses nothing, lack memory."""
    found = {key: report[key] for key in ("topology", "memory")} | {"buffers": report["largest"]}
    says = f"{report['memory']['peak'] / GIB:,.2f} of {chip.hbm / GIB:,.2f} GiB a device"
    return {"fits": False, "says": says, "largest": found}


def cube(chips: int) -> str:
    """A three-dimensional slice of so many chips, a power of two: "4x4x8"."""
    sides = [1, 1, 1]
    while chips > 1:
        sides[sides.index(min(sides))] *= 2
        chips //= 2
    return "x".join(map(str, sorted(sides) if 1 not in sides else sorted(sides, reverse=True)))
