"""What `evlm ablate` does: the missing runs, then table, results.json and page of all that are
there.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evlm_jax.ablate import claims, collect, finished, job, page, slots
from evlm_jax.ablate.study import BASE, load_study
from evlm_jax.checkpoint import store
from evlm_jax.config import EVLMConfig
from evlm_jax.evals import results
from evlm_jax.paths import local


def main(
    args: argparse.Namespace,
    overrides: list[str],
    load_config: Callable[[str, list[str]], EVLMConfig],
) -> int:
    """Returns the exit status: 1 where a run failed. Raises ValueError for an unknown variant,
    before anything begins.
    """
    args.out = local(args.out, "--out of an ablation")

    def load(variant):
        return load_config(f"{args.config}:{variant}", overrides)

    order = job.Order(
        load,
        load_study(args.config),
        args.out,
        args.questions,
        args.test,
        args.init,
        args.branch_from,
        args.keep,
    )
    if args.only:
        variant, _, seed = args.only.rpartition("/")
        job.run(order, variant, int(seed))
        return 0
    variants, names, failed = list(dict.fromkeys([BASE, *args.variants])), [], []
    for number, seeds in enumerate(_rounds(args, order)):
        if number:
            needed = claims.wanted(_found(args.out, names))
            variants = [variant for variant in variants if variant in needed]
        _check(order, variants, seeds)
        new = [f"{variant}/{seed}" for seed in range(seeds) for variant in variants]
        names += [name for name in new if name not in names]
        todo = [name for name in names if not _done(args.out, name)]
        if todo:
            _check_settings(order, [name for name in names if name not in todo])
        if todo and args.listed:
            break
        failed = _run(args, overrides, todo)
        if failed:
            break
    if args.listed:
        print(*todo, sep="\n", end="\n" * bool(todo))
        return 0
    found = _found(args.out, names)
    file = results.save(args.out / "results.json", found)
    print(f"\n{collect.table(found)}\n\n{file}\n{page.render(found, args.out / 'report.html')}")
    if failed:
        print(
            f"evlm: {len(failed)} of {len(names)} runs failed: {', '.join(failed)}", file=sys.stderr
        )
    return bool(failed)


def _rounds(args: argparse.Namespace, order: job.Order) -> Sequence[int]:
    """Numbers of seeds, one look after the other."""
    if not args.sequential:
        return (args.seeds,)
    if not order.study.looks:
        raise ValueError(
            f"--sequential: {args.config} declares no looks: give its get_study looks and margin"
            " (docs/ablations.md)"
        )
    return order.study.looks


def _check(order: job.Order, variants: Sequence[str], seeds: int) -> None:
    """Raises ValueError where a variant or a run to start from is not there, or they do not fit."""
    if order.init:
        store.check_step(order.init, None)
    if order.branch:
        for seed in range(seeds):
            if not store.steps(order.begin(seed)):
                raise ValueError(
                    f"--branch-from: {order.begin(seed)} has no checkpoint: make it with `evlm"
                    " ablate --keep`"
                )
    for variant in variants:
        job.check(order, variant, order.begin(0))


def _check_settings(order: job.Order, done: Sequence[str]) -> None:
    """Raises ValueError naming one of these runs whose settings are not those of further ones:
    before hours of training, not when all are collected.
    """
    for file in (order.out / name / "result.json" for name in done):
        theirs = finished.load(file)["settings"]
        begun = theirs.get("init", "elsewhere") if order.init else None
        collect.check(file, theirs, json.loads(json.dumps(job.settings(order, begun))))


def _run(args: argparse.Namespace, overrides: list[str], names: Sequence[str]) -> list[str]:
    """Makes these runs; returns the names of those that failed."""
    todo = [
        slots.Run(name, _command(args, overrides, name), args.out / name / "log.txt")
        for name in names
    ]
    cores = args.cores or sorted(os.sched_getaffinity(0))
    return slots.run_all(
        todo, slots.slots(args.jobs, cores, args.gpus), lambda text: print(text, flush=True)
    )


def _found(out: Path, names: Sequence[str]) -> dict:
    """What the finished ones of these runs found."""
    return collect.collect([out / name / "result.json" for name in names if _done(out, name)])


def _done(out: Path, name: str) -> bool:
    return (out / name / "result.json").exists()


def _command(args: argparse.Namespace, overrides: list[str], name: str) -> list[str]:
    """Command of one run."""
    words = [
        "--config",
        args.config,
        "--variants",
        BASE,
        "--questions",
        str(args.questions),
        "--out",
        str(args.out),
        "--run",
        name,
    ]
    words += ["--test", str(args.test)] if args.test is not None else []
    words += ["--init", args.init] if args.init else []
    words += ["--branch-from", args.branch_from] if args.branch_from else []
    return [sys.executable, "-m", "evlm_jax", "ablate", *words, *["--keep"] * args.keep, *overrides]
