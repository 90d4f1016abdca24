"""docs/pods.md: the paper's runs on pods, planned by the compiler. No TPU is needed; libtpu is (pip
install -e ".[plan]").

    python -m benchmarks.pods plan     # compiles for slices of growing size until each run
                                       # fits: hours; goes on where it was
    python -m benchmarks.pods write    # docs/pods.md from docs/pods.json

A slice is tried with the policies that hold least: full rematerialisation, ZeRO-3, frozen towers in
pieces, one row a device and micro-batch; first with all devices along fsdp, then with more and more
of them along tensor. Each plan is a process of its own."""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import parser
from benchmarks import pods_page as page
from evlm_jax.config.load import load_config

FILE, PAGE = Path("docs/pods.json"), Path("docs/pods.md")
FLAT, CUBES = (
    ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    (
        "2x2x1",
        "2x2x2",
        "2x2x4",
        "2x4x4",
        "4x4x4",
        "4x4x8",
        "4x8x8",
    ),
)
SLICES = {"v5p": CUBES, "v6e": FLAT, "v5e": FLAT}
TENSORS = (1, 2, 4, 8)
OWN = {
    "pretrain": (64, 128),
    "continual": (12, 76),
    "sft": (12, 76),
    "moe": (12, 76),
}  # image slots and pairs of a row that shares none
# of realistic size, with the paper's ZeRO-2: run, topology, devices along tensor, rows of a device
# and micro-batch, remat
PODS = (
    ("pretrain, ViT frozen", "v5p:4x4x4", 2, 5, "dots"),
    ("pretrain, ViT frozen", "v6e:16x16", 8, 3, "full"),
)
FULL = (  # of 448 px: a row that shares no image slots
    "--config.data.image_group=1 --config.data.images=12 --config.data.slots=12"
    " --config.data.block_pairs=76"
)
CYCLES = (  # runs whose reports tell cycles: arguments of `evlm plan`, as the page has them
    (
        "sft with experts, 448 px",
        "--config experiments/evlm_14b.py:moe --topology v5p:2x2x4 --mesh fsdp=16 --remat dots"
        f" --config.train.accumulate=1 --config.train.attention=pallas {FULL}",
    ),
    (
        "pretrain, upper ViT trained",
        "--config experiments/evlm_14b.py:pretrain --phase 1 --topology v5p:4x4x4"
        " --mesh fsdp=32,tensor=2 --remat dots --config.train.accumulate=5"
        " --config.train.attention=pallas --config.data.image_group=3 --config.data.slots=126"
        " --config.data.block_pairs=318",
    ),
    (
        "continual, 448 px",
        "--config experiments/evlm_14b.py:continual --topology v5p:4x4x4 --mesh fsdp=32,tensor=2"
        " --remat dots --config.train.accumulate=1 --config.train.attention=pallas",
    ),
    (
        "SigLIP 2 so400m and Qwen3-8B, pretrain, ViT frozen",
        "--config experiments/evlm_8b.py:pretrain --topology v5p:4x4x4 --mesh fsdp=32,tensor=2"
        " --remat dots --config.train.accumulate=3",
    ),
    (
        "Llama 3.2 Vision 11B, cross-attention fine-tuned",
        "--config experiments/mllama.py --topology v5p:4x4x4 --mesh fsdp=64 --remat full",
    ),
)
LIMIT = 3600  # seconds of a plan, on a machine that is shared


def arguments(
    run: str, topology: str, tensor: int, remat: str = "full", zero: int = 3, rows: int = 1
) -> list[str] | None:
    """Of `evlm plan`, with `rows` rows a device and micro-batch, a single one with its own images;
    None where they do not divide.
    """
    stage, phase = page.RUNS[run]
    config = f"experiments/evlm_14b.py:{stage}"
    cfg, count = load_config(config), math.prod(map(int, topology.partition(":")[2].split("x")))
    across = count // tensor
    if count % tensor or cfg.train.batch % (across * rows):
        return None
    expert = math.gcd(across, cfg.moe.experts) if cfg.moe.copies else 1
    mesh = f"fsdp={across // expert},expert={expert},tensor={tensor},zero={zero},frozen=sharded"
    words = [
        "--config",
        config,
        "--phase",
        str(phase),
        "--topology",
        topology,
        "--mesh",
        mesh,
        "--remat",
        remat,
        "--no-mend",
    ]
    words += [f"--config.train.accumulate={cfg.train.batch // (across * rows)}"]
    if rows == 1 or rows % cfg.data.image_group:
        images, pairs = OWN[stage]
        words += [
            f"--config.data.{name}={n}"
            for name, n in (
                ("image_group", 1),
                ("images", images),
                ("slots", images),
                ("block_pairs", pairs),
            )
        ]
    return words


def pod(run: str, topology: str, tensor: int, rows: int, remat: str) -> list[str] | None:
    """`arguments` of an entry of PODS."""
    return arguments(run, topology, tensor, remat, zero=2, rows=rows)


def by_cycles(words: str) -> list[str]:
    """Arguments of `evlm plan` for those of an entry of CYCLES."""
    return [*words.split(), "--no-mend"]


def plan(words: list[str]) -> dict:
    """The report of `evlm plan`, in a process of its own; {"fits": None} and why where there is
    none.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "evlm_jax", "plan", *words, "--json", str(out)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=LIMIT,
                preexec_fn=lambda: os.nice(10),
            )
        except subprocess.TimeoutExpired:
            return {"fits": None, "says": f"no end within {LIMIT} s"}
        if not out.exists():
            return {"fits": None, "says": done.stderr.strip().splitlines()[-1]}
        report = json.loads(out.read_text())
        says = report.get("says", "").splitlines()[
            :1
        ]  # behind the first line the compiler lists buffers
        return report | ({"says": says[0]} if says else {})


def known() -> dict[str, dict]:
    """{arguments: report} of all plans so far."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def planned(words: list[str]) -> dict:
    """The report, from the file where it is there."""
    reports, key = known(), " ".join(words)
    if key not in reports:
        reports[key] = plan(words)
        FILE.write_text(json.dumps(reports, indent=1) + "\n")
        print(
            key,
            {
                name: reports[key].get(name)
                for name in ("fits", "says", "compile_seconds", "ram_gib")
            },
            flush=True,
        )
    return reports[key]


def smallest(run: str, kind: str, ask: Callable[[list[str]], dict | None]) -> dict | None:
    """The report of the smallest slice of a kind of chip that fits;
    None where `ask` knows of none.
    """
    for shape, tensor in itertools.product(SLICES[kind], TENSORS):
        if words := arguments(run, f"{kind}:{shape}", tensor):
            report = ask(words)
            if report is None or report["fits"]:
                return report
    return None


def written() -> str:
    """docs/pods.md."""
    reports = known()

    def ask(words):
        return reports.get(" ".join(words))

    small = [
        (run, smallest(run, kind, ask), kind) for run, kind in itertools.product(page.RUNS, SLICES)
    ]
    large = [
        (run, ask(pod(run, topology, *how)), f"{topology}, remat {how[-1]}")
        for run, topology, *how in PODS
    ]
    told = [
        (run, ask(by_cycles(words)), words.partition("--topology ")[2].split()[0])
        for run, words in CYCLES
    ]
    commands = ["```sh", *(f"evlm plan {words}" for _, words in CYCLES), "```", ""]
    parts = (
        [page.HEAD, *page.table(small)],
        [page.LARGE, *page.table(large)],
        [page.PARTS, *page.ratios(large)],
        [page.BY_CYCLES, *commands, *page.table(told, page.TOLD, page.by_cycles)],
        [page.SECONDS, *page.seconds(told)],
    )
    return "\n".join(line for part in parts for line in [*part, ""])


def main() -> None:
    """Plans what is not planned yet, or writes the page."""
    asked = parser(__doc__)
    asked.add_argument("action", choices=("plan", "write"), nargs="?", default="write")
    asked.add_argument("--kinds", nargs="+", choices=SLICES, default=list(SLICES))
    asked.add_argument(
        "--runs", nargs="+", type=int, default=list(range(len(page.RUNS))), help="numbers of runs"
    )
    args = asked.parse_args()
    if args.smoke:
        print(
            f"{PAGE}:"
            f""" {
                "as it would be written"
                if written() == PAGE.read_text()
                else sys.exit("is out of date")
            }"""
        )
    elif args.action == "plan":
        for run, topology, *how in PODS:
            planned(pod(run, topology, *how))
        for _, words in CYCLES:
            planned(by_cycles(words))
        for kind, number in itertools.product(args.kinds, args.runs):
            smallest(list(page.RUNS)[number], kind, planned)
    else:
        PAGE.write_text(written())


if __name__ == "__main__":
    main()
