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
from evlm_jax import flops
from evlm_jax.config.load import load_config
from evlm_jax.parallel.chips import GIB
from evlm_jax.planning.programs import phase_steps

FILE, PAGE = Path("docs/pods.json"), Path("docs/pods.md")
RUNS = {  # name: (stage, phase)
    "pretrain, ViT frozen": ("pretrain", 0),
    "pretrain, upper ViT trained": ("pretrain", 1),
    "continual, 448 px": ("continual", 0),
    "sft, 448 px": ("sft", 0),
    "sft with experts, 448 px": ("moe", 0),
}
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
    ("sft with experts, 448 px", "v5p:2x2x4", 1, 1, "full"),
)
OTHERS = {  # runs with other towers: arguments of `evlm plan`, as the page has them
    "SigLIP 2 so400m and Qwen3-8B, pretrain, ViT frozen": (
        "--config experiments/evlm_8b.py:pretrain --topology v5p:4x4x4 --mesh fsdp=32,tensor=2"
        " --remat dots --config.train.accumulate=3"
    ),
    "Llama 3.2 Vision 11B, cross-attention fine-tuned": (
        "--config experiments/mllama.py --topology v5p:4x4x4 --mesh fsdp=64 --remat full"
    ),
}
HEAD = """# The paper's runs on TPU pods

Written by `python -m benchmarks.pods write` from [pods.json](pods.json), which `python -m \
benchmarks.pods plan` makes by `evlm plan`: the
real train step of [evlm_14b.py](../experiments/evlm_14b.py) with the paper's batches (480, 160, \
16), compiled by the TPU compiler for
slices that are not there. Nothing here was measured on a TPU. The figures are of programs without \
the flags that
`evlm train` and `evlm plan` now give the compiler ([tpu.md](tpu.md#flags)).

A step's seconds are those of a roofline, operation by operation: products at the published peak, \
HBM at its bandwidth, collectives hidden
behind them. They are a lower bound for this program; well-tuned runs of others reach 40 to 65% of \
the peak. Days are those of the run's
own share of the steps (pre-training trains cross-attention alone for its first 31,250 steps, the \
upper ViT as well for 93,750). A batch
is full: no position is padding, every image is seen. HBM is XLA's own account of the fullest \
moment, and in brackets all that it
allocates; the compiler accepts the program or not. Executed FLOPs are read from the compiled \
program, needed ones are defined in
[flops.py](../evlm_jax/flops.py). Compile times are of a machine of two cores that was shared.

## The smallest slice that fits

Full rematerialisation, ZeRO-3, frozen towers in pieces, one row a device and micro-batch. So rows \
share no image slots: each has 64 at
224 px, 12 at 448 px.
"""
LARGE = """## Pods of realistic size

ZeRO-2, as the paper has it. Five rows a device share 208 image slots (`data.image_group=5`); \
otherwise slots are as above. Experts were
exchanged here with room for the rows of all devices; as they are now, or \
over `fsdp`, their part of a step is a tenth ([moe.md](moe.md#on-several-devices)).
"""
PARTS = """## Executed by needed FLOPs, part by part

Full rematerialisation makes a trained part 4/3, a frozen one with a gradient through it 3/2; \
where the outputs of linear layers are kept
(`dots`) both are 1. Scores of the language model are computed for all pairs and masked: twice \
what causal attention needs. Scores of the
cross-attention are computed for all (query block, image) pairs that a batch has room for, filled \
or not. Keys and values have a product more for
the gradient of the norm in front of them.
"""
TOWERS = """## Other towers

As above, but for the flags, which these programs have. Without `--no-mend` such a command also \
says what would make fit what does not.
"""
LIMIT = 3600  # seconds of a plan, on a machine that is shared


def arguments(
    run: str, topology: str, tensor: int, remat: str = "full", zero: int = 3, rows: int = 1
) -> list[str] | None:
    """Of `evlm plan`, with `rows` rows a device and micro-batch, a single one with its own images;
    None where they do not divide.
    """
    stage, phase = RUNS[run]
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


def other(run: str) -> list[str]:
    """Arguments of `evlm plan` for an entry of OTHERS."""
    return [*OTHERS[run].split(), "--no-mend"]


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


def page() -> str:
    """docs/pods.md."""
    reports = known()

    def ask(words):
        return reports.get(" ".join(words))

    small = [(run, smallest(run, kind, ask), kind) for run, kind in itertools.product(RUNS, SLICES)]
    large = [
        (run, ask(pod(run, topology, *how)), f"{topology}, remat {how[-1]}")
        for run, topology, *how in PODS
    ]
    towers = [(run, ask(other(run)), OTHERS[run].split()[3]) for run in OTHERS]
    commands = ["```sh", *(f"evlm plan {words}" for words in OTHERS.values()), "```", ""]
    return "\n".join(
        [HEAD, *_table(small), "", LARGE, *_table(large), "", PARTS, *_ratios(large), ""]
        + [TOWERS, *commands, *_table(towers), ""]
    )


COLUMNS = (
    "run slice mesh HBM_a_chip,_GiB step,_s binds MFU days chip-days remat executed_/_needed"
    " compiled_in".split()
)


def _table(plans: list[tuple[str, dict | None, str]]) -> list[str]:
    """A row a plan, and below what is not planned yet."""

    def cells(row):
        return "| " + " | ".join([*row, *[""] * (len(COLUMNS) - len(row))]) + " |"

    rows = [_row(run, report) for run, report, _ in plans if report]
    table = [
        cells([column.replace("_", " ") for column in COLUMNS]),
        "|" + " --- |" * len(COLUMNS),
        *map(cells, rows),
    ]
    missing = [f"{run} ({where})" for run, report, where in plans if not report]
    return table + (["", f"Not planned yet: {'; '.join(missing)}."] if missing else [])


def _row(run: str, report: dict) -> tuple[str, ...]:
    if not report["fits"]:
        return run, f"{report['topology']}: does not fit"
    time, mesh, chip, memory = report["time"], report["mesh"], report["chip"], report["memory"]
    allocated = sum(size for name, size in memory.items() if name != "peak")
    days = _steps(run, report) * time["seconds"] / 86400
    return (
        run,
        report["topology"],
        " ".join(f"{axis} {mesh[axis]}" for axis in ("fsdp", "expert", "tensor") if mesh[axis] > 1),
        (f"{memory['peak'] / GIB:.1f} ({allocated / GIB:.1f}) of {chip['hbm'] / GIB:.0f}"),
        f"{time['seconds']:.2f}",
        time["binds"],
        f"{time['mfu']:.0%}",
        f"{days:,.1f}",
        f"{days * report['devices'] / chip['cores']:,.0f}",
        report["policies"]["remat"],
        f"{_sum(report['executed']) * report['devices'] / _sum(report['needed']):.2f}",
        f"{report['compile_seconds']:.0f} s, {report['ram_gib']:.1f} GiB",
    )


def _steps(run: str, report: dict) -> int:
    """Of the run's own share; of the paper's runs reports count all."""
    if run in OTHERS:
        return report["time"]["steps"]
    stage, phase = RUNS[run]
    return phase_steps(load_config(f"experiments/evlm_14b.py:{stage}"), phase)


def _ratios(plans: list[tuple[str, dict | None, str]]) -> list[str]:
    """Executed by needed FLOPs, part by part."""
    plans = [(run, report) for run, report, _ in plans if report and report["fits"]]

    def ratio(report, part):
        return (
            sum(report["executed"].get(part, {}).values())
            * report["devices"]
            / sum(report["needed"][part].values())
        )

    lines = [
        "| part | " + " | ".join(f"{run}, {report['topology']}" for run, report in plans) + " |",
        "|" + " --- |" * (len(plans) + 1),
    ]
    for part in flops.PARTS:
        if any(part in report["needed"] for _, report in plans):
            cells = [
                f"{ratio(report, part):.2f}" if part in report["needed"] else ""
                for _, report in plans
            ]
            lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return lines


def _sum(parts: dict[str, dict[str, float]]) -> float:
    return sum(sum(part.values()) for part in parts.values())


def main() -> None:
    """Plans what is not planned yet, or writes the page."""
    asked = parser(__doc__)
    asked.add_argument("action", choices=("plan", "write"), nargs="?", default="write")
    asked.add_argument("--kinds", nargs="+", choices=SLICES, default=list(SLICES))
    asked.add_argument(
        "--runs", nargs="+", type=int, default=list(range(len(RUNS))), help="numbers of runs"
    )
    args = asked.parse_args()
    if args.smoke:
        print(
            f"{PAGE}:"
            f""" {
                "as it would be written"
                if page() == PAGE.read_text()
                else sys.exit("is out of date")
            }"""
        )
    elif args.action == "plan":
        for run, topology, *how in PODS:
            planned(pod(run, topology, *how))
        for run in OTHERS:
            planned(other(run))
        for kind, number in itertools.product(args.kinds, args.runs):
            smallest(list(RUNS)[number], kind, planned)
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
