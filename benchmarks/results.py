"""docs/results.md and docs/results/*.html from the saved runs: `python -m benchmarks.results`. No
number is typed by hand.

`evlm ablate --variants ... --out docs/results/ablations` makes the missing runs; git keeps their
result.json."""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import parser
from evlm_jax.ablate.claims import (
    REPORTED,
    UNDECIDED,
    UNJUDGED,
    Judgement,
    judge,
    obstacles,
)
from evlm_jax.ablate.collect import BUDGETS, cells, collect, header, rows, variants
from evlm_jax.ablate.page import (
    about,
    broken_controls,
    described,
    how_judged,
    judgement_cells,
    render,
)
from evlm_jax.ablate.study import BASE, study_of
from evlm_jax.evals.group_sequential import EQUIVALENT, FAILS, HOLDS, OPEN

PAGE = Path("docs/results.md")
RUNS = Path("docs/results/ablations")
STUDY = (Path("docs/results/scenes"), Path("docs/results/branched"))  # from the towers, from a run
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
SECTION = """# The preregistered study: {name}

Claims, margin and stopping rule were fixed before its runs: \
[preregistration.md](preregistration.md). The runs are in
[results/{name}](results/{name}), plots in [results/{name}.html](results/{name}.html).

{about}

{how}
"""
COLUMNS = ["claim", "compared", "budget", "measure", "difference", "seeds", "verdict"]
VERDICTS = (HOLDS, FAILS, EQUIVALENT, OPEN, UNDECIDED, UNJUDGED)


def page(found: dict) -> str:
    """The page of `collect`'s dict, of runs that are judged by intervals."""
    settings, names = found["settings"], [name for name in variants(found) if name != BASE]
    seeds = 1 + max(run["seed"] for run in found["runs"])
    test = "" if settings["limit"] is None else f" --test {settings['limit']}"
    command = (
        f"evlm ablate --variants {','.join(names)} --seeds {seeds} --questions"
        f" {settings['questions']}{test} --out {RUNS}"
    )
    return "\n".join([HEAD.format(command=command, about=about(found)), *_results(found)])


def section(found: dict, name: str) -> str:
    """The same of runs of a study with looks, in the folder of this name."""
    how = how_judged(study_of(found["settings"]))
    head = SECTION.format(name=name, about=about(found), how=how)
    return "\n".join([head, *_results(found)])


def _results(found: dict) -> list[str]:
    """Claims, variants at both budgets, what each changes."""
    judged, measures = list(judge(found)), study_of(found["settings"]).measures
    parts = ["## Claims", ""]
    if reasons := obstacles(found):
        parts += [f"**No claim is judged: {'; '.join(reasons)}.**", ""]
    parts += [f"**{line}**\n" for line in broken_controls(judged)]
    decided = [j for j in judged if j.verdict != REPORTED]
    parts += [_judged(decided), ""]
    ends = [j.verdict for j in decided if not j.claim.control]
    said = ", ".join(f"{ends.count(name)} {name}" for name in VERDICTS if name in ends)
    parts += [
        f"Of these rows{'' if len(ends) == len(decided) else ' but the control'}: {said}.",
        "",
    ]
    if beside := [j for j in judged if j.verdict == REPORTED]:
        parts += ["## By other measures", "", _judged(beside), ""]
    for budget, title in BUDGETS.items():
        lines = (cells(row, measures) for row in rows(found, budget))
        parts += [f"## At {title}", "", _table(header(measures), lines), ""]
    changed = [(row.variant, described(row.changes)) for row in rows(found, next(iter(BUDGETS)))]
    return [*parts, "## Variants", "", _table(["variant", "changes"], changed), ""]


def _judged(judged: Sequence[Judgement]) -> str:
    return _table(COLUMNS, map(judgement_cells, judged))


def _table(names: list[str], lines) -> str:
    def row(line):
        return "| " + " | ".join(line) + " |"

    return "\n".join([row(names), "|" + " --- |" * len(names), *map(row, lines)])


def main() -> None:
    """Writes the pages; a smoke says whether the saved one is what would be written."""
    smoke, text = parser(__doc__).parse_args().smoke, []
    for folder in (RUNS, *STUDY):
        if files := sorted(folder.glob("*/*/result.json")):
            found = collect(files)
            text.append(page(found) if folder == RUNS else section(found, folder.name))
            if not smoke:
                render(found, folder.with_suffix(".html"))
    if not smoke:
        PAGE.write_text("\n".join(text), "utf-8")
    elif "\n".join(text) == PAGE.read_text("utf-8"):
        print(f"{PAGE}: as it would be written")
    else:
        sys.exit(f"{PAGE}: is out of date")


if __name__ == "__main__":
    main()
