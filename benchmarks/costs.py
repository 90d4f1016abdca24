"""docs/costs.md: what EVLM costs beside LLaVA's and Flamingo's way of showing images to the same
towers.

python -m benchmarks.costs count      # compiles every program for docs/costs.json; goes on where it
                                      # was; no accelerator is needed
python -m benchmarks.costs measure    # seconds of the demo's towers on this machine, into the same
                                      # file; on quiet cores only
python -m benchmarks.costs write      # the page and its plots from the file
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import parser
from evlm_jax.config.load import load_config
from evlm_jax.costs.command import published
from evlm_jax.costs.counted import programs
from evlm_jax.costs.crossover import FRAMES
from evlm_jax.costs.measure import measure
from evlm_jax.costs.study import study
from evlm_jax.costs.summary import summary
from evlm_jax.costs.tables import KINDS, Table, executed, tables, vision
from evlm_jax.evals.results import save
from evlm_jax.parallel.chips import GIB
from evlm_jax.report.figures import STYLE

FILE, PAGE = Path("docs/costs.json"), Path("docs/costs.md")
TEXT, CHIP = 64, "v5p"  # the paper's s_t
# title: (experiment, tokens that its language model is made for, as its own config.json says)
CONFIGS = {
    "The paper's model: EVA02-CLIP-E+ and Qwen-14B-Chat 1.0, every query head with its own keys": (
        "experiments/evlm_14b.py",
        2048,
    ),
    "CLIP ViT-L/14 and Qwen2.5-7B-Instruct, whose query heads share keys": (
        "experiments/evlm_7b.py",
        32768,
    ),
    "The demo: DINOv2 ViT-S/14 and SmolLM2-135M, whose query heads share keys": (
        "experiments/demo.py",
        8192,
    ),
}
ORDER = (
    ("encode", "FLOPs"),
    ("decode", "FLOPs"),
    ("prefill", "FLOPs"),
    ("decode", "bytes"),
    ("train", "FLOPs"),
    ("", "bytes"),
)
MEASURED, UP_TO = "experiments/demo.py", 64  # frames
HEAD = f"""# What EVLM costs, beside LLaVA's and Flamingo's way

Written by `python -m benchmarks.costs write` from [costs.json](costs.json), which `python -m \
benchmarks.costs count` and `measure` make;
the same tables for any config: `evlm flops --config FILE`. No number here is typed by hand.

Three models share their towers and differ by at most three fields \
([bridge.py](../evlm_jax/models/bridge.py)): `evlm`; `llava`, whose
patches stand in the language model's text; `flamingo`, whose cross-attention looks at a few \
latents a frame, with one media token. A case
is one row: F frames, each an image of its own for the ViT, then {TEXT} text tokens that see all \
of them. Were the frames separate images,
text would see the last one alone, and EVLM would keep that one's keys only.

*Needed* is what mathematics asks for ([flops.py](../evlm_jax/flops.py), \
[cases.py](../evlm_jax/costs/cases.py)). *Compiled* is read from
the optimised program, loops counted as often as they run \
([counted.py](../evlm_jax/costs/counted.py)): FLOPs from XLA:CPU's program of two
rows, halved, because that takes any size; bytes from the TPU compiler's program of one row on one \
{CHIP} chip. Nothing was run for those;
what was run stands under *Measured*.
"""
PLOTS = {  # file: (what, value of (study, kind, frames), the same for all kinds or None)
    "costs-cache.png": (
        "KV cache, GiB",
        lambda s, kind, n: sum(s["needs"][kind][n]["cache"].values()) / GIB,
        None,
    ),
    "costs-prefill.png": (
        "prefill, compiled, TFLOP",
        lambda s, kind, n: executed(s, kind, "prefill", n) / 1e12,
        lambda s, n: vision(s, n) / 1e12,
    ),
    "costs-decode.png": (
        "a token of an answer reads, GiB",
        lambda s, kind, n: s["needs"][kind][n]["decode bytes"] / GIB,
        None,
    ),
}


def known() -> dict:
    """What the file holds: {"programs": {experiment: {name: ...}}, "measured": {...}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"programs": {}}


def count_all() -> None:
    """Fills the file, program by program; TPU programs of prefill and training, which take minutes
    each, come last.
    """

    def rank(name):
        return next(
            i for i, (what, kind) in enumerate(ORDER) if what in name and name.endswith(kind)
        )

    def frames(name):
        return int(name.split(", ")[-2].split()[0])

    wanted = []
    for number, (experiment, _) in enumerate(CONFIGS.values()):
        for name, f in programs(load_config(experiment), list(FRAMES), TEXT, CHIP):
            wanted.append(((rank(name), number, frames(name)), experiment, name, f))
    for _, experiment, name, f in tqdm(sorted(wanted, key=lambda one: one[0]), unit="program"):
        if name not in known()["programs"].get(experiment, {}):
            counted, file = f(), known()  # read again: `measure` may have written in the meantime
            file["programs"].setdefault(experiment, {})[name] = counted
            save(FILE, file)


def studies() -> dict[str, dict]:
    """{title: study} of what is counted."""
    file, found = known(), {}
    for title, (experiment, context) in CONFIGS.items():
        if experiment in file["programs"]:
            found[title] = study(
                load_config(experiment),
                list(FRAMES),
                TEXT,
                CHIP,
                file["programs"][experiment],
                context,
            )
            if experiment == MEASURED and "measured" in file:
                found[title]["measured"] = file["measured"]
    return found


def page(found: dict[str, dict]) -> str:
    """docs/costs.md."""
    lines = [HEAD, *_markdown(published())]
    lines += [f"![{what}]({name})\n" for name, (what, _, _) in PLOTS.items()]
    for title, one in found.items():
        about = "; ".join(f"{name} {size:,}" for name, size in one["sizes"].items())
        lines += [
            f"## {title}\n",
            f"{about[0].upper()}{about[1:]}.\n",
            *(f"- {line}" for line in summary(one)),
            "",
        ]
        for table in tables(one):
            lines += _markdown(table)
    return "\n".join(lines)


def _markdown(table: Table) -> list[str]:
    def cells(row):
        return f"| {' | '.join(row)} |"

    return [
        f"### {table.title}\n",
        f"{table.says}\n",
        cells(table.head),
        "|" + " --- |" * len(table.head),
        *map(cells, table.rows),
        "",
    ]


def plot(found: dict[str, dict], name: str, folder: Path) -> None:
    """One of PLOTS, a panel a config."""
    what, value, shared = PLOTS[name]
    with rc_context(STYLE):
        figure = Figure((4.2 * len(found), 3.4), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, one in zip(panels, found.values()):
            _panel(axes, one, value, shared)
            axes.set(title=one["config"], xlabel="frames")
        panels[0].set_ylabel(what)
        panels[0].legend(frameon=False)
        figure.savefig(folder / name, dpi=90, metadata={"Software": None})


def _panel(axes, one: dict, value: Callable, shared: Callable | None) -> None:
    frames = [str(n) for n in one["frames"]]
    for kind in KINDS:
        axes.plot(
            one["frames"],
            [value(one, kind, n) for n in frames],
            marker="o",
            markersize=4,
            label=kind,
        )
    if shared:
        axes.plot(
            one["frames"],
            [shared(one, n) for n in frames],
            color="grey",
            linestyle=":",
            label="ViT, for all",
        )
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xticks(one["frames"], frames)
    axes.grid(axis="y", linewidth=0.5)


def main() -> None:
    """Counts, measures or writes."""
    asked = parser(__doc__)
    asked.add_argument("action", choices=("count", "measure", "write"), nargs="?", default="write")
    args = asked.parse_args()
    action = args.action
    if args.smoke:
        smoke()
    elif action == "count":
        count_all()
    elif action == "measure":
        measured = measure(load_config(MEASURED), [n for n in FRAMES if n <= UP_TO], TEXT)
        save(FILE, known() | {"measured": measured})
    else:
        found = studies()
        PAGE.write_text(page(found))
        for name in PLOTS:
            plot(found, name, PAGE.parent)


def smoke() -> None:
    """Counts one program anew, and says whether the saved page is what would be written."""
    name, count = next(
        (name, f)
        for name, f in programs(load_config(MEASURED), [1], TEXT, CHIP)
        if "decode" in name and name.endswith("FLOPs")
    )
    counted, found = count(), studies()
    with tempfile.TemporaryDirectory() as folder:
        plot(found, next(iter(PLOTS)), Path(folder))
    if counted != known()["programs"][MEASURED][name]:
        print(
            f"{name}: {counted}, saved {known()['programs'][MEASURED][name]}, by another compiler"
        )
    print(
        f"{PAGE}:"
        f""" {
            "as it would be written"
            if page(found) == PAGE.read_text()
            else sys.exit("is out of date")
        }"""
    )


if __name__ == "__main__":
    main()
