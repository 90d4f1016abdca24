"""docs/results.md and docs/results/ablations.html from the saved runs:
`python -m benchmarks.results`. No number is typed by hand.

`evlm ablate --variants ... --out docs/results/ablations` makes the missing runs; git keeps their
result.json."""

import sys
from pathlib import Path

from benchmarks import parser
from evlm_jax.ablate.claims import FAILS, HOLDS, UNDECIDED, UNJUDGED, judge, obstacles
from evlm_jax.ablate.collect import BUDGETS, cells, collect, header, rows, variants
from evlm_jax.ablate.job import BASE
from evlm_jax.ablate.page import about, described, judgement_cells, render

RUNS, PAGE, HTML = (
    Path("docs/results/ablations"),
    Path("docs/results.md"),
    Path("docs/results/ablations.html"),
)
HEAD = f"""# What holds of the paper's claims, at the size of two CPU cores

Written by `python -m benchmarks.results`, with plots as \
[results/ablations.html](results/ablations.html), from
[results/ablations](results/ablations), which holds every run: per question whether it was right, \
so that every interval can be computed
again. The runs are made by

```sh
{{command}}
```

{{about}}

A claim says that one variant beats another. It {HOLDS} where the 95% interval of the difference \
lies above 0, {FAILS} where it lies
below, and is {UNDECIDED} in between. Intervals are of a bootstrap over images and seeds; the \
seeds' part is widened to Student's t, because
there are few ([evals/statistics.py](../evlm_jax/evals/statistics.py)). p is of the paired t-test \
over seeds. Of several rivals the best by
the same numbers is taken, which favours it. Every run saw as many questions as the budget says; \
where one costs more than the base, its
reading at equal FLOPs is of an earlier update (column `questions`). What the variants are: \
[ablations.md](ablations.md). The models are
small, the questions synthetic: a claim that {HOLDS} here is no proof at 14 billion parameters, \
and neither is its opposite.
"""
COLUMNS = ["claim", "compared", "budget", "measure", "difference", "seeds", "verdict"]


def page(found: dict) -> str:
    """The page of `evlm_jax.ablate.collect.collect`'s dict."""
    settings, judged = found["settings"], list(judge(found))
    names = ",".join(name for name in variants(found) if name != BASE)
    seeds = 1 + max(run["seed"] for run in found["runs"])
    test = "" if settings["limit"] is None else f" --test {settings['limit']}"
    command = (
        f"evlm ablate --variants {names} --seeds {seeds} --questions {settings['questions']}{test}"
        f" --out {RUNS}"
    )
    parts = [HEAD.format(command=command, about=about(found)), "## Claims", ""]
    if reasons := obstacles(found):
        parts += [f"**No claim is judged: {'; '.join(reasons)}.**", ""]
    parts += [_table(COLUMNS, map(judgement_cells, judged)), ""]
    counts = {
        verdict: sum(j.verdict == verdict for j in judged)
        for verdict in (HOLDS, FAILS, UNDECIDED, UNJUDGED)
    }
    parts += [
        "Of these rows: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        + ".",
        "",
    ]
    for budget, title in BUDGETS.items():
        parts += [f"## At {title}", "", _table(header(), map(cells, rows(found, budget))), ""]
    changed = [(row.variant, described(row.changes)) for row in rows(found, next(iter(BUDGETS)))]
    return "\n".join([*parts, "## Variants", "", _table(["variant", "changes"], changed), ""])


def _table(names: list[str], lines) -> str:
    def row(line):
        return "| " + " | ".join(line) + " |"

    return "\n".join([row(names), "|" + " --- |" * len(names), *map(row, lines)])


def main() -> None:
    """Writes both pages; a smoke says whether the saved one is what would be written."""
    smoke = parser(__doc__).parse_args().smoke
    found = collect(sorted(RUNS.glob("*/*/result.json")))
    if smoke:
        written = page(found)
        return print(
            f"{PAGE}:"
            f""" {
                "as it would be written"
                if written == PAGE.read_text("utf-8")
                else sys.exit("is out of date")
            }"""
        )
    PAGE.write_text(page(found), "utf-8")
    render(found, HTML)


if __name__ == "__main__":
    main()
