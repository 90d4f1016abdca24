"""Looks: boundaries against published ones and against SciPy's integrals, errors and power of the
whole procedure by simulation.
"""

import numpy as np
import pytest
from scipy import stats

from evlm_jax.evals.group_sequential import (
    EQUIVALENT,
    FAILS,
    HOLDS,
    OPEN,
    boundaries,
    decide,
    repeated_interval,
    spent,
)

LOOKS, MARGIN = (4, 6, 8, 12), 1.5
DEVIATION = 1.2  # of a paired difference, in points


def test_boundaries_are_the_published_ones():
    """Two-sided 0.05, equal looks: tables of Reboussin et al. (Controlled Clinical Trials 21,
    2000).
    """
    thirds, fifths = (1 / 3, 2 / 3, 1.0), (0.2, 0.4, 0.6, 0.8, 1.0)
    assert boundaries(thirds, 0.025) == pytest.approx((2.2794, 2.2949, 2.2960), abs=6e-4)
    assert boundaries(fifths, 0.025) == pytest.approx(
        (2.4380, 2.4268, 2.4101, 2.3966, 2.3859), abs=6e-4
    )
    assert boundaries((1.0,), 0.025) == pytest.approx((1.95996,), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.025, 0.05])
def test_each_look_spends_its_error_by_scipy_s_integral(alpha):
    """The chance to stay below all boundaries up to a look is one integral of a normal density, of
    correlations sqrt(t / u).
    """
    fractions = np.array([1 / 3, 0.6, 1.0])
    limits = boundaries(tuple(fractions), alpha)
    for count in (1, 2, 3):
        t = fractions[:count]
        correlation = np.sqrt(np.minimum.outer(t, t) / np.maximum.outer(t, t))
        below = stats.multivariate_normal.cdf(
            limits[:count], np.zeros(count), correlation, abseps=1e-8, releps=1e-8
        )
        assert 1 - below == pytest.approx(spent(t, alpha)[-1], abs=2e-6)
    assert spent(np.ones(1), alpha)[0] == pytest.approx(alpha)


def test_one_look_is_student_s_interval_and_two_one_sided_tests():
    x = np.random.default_rng(0).normal(0.1, 1.0, 12)
    wanted = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert repeated_interval(x, (12,), 0.05) == pytest.approx(tuple(wanted)) and wanted.low < 0
    for margin in (0.1, 0.3, 0.5, 0.7, 1.0, 2.0):
        tests = [
            stats.ttest_1samp(x, bound, alternative=side).pvalue
            for bound, side in ((-margin, "greater"), (margin, "less"))
        ]
        assert (decide(x, (12,), margin).verdict == EQUIVALENT) == (max(tests) < 0.05)


def test_decisions_by_hand():
    early = decide([5.0, 5.1, 4.9], LOOKS, MARGIN)
    assert (early.verdict, early.seeds) == (OPEN, 0)  # no look yet
    early = decide([5.0, 5.1, 4.9, 5.0, -90.0], LOOKS, MARGIN)
    assert (early.verdict, early.seeds, early.mean) == (HOLDS, 4, pytest.approx(5.0))
    assert decide([-5.0, -5.1, -4.9, -5.0], LOOKS, MARGIN).verdict == FAILS
    assert decide([0.2, 0.21, 0.19, 0.2], LOOKS, MARGIN).verdict == HOLDS  # small, and certain
    assert decide([0.2, -0.21, 0.19, -0.2], LOOKS, MARGIN).verdict == EQUIVALENT
    assert decide([0.0] * 4, LOOKS, MARGIN).verdict == EQUIVALENT
    wide = decide([1.0, -3.0, 4.0, 2.0] * 3, LOOKS, MARGIN)
    assert (wide.verdict, wide.seeds) == (OPEN, 12) and wide.low < 0 < wide.high


def normal(rng):
    """Paired differences of one study, in points: what a seed does to both variants is gone."""
    return rng.normal(0, DEVIATION, LOOKS[-1])


def jumps(rng):
    """Of runs of which every seventh leaves a plateau early, 4 points higher."""
    a, b = rng.normal(0, 0.5, (2, LOOKS[-1])) + 4 * (rng.random((2, LOOKS[-1])) < 5 / 36)
    return a - b


def shares(draw, effect, seed, studies):
    """Of each verdict."""
    rng = np.random.default_rng(seed)
    verdicts = [decide(draw(rng) + effect, LOOKS, MARGIN).verdict for _ in range(studies)]
    return {name: verdicts.count(name) / studies for name in (HOLDS, FAILS, EQUIVALENT, OPEN)}


MANY = pytest.param(20_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("studies", [700, MANY])
@pytest.mark.parametrize("draw", [normal, jumps])
def test_error_of_the_whole_procedure(draw, studies):
    """Without a difference 5% end as one, at the margin 5% as none; within the simulation's own
    error.
    """
    chance = 2 * np.sqrt(0.05 * 0.95 / studies)
    nothing = shares(draw, 0.0, 1, studies)
    assert nothing[HOLDS] + nothing[FAILS] <= 0.05 + chance
    for seed, effect in enumerate((MARGIN, -MARGIN), 2):
        assert shares(draw, effect, seed, studies)[EQUIVALENT] <= 0.05 + chance


@pytest.mark.parametrize("studies", [700, MANY])
def test_power(studies):
    """One look at 12 seeds finds 1.07 points with 80%; four looks, three of which may end as
    equivalent before, find it with 65% and 1.2 with 75%. Equal variants end as equivalent.
    """
    chance = 3 * np.sqrt(0.65 * 0.35 / studies)
    assert shares(normal, 1.07, 4, studies)[HOLDS] == pytest.approx(0.65, abs=chance)
    assert shares(normal, 1.2, 5, studies)[HOLDS] == pytest.approx(0.75, abs=chance)
    assert shares(normal, 0.0, 6, studies)[EQUIVALENT] == pytest.approx(0.92, abs=chance)
