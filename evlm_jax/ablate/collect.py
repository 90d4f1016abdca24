"""Finished runs as one dict that JSON holds, and what it says of a variant: mean, deviation, and
the difference from another one.

{"settings": {...}, "clusters": {task: [questions of each image]}, "runs": [result.json of each run,
settings and clusters left out]}"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evlm_jax.ablate import finished
from evlm_jax.ablate.budget import FLOPS, QUESTIONS
from evlm_jax.ablate.study import BASE, Measure, study_of
from evlm_jax.config import compat
from evlm_jax.evals.score import columns
from evlm_jax.evals.statistics import crossed_interval, paired_p

BUDGETS = {QUESTIONS: "equal questions seen", FLOPS: "equal training FLOPs"}


class Difference(NamedTuple):
    """Difference of two variants, over the seeds that both have."""

    mean: float
    low: float  # 95%, over seeds and questions
    high: float
    p: float | None  # of the paired test over seeds
    seeds: int


class ResultRow(NamedTuple):
    """A variant at a budget; means over its seeds."""

    variant: str
    changes: dict
    trained: int
    steps: float
    questions: float
    flops: float
    step_seconds: float
    peak_bytes: float
    loss: float
    means: dict[str, list[float]]  # by measure: of each seed
    against: dict[
        str, Difference | None
    ]  # by measure: this less the base; None for the base itself


def collect(files: Sequence[Path]) -> dict:
    """Joins result.json files.

    Raises ValueError naming the file whose settings or questions are not those of the first.
    """
    runs = [finished.load(file) for file in files]
    if not runs:
        raise ValueError("ablate: no run is finished")
    joined = {
        "settings": runs[0]["settings"],
        "clusters": runs[0]["clusters"],
        "runs": runs,
    }
    for file, run in zip(files, runs):
        clusters, settings = run.pop("clusters"), run.pop("settings")
        check(file, settings, joined["settings"], f"those of {files[0]}")
        if clusters != joined["clusters"]:
            raise ValueError(
                f"{file}: its test questions are not those of {files[0]}; remove one of them"
            )
    return joined


def check(file: Path, settings: dict, others: dict, whose: str = "those of this command") -> None:
    """Raises ValueError where the settings of a run and others differ."""
    if wrong := _apart(settings, others):
        raise ValueError(
            f"{file}: its {', '.join(wrong)} differ from {whose}; give another --out, or remove one"
            " of them"
        )


def _apart(one: dict, other: dict) -> list[str]:
    """Names of settings that differ; of the base, fields that both know: one that came later says
    what the code did before.
    """
    wrong = [name for name in one | other if name != "base" and one.get(name) != other.get(name)]
    a, b = (_fields(compat.renamed(settings["base"])) for settings in (one, other))
    return wrong + ["base"] * any(
        a[name] != b[name] for name in (a.keys() & b.keys()) - {"/format"}
    )


def _fields(node, name: str = "") -> dict:
    """{full name: value} of all that is in dicts and lists."""
    if isinstance(node, list | tuple):
        node = dict(enumerate(node)) | {"length": len(node)}
    if not isinstance(node, dict):
        return {name: node}
    return {
        full: value
        for key, entry in node.items()
        for full, value in _fields(entry, f"{name}/{key}").items()
    }


def variants(found: dict) -> list[str]:
    """Names, in the order of their first runs."""
    return list(dict.fromkeys(run["variant"] for run in found["runs"]))


def reading(run: dict, budget: str) -> dict:
    """What was read of a run where a budget ends."""
    return run["readings"][str(run["budgets"][budget]["step"])]


def values(found: dict, variant: str, budget: str, measure: Measure) -> dict[int, np.ndarray]:
    """{seed: a value for each question}, means over the readings of the budget; of several
    families weighted so that their mean is the mean of the families' means.
    """
    study = study_of(found["settings"])
    return {
        run["seed"]: np.mean(
            [
                outcomes(found, run, step, measure)
                for step in study.steps(run["budgets"][budget]["step"])
            ],
            axis=0,
        )
        for run in found["runs"]
        if run["variant"] == variant
    }


def outcomes(found: dict, run: dict, step: int, measure: Measure) -> np.ndarray:
    """The same of one reading of a run."""
    measured = run["readings"][str(step)]["measured"]
    parts = [
        finished.unpack(measured[key], sum(found["clusters"][key.partition("/")[0]]))
        for key in measure.keys
    ]
    share = sum(map(len, parts)) / len(parts)
    return np.concatenate([part * (share / len(part)) for part in parts])


def _clusters(found: dict, measure: Measure) -> list[int]:
    """Sizes; of several families a picture has one in each."""
    return [size for key in measure.keys for size in found["clusters"][key.partition("/")[0]]]


def difference(
    found: dict, variant: str, other: str, budget: str, measure: Measure
) -> Difference | None:
    """`variant` less `other`, paired by seed and question; None without a common seed."""
    a, b = (values(found, name, budget, measure) for name in (variant, other))
    if not (common := [seed for seed in a if seed in b]):
        return None
    apart = np.stack([a[seed] - b[seed] for seed in common])
    low, high = crossed_interval(apart, _clusters(found, measure))
    return Difference(float(apart.mean()), low, high, paired_p(apart.mean(1)), len(common))


def rows(found: dict, budget: str) -> list[ResultRow]:
    """A row a variant, the base first."""
    return [
        _row(found, variant, budget)
        for variant in sorted(variants(found), key=lambda name: name != BASE)
    ]


def _row(found: dict, variant: str, budget: str) -> ResultRow:
    runs = [run for run in found["runs"] if run["variant"] == variant]
    measures = study_of(found["settings"]).measures

    def at(name):
        return float(np.mean([run["budgets"][budget][name] for run in runs]))

    def mean(name, of=np.mean):
        return float(of([reading(run, budget)[name] for run in runs]))

    means = {
        m.key: [float(v.mean()) for v in values(found, variant, budget, m).values()]
        for m in measures
    }
    against = {
        m.key: None if variant == BASE else difference(found, variant, BASE, budget, m)
        for m in measures
    }
    facts = (
        at("step"),
        at("questions"),
        at("flops"),
        mean("step_seconds"),
        mean("peak_bytes", np.max),
        mean("loss"),
    )
    return ResultRow(variant, runs[0]["changes"], runs[0]["trained"], *facts, means, against)


HEADER = "variant,trained,steps,questions,FLOPs,s/step,peak,loss".split(",")


def header(measures: Sequence[Measure]) -> list[str]:
    """Names of the columns of `cells`."""
    return HEADER + [name for measure in measures for name in (measure.name, "less base", "p")]


def cells(row: ResultRow, measures: Sequence[Measure]) -> list[str]:
    """A row as text, for every table."""
    facts = [
        row.variant,
        f"{row.trained / 1e6:.2f} M",
        f"{row.steps:.0f}",
        f"{row.questions:,.0f}",
        f"{row.flops:.3g}",
    ]
    facts += [f"{row.step_seconds:.2f}", f"{row.peak_bytes / 2**30:.2f} GiB", f"{row.loss:.3f}"]
    return facts + [text for measure in measures for text in _measured(row, measure)]


def _measured(row: ResultRow, measure: Measure) -> tuple[str, str, str]:
    means, apart, digits = row.means[measure.key], row.against[measure.key], measure.digits
    spread = f" ± {np.std(means, ddof=1):.{digits}f}" if len(means) > 1 else ""
    return (
        f"{np.mean(means):.{digits}f}{spread}",
        interval(apart, measure),
        "" if apart is None or apart.p is None else f"{apart.p:.2g}",
    )


def interval(apart: Difference | None, measure: Measure) -> str:
    """A difference as text."""
    if apart is None:
        return ""
    mean, low, high = (f"{x:+.{measure.digits}f}" for x in (apart.mean, apart.low, apart.high))
    return f"{mean} [{low}, {high}]"


def table(found: dict) -> str:
    """All rows at both budgets, as text."""
    measures = study_of(found["settings"]).measures
    return "\n\n".join(
        f"{title}\n"
        + columns([header(measures), *(cells(row, measures) for row in rows(found, budget))])
        for budget, title in BUDGETS.items()
    )
