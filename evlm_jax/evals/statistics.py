"""Accuracy by answer type, and how sure it is: Wilson's interval, and standard errors when examples share an image."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion, 95% with the default z. (0, 1) without examples."""
    if count == 0:
        return 0.0, 1.0
    p, n = successes / count, count
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean when values of one cluster (the questions about an image) are not independent.

    The sandwich estimate with the finite-sample factor C / (C - 1) over C clusters; equal to the plain standard error
    (with n - 1) when every value is its own cluster. nan for fewer than two clusters.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values for {len(clusters)} clusters; give each value its cluster")
    x = np.asarray(values, np.float64)
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(number)
    if count < 2:
        return math.nan
    sums = np.bincount([number[c] for c in clusters], x - x.mean(), count)
    return float(math.sqrt(count / (count - 1) * np.square(sums).sum()) / len(x))


def accuracy_table(examples: Iterable[Mapping], types: Mapping[str, Sequence[str]]) -> list[dict]:
    """Accuracy of all examples and by type of the true answer, beside what the most common answer of the type would score.

    Args:
      examples: with "image", "answer" and "correct".
    Returns:
      [{"type", "count", "correct", "accuracy", "error": standard error clustered by image or None, "interval": Wilson 95%,
      "majority", "majority_answer"}], "all" first.
    """
    type_of = {answer: kind for kind, answers in types.items() for answer in answers}
    groups: dict[str, list[Mapping]] = {"all": []} | {kind: [] for kind in types}
    for example in examples:
        groups["all"].append(example)
        groups[type_of[example["answer"]]].append(example)
    table = []
    for kind, group in groups.items():
        if not group:
            continue
        right, count = sum(bool(e["correct"]) for e in group), len(group)
        error = clustered_error([float(e["correct"]) for e in group], [e["image"] for e in group])
        (common, times), *_ = Counter(e["answer"] for e in group).most_common(1)
        row = {"type": kind, "count": count, "correct": right, "accuracy": right / count, "error": None if math.isnan(error) else error}
        table.append(row | {"interval": wilson(right, count), "majority": times / count, "majority_answer": common})
    return table
