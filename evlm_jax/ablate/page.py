"""What an ablation found, for people: one HTML page, no script, no network; and the sentences that docs/results.md shares with it."""

import json
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from evlm_jax import report, viz
from evlm_jax.ablate.budget import QUESTIONS
from evlm_jax.ablate.claims import HOLDS, Judgement, judge, obstacles
from evlm_jax.ablate.collect import ACCURACY, BUDGETS, cells, header, interval, rows, variants
from evlm_jax.ablate.job import BASE

TEMPLATE = Path(__file__).with_name("page.html")


def render(found: dict, out: Path) -> Path:
    """Writes the page of `collect`'s dict and returns its path."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sections = [_section(found, budget, title) for budget, title in BUDGETS.items()]
    seen = rows(found, QUESTIONS)
    points = {row.variant: (row.flops / 1e15, float(np.mean(row.means[ACCURACY.key]))) for row in seen}
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        style=Markup(report.style()),
        about=about(found),
        obstacles=obstacles(found),
        claims=[judgement_cells(judgement) for judgement in judge(found)],
        good=HOLDS,
        sections=sections,
        cost=Markup(viz.named_points(points, "training FLOPs, P (1e15)", ACCURACY.name)),
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
    many = f"{len(variants(found))} variants, {seeds} {'seeds' if seeds > 1 else 'seed'}, {len(runs)} runs"
    budget = f"{settings['questions']:,} questions, and the FLOPs that the base needs for as many"
    begin = f"all start from the run of weights {settings['init'][:12]}; " if "init" in settings else ""
    return f"{many}; {begin}budgets: {budget}; {asked} of easy-vqa's official test, answered by lowest loss; {'; '.join(devices)}."


def judgement_cells(judged: Judgement) -> list[str]:
    """A row of the table of claims: claim, compared, budget, measure, difference, seeds, verdict."""
    compared = f"{judged.claim.better} less {judged.rival}"
    what = [judged.claim.text, compared, BUDGETS[judged.budget], judged.measure.name]
    return [*what, interval(judged.apart), str(judged.apart.seeds), judged.verdict]


def described(changes: dict) -> str:
    """A variant's fields as text; of long values that they changed."""
    short = lambda value: "other rules" if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value) else value
    return ", ".join(f"{key} = {short(value)}" for key, value in changes.items()) or "the base"


def _section(found: dict, budget: str, title: str) -> dict:
    """A budget's plot and table."""
    made = rows(found, budget)
    base = np.mean(next(row.means[ACCURACY.key] for row in made if row.variant == BASE))
    apart = {row.variant: (row.against[ACCURACY.key], np.subtract(row.means[ACCURACY.key], base)) for row in made if row.variant != BASE}
    plotted = {name: (found.mean, found.low, found.high, seeds) for name, (found, seeds) in apart.items() if found}
    svg = Markup(viz.intervals(plotted, f"{ACCURACY.name}: less the base")) if plotted else None
    return {"title": title, "svg": svg, "header": header(), "rows": [cells(row) for row in made]}
