"""What `evlm ablate` does: the missing runs, then table, results.json and page of all that are
there.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from evlm_jax.ablate import collect, job, page, slots
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

    if args.only:
        variant, _, seed = args.only.partition("/")
        job.run(load, variant, int(seed), args.questions, args.test, args.init, args.out, args.keep)
        return 0
    variants = list(dict.fromkeys([job.BASE, *args.variants]))
    for variant in variants:
        job.check(load, variant, args.init)
    names = [f"{variant}/{seed}" for seed in range(args.seeds) for variant in variants]
    todo = [
        slots.Run(name, _command(args, overrides, name), args.out / name / "log.txt")
        for name in names
        if not _done(args.out, name)
    ]
    cores = args.cores or sorted(os.sched_getaffinity(0))
    failed = slots.run_all(
        todo, slots.slots(args.jobs, cores, args.gpus), lambda text: print(text, flush=True)
    )
    found = collect.collect(
        [args.out / name / "result.json" for name in names if _done(args.out, name)]
    )
    file = results.save(args.out / "results.json", found)
    print(f"\n{collect.table(found)}\n\n{file}\n{page.render(found, args.out / 'report.html')}")
    if failed:
        print(
            f"evlm: {len(failed)} of {len(names)} runs failed: {', '.join(failed)}", file=sys.stderr
        )
    return bool(failed)


def _done(out: Path, name: str) -> bool:
    return (out / name / "result.json").exists()


def _command(args: argparse.Namespace, overrides: list[str], name: str) -> list[str]:
    """Command of one run."""
    words = [
        "--config",
        args.config,
        "--variants",
        job.BASE,
        "--questions",
        str(args.questions),
        "--out",
        str(args.out),
        "--run",
        name,
    ]
    words += ["--test", str(args.test)] if args.test is not None else []
    words += ["--init", args.init] if args.init else []
    return [sys.executable, "-m", "evlm_jax", "ablate", *words, *["--keep"] * args.keep, *overrides]
