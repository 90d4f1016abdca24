"""Figures of the pilot, from made runs whose slope, deviation and best tap are known."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import pilot
from evlm_jax.ablate import finished
from evlm_jax.ablate.budget import FLOPS, QUESTIONS
from evlm_jax.ablate.study import load_study, saved
from experiments import scenes_study

STUDY = load_study("experiments/scenes_study.py")
LEVEL = {"base": 1.0, "tap-2": 1.3, "tap-8": 1.1, "tap-11": 1.2, "tap-last": 1.4}
SEEDS, QUESTION_COUNT = 4, 200


def run(variant, seed):
    """Losses of one value; for each 0.1 nats 5 points fewer are exact."""
    cuts = {name: {"step": 40, "questions": 400, "flops": 1e9} for name in (QUESTIONS, FLOPS)}
    readings = {}
    for step in STUDY.steps(40):
        nats = LEVEL[variant] + 0.02 * (seed if variant == "base" else 0) + 0.002 * (40 - step)
        right = 100.0 * (np.arange(QUESTION_COUNT) < QUESTION_COUNT * (1.2 - nats / 2))
        measured = {}
        for family in STUDY.primary.families:
            measured[f"scenes, {family}/loss"] = finished.pack([nats] * QUESTION_COUNT)
            measured[f"scenes, {family}/greedy"] = finished.pack(right)
        clusters = {f"scenes, {name}": [1] * QUESTION_COUNT for name in STUDY.primary.families}
        readings[str(step)] = {"measured": measured, "clusters": clusters}
    settings = {"questions": 400, "limit": None, "base": {"name": "base"}} | saved(STUDY)
    about = dict(variant=variant, seed=seed, changes={}, trained=9, settings=settings)
    return about | {"budgets": cuts, "readings": readings}


def test_figures_by_hand(tmp_path):
    files = [
        finished.save(tmp_path / variant / str(seed) / "result.json", run(variant, seed))
        for variant in LEVEL
        for seed in range(2 if variant in ("tap-2", "tap-11") else SEEDS)
    ]
    written = pilot.page(pilot.PAGE.read_text("utf-8"), files)
    shown = dict(
        line.strip("| ").split(" | ") for line in written.splitlines() if line.count("|") == 3
    )
    slope = float(shown["points a nat"])
    assert slope == pytest.approx(50, abs=0.5)
    assert float(shown["margin: 1.5 points in nats"]) == pytest.approx(0.03, abs=5e-4)
    deviation = np.std([0.02 * seed for seed in range(SEEDS)], ddof=1)
    assert float(shown["its deviation between seeds, nats"]) == pytest.approx(deviation, abs=1e-4)
    assert shown["single tap of lowest loss"] == "tap-8"
    assert "| tap-8 | 4 | 1.120 ± 0.000 |" in written
    assert pilot.page(written, files) == written  # once more: the same


def test_the_smallest_difference_is_found_as_often_as_said():
    """By Student's tests of made studies; 12 seeds with a deviation of 1.2 find 1.07."""
    assert 1.2 * pilot.smallest(12) == pytest.approx(1.07, abs=0.005)
    assert 1.2 * pilot.smallest(8) == pytest.approx(1.4, abs=0.02)
    made = np.random.default_rng(0).normal(pilot.smallest(12), 1.0, (4000, 12))
    found = stats.ttest_1samp(made, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_margin_and_tap_are_the_pilot_s():
    """As the page has them; and there are six claims and a control."""
    page, declared = pilot.PAGE.read_text(), scenes_study.get_study()
    assert f"| margin: 1.5 points in nats | {scenes_study.MARGIN} |" in page
    assert f"| single tap of lowest loss | {scenes_study.BEST_TAP} |" in page
    assert declared["margin"] == scenes_study.MARGIN and len(declared["claims"]) == 7
    named = {name for claim in declared["claims"] for name in (claim["better"], *claim["than"])}
    assert named <= scenes_study.VARIANTS.keys()
