"""Around `plan`: the command, what would make a program fit,
and a sweep over meshes and policies.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator

from evlm_jax.config import EVLMConfig
from evlm_jax.parallel.chips import GIB
from evlm_jax.parallel.mesh import ROWS, make_layout, mesh_sizes
from evlm_jax.paths import write
from evlm_jax.planning import chips
from evlm_jax.planning.plan import plan
from evlm_jax.planning.text import show

REMATS = ("none", "dots", "full")


def planned(args: argparse.Namespace, overrides: list[str], load_config: Callable) -> EVLMConfig:
    """The config that `evlm plan` reports on."""
    given = [field.strip() for field in args.mesh.split(",") if field]
    if wrong := [field for field in given if "=" not in field]:
        raise ValueError(f"--mesh {wrong[0]}: fields are set as fsdp=32,tensor=2")
    fields = [f"--config.mesh.{field}" for field in given]
    fields += [
        f"--config.train.{name}={value}"
        for name, value in (("batch", args.global_batch), ("remat", args.remat))
        if value
    ]
    return load_config(args.config, [*fields, *overrides])


def main(args: argparse.Namespace, overrides: list[str], load_config: Callable) -> int:
    """`evlm plan`; exit status 1 where the program does not fit."""
    cfg = planned(args, overrides, load_config)
    program = args.topology, args.what, args.phase
    if args.sweep:
        report = sweep(cfg, *program, args.video)
    else:
        report = plan(cfg, *program, args.price, not args.no_mend, args.hlo, args.video)
        if not report["fits"] and not args.no_mend:
            report["tried"] = mend(cfg, *program, args.video)
        print(show(report))
    if args.json:
        write(args.json, json.dumps(report, indent=1) + "\n")
    return 0 if args.sweep or report["fits"] else 1


def mend(cfg: EVLMConfig, topology: str, what: str, phase: int, video: bool = False) -> list[dict]:
    """Changes in the order of their cost, each alone and then one upon another, until one fits.

    Returns:
      of each what it was, whether it fits (None: it cannot be), and of the one that does its memory
      and largest buffers.
    """
    changes = list(_changes(cfg, len(chips.devices(topology, cfg.mesh.slices)[0])))
    candidates, together = [(name, change(cfg)) for name, change in changes], cfg
    for number, (_, change) in enumerate(changes):
        together = change(together)
        candidates += (
            [(" and ".join(name for name, _ in changes[: number + 1]), together)] if number else []
        )
    tried = []
    for name, candidate in candidates:
        try:
            report = plan(candidate, topology, what, phase, consumers=False, video=video)
        except ValueError:
            report = {"fits": None}
        tried.append({"change": name, "fits": report["fits"]})
        if report["fits"]:
            tried[-1] |= {key: report[key] for key in ("memory", "largest")}
            break
    return tried


def _changes(
    cfg: EVLMConfig, devices: int
) -> Iterator[tuple[str, Callable[[EVLMConfig], EVLMConfig]]]:
    """What `cfg` can give up for memory, the cheapest first."""
    train, mesh, sizes = cfg.train, cfg.mesh, mesh_sizes(cfg.mesh, devices)

    def set_train(**fields):
        return lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, **fields))

    def set_mesh(**fields):
        return lambda c: dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, **fields))

    for remat in REMATS[REMATS.index(train.remat) + 1 :]:
        yield f"train.remat={remat}", set_train(remat=remat)
    rows = math.prod(sizes[axis] for axis in ROWS)
    for count in range(train.accumulate + 1, cfg.image_groups // rows + 1):
        if cfg.image_groups % (rows * count) == 0 and count >= 2 * train.accumulate:
            yield f"train.accumulate={count}", set_train(accumulate=count)
            break
    if mesh.frozen == "replicated":
        yield "mesh.frozen=sharded", set_mesh(frozen="sharded")
    if mesh.zero == 2:
        yield "mesh.zero=3", set_mesh(zero=3)
    if sizes["data"] > mesh.slices:
        fewer = mesh.slices
        yield (
            f"mesh.data={fewer} mesh.fsdp={sizes['fsdp'] * sizes['data'] // fewer}",
            set_mesh(data=fewer, fsdp=-1),
        )
    if sizes["fsdp"] % 2 == 0:
        tensor, fsdp = 2 * sizes["tensor"], sizes["fsdp"] // 2
        yield f"mesh.tensor={tensor} mesh.fsdp={fsdp}", set_mesh(tensor=tensor, fsdp=fsdp)


def sweep(cfg: EVLMConfig, topology: str, what: str, phase: int, video: bool = False) -> list[dict]:
    """Reports of all meshes and remat policies that are possible, those that fit first, the fastest
    first: by the compiler's own cycles where it gives them, else by the roofline.
    """
    reports = []
    for candidate in meshes(cfg, topology):
        for remat in REMATS if what == "train" else REMATS[:1]:
            tried = dataclasses.replace(
                candidate, train=dataclasses.replace(candidate.train, remat=remat)
            )
            report = plan(tried, topology, what, phase, consumers=False, video=video)
            reports.append(report)
            print(_line(report), flush=True)
    reports.sort(key=lambda report: (not report["fits"], _seconds(report)))
    print("\nranked:", *map(_line, reports), sep="\n")
    return reports


def meshes(cfg: EVLMConfig, topology: str) -> Iterator[EVLMConfig]:
    """`cfg` on every mesh of powers of two that its sizes allow, one copy of everything a slice, or
    also one a host of GPUs.
    """
    devices, _ = chips.devices(topology, cfg.mesh.slices)
    copies = {cfg.mesh.slices}
    if devices[0].platform == "gpu":
        copies.add(len({device.process_index for device in devices}))

    def powers(most):
        return [2**i for i in range(most.bit_length()) if 2**i <= most]

    for data, tensor in itertools.product(sorted(copies), powers(len(devices))):
        for expert in powers(cfg.moe.experts or 1):
            mesh = dataclasses.replace(cfg.mesh, data=data, fsdp=-1, expert=expert, tensor=tensor)
            candidate = dataclasses.replace(cfg, mesh=mesh)
            try:
                make_layout(candidate, devices)
            except ValueError:
                continue
            yield candidate


def _seconds(report: dict) -> float:
    """Of a step; 0 where nothing is known of the chip."""
    time = report.get("time") or {"seconds": 0.0}
    return time.get("cycles", time)["seconds"]


def _line(report: dict) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    head = f"{mesh} remat={report['policies']['remat']}"
    if not report["fits"]:
        return f"{head}: does not fit"
    told = f"{head}: {report['memory']['peak'] / GIB:.1f} GiB"
    if time := report.get("time"):
        how = "by cycles" if "cycles" in time else f"by the roofline, {time['binds']} binds"
        told += f", {_seconds(report):.3f} s {how}"
    return told
