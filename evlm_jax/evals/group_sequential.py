"""Comparisons that are looked at several times while runs come in, and may end at each look.

Error is spent about as Pocock's boundaries would, by Lan and DeMets's function (Biometrika 70,
1983), so that a large difference ends at the first look. What is compared are paired differences,
one a seed, whose deviation is estimated, so a look's normal boundary becomes the quantile of
Student's t with the same tail (Jennison and Turnbull, Group Sequential Methods, 2000, section
4.4)."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HOLDS, FAILS, EQUIVALENT, OPEN = "holds", "does not", "equivalent", "open"
NODES, FAR = 200, 8.0  # of an integral's grid, and how many deviations below 0 it begins


class Decision(NamedTuple):
    """How a comparison ended, and what it ended by."""

    verdict: str  # HOLDS, FAILS, EQUIVALENT or OPEN
    seeds: int  # of the look that decided; of the last look there was, where it is OPEN
    mean: float
    low: float  # repeated interval of level 1 - alpha at that look
    high: float


def spent(fractions: np.ndarray, alpha: float) -> np.ndarray:
    """One-sided error that may be spent until each share of the whole information in (0, 1]."""
    return alpha * np.log1p((math.e - 1) * fractions)


@functools.lru_cache
def boundaries(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """What the z value of each look must exceed, so that under the null hypothesis one of them does
    with the chance `alpha`, and one up to look k with `spent(fractions[k], alpha)`.

    z of a share t of the information is W(t) / sqrt(t) of a Brownian motion W. Its density where no
    boundary was exceeded yet is carried from look to look on a Gauss-Legendre grid (Armitage,
    McPherson and Rowe 1969).

    Args:
      fractions: of the information at each look, ascending, the last 1.
      alpha: one-sided.
    """
    from scipy import optimize, stats  # a second of every command's start, and few compare runs

    x, w = np.polynomial.legendre.leggauss(NODES)
    spend = np.diff(spent(np.array(fractions), alpha), prepend=0.0)
    grid, mass, found = np.zeros(1), np.ones(1), []  # W below all boundaries so far
    for share, step, fraction in zip(spend, np.diff(fractions, prepend=0.0), fractions):
        deviation = math.sqrt(step)
        limit = optimize.brentq(_excess, 0.0, 2 * FAR, args=(grid, mass, deviation, share))
        found.append(limit / math.sqrt(fraction))
        low = -FAR * math.sqrt(fraction)
        new = low + (limit - low) * (x + 1) / 2
        density = stats.norm.pdf(new[:, None], grid, deviation) @ mass
        grid, mass = new, w * (limit - low) / 2 * density
    return tuple(found)


def _excess(limit, grid, mass, deviation, share) -> float:
    """How much more than `share` lies beyond `limit` a step behind the grid."""
    from scipy import stats

    return mass @ stats.norm.sf((limit - grid) / deviation) - share


@functools.lru_cache
def _quantile(looks: tuple[int, ...], seeds: int, alpha: float) -> float:
    """Of Student's t, for the look at `seeds` seeds; `alpha` of both sides together."""
    from scipy import stats

    limits = boundaries(tuple(look / looks[-1] for look in looks), alpha / 2)
    return float(stats.t.isf(stats.norm.sf(limits[looks.index(seeds)]), seeds - 1))


def repeated_interval(
    differences: Sequence[float], looks: tuple[int, ...], alpha: float
) -> tuple[float, float]:
    """Interval of the mean of paired differences, one a seed, at the look at as many seeds. With
    the chance 1 - alpha it holds the truth at every look.
    """
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    half = _quantile(looks, len(differences), alpha) * error
    return mean - half, mean + half


def decide(
    differences: Sequence[float], looks: tuple[int, ...], margin: float, alpha: float = 0.05
) -> Decision:
    """The verdict on "the mean is above 0" at the first look that decides.

    HOLDS or FAILS where the interval of level 1 - alpha lies above or below 0, however small the
    difference; else EQUIVALENT where two one-sided tests, each with the error `alpha`, place the
    mean between -margin and margin. Seeds behind the last look do not count, nor do those behind a
    look that decided.

    Args:
      differences: of seeds 0, 1, ...; more is better.
      looks: numbers of seeds, ascending, each at least 2.
    """
    decision = Decision(OPEN, 0, math.nan, math.nan, math.nan)
    for seeds in looks:
        if seeds > len(differences):
            break
        seen = differences[:seeds]
        low, high = repeated_interval(seen, looks, alpha)
        inner = repeated_interval(seen, looks, 2 * alpha)
        verdict = HOLDS if low > 0 else FAILS if high < 0 else OPEN
        if verdict == OPEN and -margin < inner[0] and inner[1] < margin:
            verdict = EQUIVALENT
        decision = Decision(verdict, seeds, float(np.mean(seen)), low, high)
        if verdict != OPEN:
            break
    return decision
