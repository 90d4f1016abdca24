"""How sure a score is: Wilson's interval of a proportion, and standard errors when examples share an image."""

import math
from collections.abc import Hashable, Sequence

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
