"""The pilot's figures in docs/preregistration.md, from saved runs: `python -m benchmarks.pilot`.

The page says which commands make the runs; their seeds are none of the study's. MARGIN and BEST_TAP
of experiments/scenes_study.py are copied from what is said here."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import parser
from evlm_jax.ablate.budget import QUESTIONS
from evlm_jax.ablate.collect import collect, outcomes, values, variants
from evlm_jax.ablate.study import BASE, study_of

RUNS, PAGE = Path("docs/results/pilot"), Path("docs/preregistration.md")
BEGIN, END = "<!-- pilot -->", "<!-- end of the pilot -->"
POINTS, LAST, POWER, ALPHA = 1.5, "tap-last", 0.8, 0.05
SEEDS = 4, 6, 8, 12


def smallest(seeds: int) -> float:
    """The difference, in deviations of a paired difference, that Student's two-sided test of so
    many seeds finds with POWER.
    """
    from scipy import optimize, stats

    limit = stats.t.isf(ALPHA / 2, seeds - 1)

    def missing(effect):
        shift = effect * np.sqrt(seeds)
        found = stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift)
        return found - POWER

    return float(optimize.brentq(missing, 0.01, 3.0))


def points_a_nat(found: dict) -> float:
    """By how much the share of exact answers falls when the loss grows by a nat: least squares over
    all readings of all runs.
    """
    nats, exact, *_ = study_of(found["settings"]).measures
    pairs = [
        [outcomes(found, run, int(step), measure).mean() for measure in (nats, exact)]
        for run in found["runs"]
        for step in run["readings"]
    ]
    return -float(np.polyfit(*np.array(pairs).T, 1)[0])


def figures(found: dict) -> str:
    """The tables, as Markdown."""
    study = study_of(found["settings"])
    measures = study.measures
    names, lines = variants(found), []
    for name in names:
        each = [list(values(found, name, QUESTIONS, m).values()) for m in measures]
        cells = [
            f"{np.mean(means):.{m.digits}f} ± {np.std(means, ddof=1):.{m.digits}f}"
            for m, means in zip(measures, ([x.mean() for x in seeds] for seeds in each))
        ]
        lines.append([name, str(len(each[0])), *cells])
    table = _table(["variant", "seeds", *(m.name for m in measures)], lines)
    slope, taps = points_a_nat(found), [name for name in names if name != BASE]
    nats = {name: values(found, name, QUESTIONS, study.primary) for name in taps}
    shared = set.intersection(*map(set, nats.values()))
    means = {name: np.mean([nats[name][seed].mean() for seed in shared]) for name in taps}
    a, b = (values(found, name, QUESTIONS, study.primary) for name in (BASE, LAST))
    apart = np.array([b[seed].mean() - a[seed].mean() for seed in a if seed in b])
    deviation = float(np.std(apart, ddof=1))
    facts = [
        ["points a nat", f"{slope:.1f}"],
        [f"margin: {POINTS} points in nats", f"{POINTS / slope:.4f}"],
        [f"{LAST} less {BASE}, nats", f"{apart.mean():+.4f}"],
        ["its deviation between seeds, nats", f"{deviation:.4f}"],
        ["the same in points", f"{deviation * slope:.2f}"],
    ]
    facts += [
        [
            f"smallest difference found with {POWER:.0%} by {seeds} seeds, points",
            f"{smallest(seeds) * deviation * slope:.2f}",
        ]
        for seeds in SEEDS
    ]
    if len(means) > 1:
        facts.append(["single tap of lowest loss", min(means, key=means.get)])
    return f"{table}\n\n{_table(['of the pilot', 'figure'], facts)}"


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(text: str, files: Sequence[Path]) -> str:
    """The page's text with the figures of these runs."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    said = figures(collect(files)) if files else "The pilot has not run yet."
    return f"{before}{BEGIN}\n\n{said}\n\n{END}{after}"


def main() -> None:
    """Writes the figures; a smoke says whether those on the page are what would be written."""
    smoke, text = parser(__doc__).parse_args().smoke, PAGE.read_text("utf-8")
    made = page(text, sorted(RUNS.glob("*/*/result.json")))
    if not smoke:
        PAGE.write_text(made, "utf-8")
    elif made == text:
        print(f"{PAGE}: as it would be written")
    else:
        sys.exit(f"{PAGE}: is out of date")


if __name__ == "__main__":
    main()
