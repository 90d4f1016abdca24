"""Intervals against closed forms, and results that survive the disk."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from evlm_jax.evals import results, statistics
from tests.helpers.tiny import tiny_config


def test_wilson_against_published_values():
    low, high = statistics.wilson(81, 263)  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    assert statistics.wilson(5, 5)[1] == pytest.approx(1.0)


def test_clustered_error():
    values = np.random.default_rng(0).random(200)
    assert statistics.clustered_error(values, range(200)) == pytest.approx(
        values.std(ddof=1) / np.sqrt(200)
    )
    repeated, clusters = (
        np.repeat(values, 5),
        np.repeat(np.arange(200), 5),
    )  # copies bring no information
    assert statistics.clustered_error(repeated, clusters) == pytest.approx(
        statistics.clustered_error(values, range(200))
    )
    assert np.isnan(statistics.clustered_error([1.0, 0.0], ["a", "a"]))


def test_paired_test_is_scipy_s():
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    assert statistics.paired_p(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (
        statistics.paired_p([1.0]) is None
        and statistics.paired_p([0.0, 0.0]) == 1.0
        and statistics.paired_p([2.0, 2.0]) == 0.0
    )


def test_interval_over_clusters_is_scipy_s_bootstrap():
    """One seed; clusters of one size, so that the mean over questions is that over clusters."""
    values = np.random.default_rng(0).normal(3.0, 1.0, 240)
    found = statistics.crossed_interval(values[None], [4] * 60)
    of_cluster = values.reshape(60, 4).mean(1)
    wanted = stats.bootstrap(
        (of_cluster,),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    np.testing.assert_allclose(found, wanted, atol=0.015)
    with pytest.raises(ValueError, match="240 questions, but clusters of 200"):
        statistics.crossed_interval(values[None], [4] * 50)


def test_interval_by_brute_force():
    """Each draw as the docstring tells it, one cluster and one seed after another."""
    rng = np.random.default_rng(3)
    values, sizes, draws = (
        rng.normal(0, 1, (3, 50)) + rng.normal(0, 0.5, (3, 1)),
        [5, 3, 12, 7, 1, 2, 6, 4, 8, 2],
        [],
    )
    clusters = np.split(np.arange(50), np.cumsum(sizes)[:-1])
    stretch = np.sqrt(3 / 2) * stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
    for _ in range(20_000):
        questions = np.concatenate([clusters[i] for i in rng.integers(10, size=10)])
        seeds = rng.integers(3, size=3)
        draws.append(values[:, questions].mean() + stretch * (values[seeds].mean() - values.mean()))
    np.testing.assert_allclose(
        statistics.crossed_interval(values, sizes), np.quantile(draws, (0.025, 0.975)), atol=0.04
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_holds_the_truth_as_often_as_it_says(seeds):
    """Chance of the seed, of the question, and of both; a plain bootstrap of three seeds would be
    right in three of four cases.
    """
    rng, right = np.random.default_rng(seeds), 0
    for _ in range(400):
        values = (
            rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 1, (seeds, 60)) + rng.normal(0, 2, (1, 60))
        )
        low, high = statistics.crossed_interval(values, [3] * 20)
        right += low <= 0 <= high
    assert 0.92 <= right / 400 <= 0.99


def test_accuracy_table():
    examples = [
        {"image": i // 2, "answer": a, "correct": c}
        for i, (a, c) in enumerate([("yes", 1), ("yes", 0), ("no", 1), ("blue", 1)])
    ]
    types = {"yes / no": ("yes", "no"), "colour": ("red", "blue"), "shape": ("circle",)}
    every, binary, colour = statistics.accuracy_table(examples, types)
    assert (every["count"], every["accuracy"], every["majority"], every["majority_answer"]) == (
        4,
        0.75,
        0.5,
        "yes",
    )
    assert (binary["accuracy"], binary["majority"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (colour["accuracy"], colour["error"]) == (1.0, None) and colour["interval"][0] < 0.3


def test_weights_hash_sees_values_names_and_shapes_but_not_order():
    a, b = np.arange(6.0).reshape(2, 3), jnp.ones(3)
    same = results.weights_hash({"a": a, "b": b})
    assert same == results.weights_hash({"b": np.ones(3, np.float32), "a": a})
    others = [
        {"a": a + 1, "b": b},
        {"c": a, "b": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.astype(np.float32), "b": b},
    ]
    assert len({same, *map(results.weights_hash, others)}) == 5


def test_save_and_load(tmp_path):
    cfg = tiny_config()
    scores = {"accuracy": np.float32(0.5), "curve": jnp.arange(3)}
    result = {
        "scores": scores,
        "text": "红苹果",
        "provenance": results.provenance(cfg, "ab", "step 8"),
    }
    path = results.save(tmp_path / "deep" / "r.json", result)
    back = results.load(path)
    assert back["scores"] == {"accuracy": 0.5, "curve": [0, 1, 2]} and back["text"] == "红苹果"
    assert back["provenance"]["config"]["llm"]["hidden"] == cfg.llm.hidden
    assert not list(tmp_path.rglob("*.part"))
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) < 30 and '"text":"红苹果",' in lines  # a part each
    with pytest.raises(ValueError, match=r"scores.bad\[1\] is nan"):
        results.save(path, {"scores": {"bad": [1.0, float("nan")]}})
    assert results.load(path) == back
