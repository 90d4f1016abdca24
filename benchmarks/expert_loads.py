"""What runs tell of their experts, as a Markdown table: `python -m benchmarks.expert_loads
runs/demo runs/demo_moe`.

All of it stands in metrics.jsonl. Losses are means over the first and over the last three lines.
Shares are of a layer's choices in the step of the last line, the smallest and the largest of all
layers and experts; an expert is idle that got none in any line. The entropy is that of the routers'
probabilities, the mean over layers at the last line, against its largest value."""

import math
from pathlib import Path

import numpy as np

from benchmarks import parser
from evlm_jax.metrics import training_lines

SMOKE = [Path(f"tests/golden/format0_{form}/run") for form in ("dense", "experts")]
COLUMNS = (
    "run",
    "steps",
    "loss, first",
    "loss, last",
    "smallest share",
    "largest share",
    "idle",
    "entropy",
    "dropped",
)


def row(run: Path) -> list[str]:
    """A run's cells; a dense one has no loads."""
    lines = training_lines(run / "metrics.jsonl")
    losses = [np.mean([line["loss"] for line in some]) for some in (lines[:3], lines[-3:])]
    cells = [run.name, str(lines[-1]["step"]), *(f"{loss:.3f}" for loss in losses)]

    def of(name):
        return np.array(
            [[line[key] for key in line if key.endswith(f"/ffn/{name}")] for line in lines]
        )

    load = of("load")  # [lines, X, E]
    if not load.size:
        return cells + ["-"] * (len(COLUMNS) - len(cells))
    idle = (load.max(0) == 0).sum()
    entropy = f"{of('entropy')[-1].mean():.3f} of {math.log(load.shape[-1]):.3f}"
    cells += [
        f"{load[-1].min():.1%}",
        f"{load[-1].max():.1%}",
        f"{idle} of {load[0].size}",
        entropy,
        f"{of('dropped').sum():.0f}",
    ]
    return cells


def main() -> None:
    """Prints the table."""
    asked = parser(__doc__)
    asked.add_argument("runs", nargs="*", type=Path, help="directories of training runs")
    args = asked.parse_args()
    runs = (
        SMOKE if args.smoke else args.runs or asked.error("give the directories of training runs")
    )
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *map(row, runs)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
