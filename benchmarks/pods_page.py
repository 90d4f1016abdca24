"""The text and the tables of docs/pods.md, which benchmarks/pods.py writes."""

from collections.abc import Callable

from evlm_jax import flops
from evlm_jax.config.load import load_config
from evlm_jax.parallel.chips import GIB
from evlm_jax.planning.programs import phase_steps

Plans = list[tuple[str, dict | None, str]]  # name of a run, its report, what is planned there
RUNS = {  # name: (stage, phase)
    "pretrain, ViT frozen": ("pretrain", 0),
    "pretrain, upper ViT trained": ("pretrain", 1),
    "continual, 448 px": ("continual", 0),
    "sft, 448 px": ("sft", 0),
    "sft with experts, 448 px": ("moe", 0),
}
HEAD = """# The paper's runs on TPU pods

Written by `python -m benchmarks.pods write` from [pods.json](pods.json), which `python -m \
benchmarks.pods plan` makes by `evlm plan`: the
real train step of [evlm_14b.py](../experiments/evlm_14b.py) with the paper's batches (480, 160, \
16), compiled by the TPU compiler for
slices that are not there. Nothing here was measured on a TPU. The last two tables are of today's \
programs. The first three are older: without
kernels, without the flags that `evlm train` and `evlm plan` now give the compiler \
([tpu.md](tpu.md#flags)), and with experts exchanged with room
for the rows of all devices, a multiple of what they take now ([moe.md](moe.md#on-several-devices)).

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
otherwise slots are as above.
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
BY_CYCLES = """## By the compiler's own cycles

Seconds are the cycles that the TPU compiler expects of every operation, and the transfers that \
nothing hides, one after the other; kernels and
what else it has no estimate for are charged by the roofline ("guessed", part of the operations; \
D-PLAN-7, D-PLAN-8 in
[decisions.md](decisions.md)). No measurement either. These programs have the flags; those with \
`train.attention=pallas` the kernels. Batches
are full as above; where `data.image_group=3`, three rows share 126 image slots. Without \
`--no-mend` such a command also says what would
make fit what does not. Rows with * are of older programs, whose fused products had smaller tiles, \
whose sums over `tensor` were of float32 and
whose GELU was by erfc (D-OPS-25 to D-OPS-27); they were not planned again.
"""
SECONDS = """Their operations' seconds, part by part. In "other" are copies, slices of stacks and \
turns by positions.
"""
COLUMNS = (
    "run slice mesh HBM_a_chip,_GiB step,_s binds MFU days chip-days remat executed_/_needed"
    " compiled_in".split()
)
TOLD = (
    "run slice mesh remat_(micro-batches) HBM_a_chip,_GiB operations,_s guessed,_s"
    " transfers_alone,_s step,_s MFU days by_the_roofline,_s compiled_in".split()
)


def table(
    plans: Plans,
    columns: list[str] = COLUMNS,
    row: Callable[[str, dict], tuple[str, ...]] | None = None,
) -> list[str]:
    """A row a plan, by the roofline unless `row` is another; below what is not planned yet."""

    def cells(row):
        return "| " + " | ".join([*row, *[""] * (len(columns) - len(row))]) + " |"

    rows = [(row or _row)(run, report) for run, report, _ in plans if report]
    table = [
        cells([column.replace("_", " ") for column in columns]),
        "|" + " --- |" * len(columns),
        *map(cells, rows),
    ]
    missing = [f"{run} ({where})" for run, report, where in plans if not report]
    return table + (["", f"Not planned yet: {'; '.join(missing)}."] if missing else [])


def _row(run: str, report: dict) -> tuple[str, ...]:
    if not report["fits"]:
        return run, f"{report['topology']}: does not fit"
    time, chip = report["time"], report["chip"]
    stage, phase = RUNS[run]
    # the run's own share: these reports count all
    steps = phase_steps(load_config(f"experiments/evlm_14b.py:{stage}"), phase)
    days = steps * time["seconds"] / 86400
    return (
        run,
        report["topology"],
        _mesh(report),
        _memory(report),
        f"{time['seconds']:.2f}",
        time["binds"],
        f"{time['mfu']:.0%}",
        f"{days:,.1f}",
        f"{days * report['devices'] / chip['cores']:,.0f}",
        report["policies"]["remat"],
        f"{_sum(report['executed']) * report['devices'] / _sum(report['needed']):.2f}",
        f"{report['compile_seconds']:.0f} s, {report['ram_gib']:.1f} GiB",
    )


def by_cycles(run: str, report: dict) -> tuple[str, ...]:
    """A row of TOLD."""
    if not report["fits"]:
        return run, f"{report['topology']}: does not fit"
    time, policies = report["time"], report["policies"]
    cycles, older = time["cycles"], "xla_tpu_scoped_vmem_limit_kib" not in report["options"]
    return (
        f"{run} *" if older else run,
        report["topology"],
        _mesh(report),
        f"{policies['remat']} ({policies['accumulate']})",
        _memory(report),
        f"{sum(cycles['parts'].values()):.2f}",
        f"{cycles['guessed']:.2f}",
        f"{sum(cycles['exposed'].values()):.2f}",
        f"{cycles['seconds']:.2f}",
        f"{cycles['mfu']:.0%}",
        f"{time['steps'] * cycles['seconds'] / 86400:,.1f}",
        f"{time['seconds']:.2f}",
        f"{report['compile_seconds']:.0f} s, {report['ram_gib']:.1f} GiB",
    )


def _mesh(report: dict) -> str:
    mesh = report["mesh"]
    return " ".join(
        f"{axis} {mesh[axis]}" for axis in ("fsdp", "expert", "tensor") if mesh[axis] > 1
    )


def _memory(report: dict) -> str:
    memory = report["memory"]
    allocated = sum(size for name, size in memory.items() if name != "peak")
    return (
        f"{memory['peak'] / GIB:.1f} ({allocated / GIB:.1f}) of {report['chip']['hbm'] / GIB:.0f}"
    )


def seconds(plans: Plans) -> list[str]:
    """Seconds by cycles, part by part."""
    plans = [(run, report) for run, report, _ in plans if report and report["fits"]]
    cycles = [report["time"]["cycles"] for _, report in plans]
    lines = [
        "| part | " + " | ".join(f"{run}, {report['topology']}" for run, report in plans) + " |",
        "|" + " --- |" * (len(plans) + 1),
    ]
    for part in [*flops.PARTS, "other"]:
        if any(part in of["parts"] for of in cycles):
            took = [of["parts"].get(part) for of in cycles]
            cells = ["" if time is None else f"{time:.2f}" for time in took]
            lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return lines


def ratios(plans: Plans) -> list[str]:
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
