"""What an ablation found, for people: one HTML page, no script, no network; and the sentences that
docs/results.md shares with it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from evlm_jax.ablate.budget import QUESTIONS
from evlm_jax.ablate.claims import REPORTED, Judgement, judge, obstacles
from evlm_jax.ablate.collect import (
    BUDGETS,
    HEADER,
    ResultRow,
    cells,
    header,
    interval,
    rows,
    variants,
)
from evlm_jax.ablate.study import BASE, Measure, Study, study_of
from evlm_jax.evals.group_sequential import FAILS, HOLDS
from evlm_jax.report import figures
from evlm_jax.report import page as report

TEMPLATE = Path(__file__).with_name("page.html")


def render(found: dict, out: Path) -> Path:
    """Writes the page of `collect`'s dict and returns its path."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    study, made = study_of(found["settings"]), {budget: rows(found, budget) for budget in BUDGETS}
    seen, primary, judged = made[QUESTIONS], study.primary, list(judge(found))
    points = {
        row.variant: (row.flops / 1e15, float(np.mean(row.means[primary.key]))) for row in seen
    }
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        style=Markup(report.style()),
        about=about(found),
        effects=[_effects(made, measure) for measure in study.measures] if len(seen) > 1 else [],
        obstacles=obstacles(found),
        how=how_judged(study),
        broken=broken_controls(judged),
        claims=[judgement_cells(j) for j in judged if j.verdict != REPORTED],
        beside=[judgement_cells(j) for j in judged if j.verdict == REPORTED],
        good=HOLDS,
        sections=[_section(made[budget], title, study) for budget, title in BUDGETS.items()],
        cost=Markup(figures.named_points(points, "training FLOPs, P (1e15)", primary.name)),
        cost_of=primary.name,
        changes=[(row.variant, described(row.changes)) for row in seen],
        base_json=json.dumps(found["settings"]["base"], ensure_ascii=False, indent=1),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def about(found: dict) -> str:
    """What was run, in a sentence."""
    runs, settings = found["runs"], found["settings"]
    seeds, limit = len({run["seed"] for run in runs}), settings["limit"]
    devices = sorted({reading["device"] for run in runs for reading in run["readings"].values()})
    asked = "all questions" if limit is None else f"{limit:,} questions"
    many = (
        f"{len(variants(found))} variants, {seeds} {'seeds' if seeds > 1 else 'seed'}, {len(runs)}"
        " runs"
    )
    budget = f"{settings['questions']:,} questions, and the FLOPs that the base needs for as many"
    begin = (
        f"all start from the run of weights {settings['init'][:12]}; "
        if "init" in settings
        else "all of a seed start from one dense run; "
        if "branched" in settings
        else ""
    )
    return (
        f"{many}; {begin}budgets: {budget}; {asked} of {study_of(settings).tested};"
        f" {'; '.join(devices)}."
    )


def how_judged(study: Study) -> str:
    """What a verdict is, in a sentence or two."""
    if not study.looks:
        return (
            "Differences are means over seeds and questions; in brackets 95% intervals of a"
            " bootstrap over both."
        )
    looks = ", ".join(map(str, study.looks))
    return (
        f"By {study.primary.name}, looked at with {looks} seeds; in brackets the interval of the"
        f" mean over seeds that holds at every look with {1 - study.alpha:.0%}. A row is equivalent"
        f" where two one-sided tests of {study.alpha:.0%} place the difference within"
        f" {study.margin:g}, open where nothing is decided; the seeds are those of the look that"
        " decided."
    )


def broken_controls(judged: Sequence[Judgement]) -> list[str]:
    """Controls that were decided, which says that the others cannot be trusted."""
    return [
        f"The control ({j.claim.text}, {BUDGETS[j.budget]}) ended as: {j.verdict}."
        for j in judged
        if j.claim.control and j.verdict in (HOLDS, FAILS)
    ]


def judgement_cells(judged: Judgement) -> list[str]:
    """A row of the table of claims: claim, compared, budget, measure, difference, seeds,
    verdict.
    """
    compared = f"{judged.claim.better} less {judged.rival}"
    what = [judged.claim.text, compared, BUDGETS[judged.budget], judged.measure.name]
    apart = interval(judged.apart, judged.measure)
    return [*what, apart, str(judged.apart.seeds), judged.verdict]


def described(changes: dict) -> str:
    """A variant's fields as text; of long values that they changed."""

    def short(value):
        return (
            "other rules"
            if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value)
            else value
        )

    return ", ".join(f"{key} = {short(value)}" for key, value in changes.items()) or "the base"


def _effects(made: dict[str, list[ResultRow]], measure: Measure) -> Markup:
    """Every variant less the base at every budget, as one plot."""
    base = {
        budget: np.mean(next(row.means[measure.key] for row in made[budget] if row.variant == BASE))
        for budget in made
    }
    plotted = {row.variant: {} for row in made[QUESTIONS] if row.variant != BASE}
    for budget, title in BUDGETS.items():
        for row in made[budget]:
            if apart := row.against[measure.key]:
                plotted[row.variant][title] = (
                    apart.mean,
                    apart.low,
                    apart.high,
                    np.subtract(row.means[measure.key], base[budget]),
                )
    better = "right" if measure.sign > 0 else "left"
    return Markup(
        figures.intervals(plotted, f"{measure.name}\nless the base; better to the {better}")
    )


def _section(made: list[ResultRow], title: str, study: Study) -> dict:
    """A budget's tables: what was measured, and what it took."""
    names, count = header(study.measures), len(HEADER)
    lines = [cells(row, study.measures) for row in made]
    measured = [names[0], *names[count:]], [[line[0], *line[count:]] for line in lines]
    return {
        "title": title,
        "measured": measured,
        "facts": (HEADER, [line[:count] for line in lines]),
    }
