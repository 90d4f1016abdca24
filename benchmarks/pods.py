"""docs/pods.md: the paper's runs on pods, planned by the compiler. No TPU is needed; libtpu is (pip install -e ".[plan]").

    python -m benchmarks.pods plan     # compiles for slices of growing size until each run fits: hours; goes on where it was
    python -m benchmarks.pods write    # docs/pods.md from docs/pods.json

A slice is tried with the policies that hold least: full rematerialisation, ZeRO-3, frozen towers in pieces, one row a device and
micro-batch; first with all devices along fsdp, then with more and more of them along tensor. Each plan is a process of its own.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from evlm_jax.cli import load_config

FILE, PAGE = Path("docs/pods.json"), Path("docs/pods.md")
RUNS = {  # name: (stage, phase)
    "pretrain, ViT frozen": ("pretrain", 0),
    "pretrain, upper ViT trained": ("pretrain", 1),
    "continual, 448 px": ("continual", 0),
    "sft, 448 px": ("sft", 0),
    "sft with experts, 448 px": ("moe", 0),
}
FLAT, CUBES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SLICES = {"v5p": CUBES, "v6e": FLAT, "v5e": FLAT}
TENSORS = (1, 2, 4, 8)
LIMIT = 900  # seconds of a plan


def arguments(run: str, topology: str, tensor: int, remat: str = "full", zero: int = 3, rows: int = 1) -> list[str] | None:
    """Of `evlm plan`, with `rows` rows a device and micro-batch; None where the batch cannot be split so."""
    stage, phase = RUNS[run]
    config = f"experiments/evlm_14b.py:{stage}"
    cfg, count = load_config(config), math.prod(map(int, topology.partition(":")[2].split("x")))
    across = count // tensor
    if count % tensor or cfg.train.batch % (across * rows):
        return None
    expert = math.gcd(across, cfg.moe.experts) if cfg.moe.copies else 1
    mesh = f"fsdp={across // expert},expert={expert},tensor={tensor},zero={zero},frozen=sharded"
    micro = f"--config.train.accumulate={cfg.train.batch // (across * rows)}"
    return ["--config", config, "--phase", str(phase), "--topology", topology, "--mesh", mesh, "--remat", remat, "--no-mend", micro]


def plan(words: list[str]) -> dict:
    """The report of `evlm plan`, in a process of its own; {"fits": None} and why where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "evlm_jax.cli", "plan", *words, "--json", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, preexec_fn=lambda: os.nice(10))
        except subprocess.TimeoutExpired:
            return {"fits": None, "says": f"no end within {LIMIT} s"}
        return json.loads(out.read_text()) if out.exists() else {"fits": None, "says": done.stderr.strip().splitlines()[-1]}


def known() -> dict[str, dict]:
    """{arguments: report} of all plans so far."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def planned(words: list[str]) -> dict:
    """The report, from the file where it is there."""
    reports, key = known(), " ".join(words)
    if key not in reports:
        reports[key] = plan(words)
        FILE.write_text(json.dumps(reports, indent=1) + "\n")
        print(key, {name: reports[key].get(name) for name in ("fits", "says", "compile_seconds", "ram_gib")}, flush=True)
    return reports[key]


def smallest(run: str, kind: str) -> dict | None:
    """The report of the smallest slice of a kind of chip that fits, of those in the file or planned now."""
    for shape, tensor in itertools.product(SLICES[kind], TENSORS):
        words = arguments(run, f"{kind}:{shape}", tensor)
        if words and (report := planned(words))["fits"]:
            return report
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("plan", "write"))
    parser.add_argument("--kinds", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument("--runs", nargs="+", type=int, default=list(range(len(RUNS))), help="numbers of runs")
    args = parser.parse_args()
    if args.action == "plan":
        for kind, number in itertools.product(args.kinds, args.runs):
            smallest(list(RUNS)[number], kind)


if __name__ == "__main__":
    main()
