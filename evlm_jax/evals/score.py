"""Scores of a saved result, with errors and the paper's figures beside them; two results compared
question by question.
"""

import math
from collections.abc import Sequence

import numpy as np

from evlm_jax.evals.judge import judges
from evlm_jax.evals.paper import PAPER
from evlm_jax.evals.statistics import clustered_error
from evlm_jax.evals.tasks import find


def scored(result: dict) -> dict:
    """The result with "scores": [{"metric", "value", "error", "count", "clusters"}]; none where the
    answers are not public.

    error: standard error, clustered by image or video; None for a metric that is no mean, and for a
    single cluster. Raises ValueError where several judges have judged.
    """
    rows, scores = result["examples"], []
    judges(rows)
    if rows and all(row["answer"] is not None for row in rows):
        try:
            each, whole = find(result["task"]).score(rows)
        except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{result['task']}: the answers are not of the form that it scores:"
                f" {type(error).__name__}: {error}"
            ) from error
        for metric, values in each.items():
            kept = [
                (value, row["cluster"])
                for value, row in zip(values, rows, strict=True)
                if value is not None
            ]
            if kept:
                scores.append(
                    {
                        "metric": metric,
                        "value": float(np.mean([v for v, _ in kept])),
                        **_sure(*zip(*kept)),
                        "count": len(kept),
                    }
                )
        scores += [
            {"metric": metric, "value": value, "error": None, "count": len(rows)}
            for metric, value in whole.items()
        ]
    return result | {"scores": scores}


def compare(a: dict, b: dict) -> list[dict]:
    """Paired differences b - a of every metric that is a mean: [{"metric", "a", "b", "difference",
    "error", "p"}].

    error is clustered as in `scored`; p is two-sided, by Student's t with one degree of freedom
    less than there are clusters: 1 where no answer differs, None for a single cluster.
    Raises ValueError where the two are not of the same task, split, prompts, questions, true
    answers and judge."""
    first, second = ({row["id"]: row for row in result["examples"]} for result in (a, b))
    _comparable(a, b, first, second)
    rows = list(first.values())
    each, other = (
        find(a["task"]).score(rows).each,
        find(b["task"]).score([second[name] for name in first]).each,
    )
    found = []
    for metric in [metric for metric in each if metric in other]:
        pairs = [
            (x, y, r["cluster"])
            for x, y, r in zip(each[metric], other[metric], rows)
            if x is not None and y is not None
        ]
        if pairs:
            x, y, clusters = zip(*pairs)
            difference = np.subtract(y, x)
            error = _sure(difference, clusters)["error"]
            p = (
                None
                if error is None
                else _p(float(difference.mean()), error, len(set(clusters)) - 1)
            )
            means = {
                "a": float(np.mean(x)),
                "b": float(np.mean(y)),
                "difference": float(difference.mean()),
            }
            found.append({"metric": metric, **means, "error": error, "p": p})
    return found


def _comparable(a: dict, b: dict, first: dict[str, dict], second: dict[str, dict]) -> None:
    """Raises ValueError naming what differs."""
    for name in ("task", "split", "prompts"):
        if name in a and name in b and a[name] != b[name]:
            raise ValueError(f"the results are not of the same {name}: {a[name]} and {b[name]}")
    if first.keys() != second.keys():
        alone = (
            f"{len(first.keys() - second.keys())} only in the first,"
            f" {len(second.keys() - first.keys())} only in the second"
        )
        raise ValueError(f"the results are not of the same questions: {alone}")
    for name, what in (("prompt", "prompt"), ("answer", "true answer"), ("cluster", "image")):
        for key, row in first.items():
            one, other = row.get(name), second[key].get(name)
            if one != other:
                raise ValueError(
                    f"the results are not of the same questions: question {key} has another {what},"
                    f" {one!r} and {other!r}"
                )
    if (one := judges(list(first.values()))) != (other := judges(list(second.values()))):
        raise ValueError(
            f"the results were not judged alike: by {one or 'nobody'} and by {other or 'nobody'}"
        )


def _p(mean: float, error: float, freedom: int) -> float:
    if not error:
        return 0.0 if mean else 1.0
    from scipy import stats  # a second of every command's start, and few compare results

    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def table(result: dict) -> str:
    """The scores as text, the paper's rows beside them."""
    paper = PAPER.get(result["task"], {})
    models = list(dict.fromkeys(model for row in paper.values() for model in row))
    lines = [["metric", "score", "error", "count", *models]]
    for score in result["scores"]:
        beside = [_number(paper.get(score["metric"], {}).get(model)) for model in models]
        lines.append(
            [
                score["metric"],
                _number(score["value"]),
                _number(score["error"]),
                str(score["count"]),
                *beside,
            ]
        )
    if not result["scores"]:
        return (
            f"{result['task']}: no scores, the answers are not in these files;"
            f" {len(result['examples'])} predictions are saved"
        )
    return columns(lines)


def comparison_table(found: Sequence[dict]) -> str:
    """`compare` as text."""
    names = ("a", "b", "difference", "error")
    lines = [["metric", "against", "this", "difference", "error", "p"]]
    lines += [
        [
            row["metric"],
            *(_number(row[name]) for name in names),
            "-" if row["p"] is None else f"{row['p']:.2g}",
        ]
        for row in found
    ]
    return columns(lines)


def _sure(values: Sequence[float], clusters: Sequence[str]) -> dict:
    error = clustered_error(values, clusters)
    return {"error": None if math.isnan(error) else error, "clusters": len(set(clusters))}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )
