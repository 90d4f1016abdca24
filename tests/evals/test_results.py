"""Intervals against closed forms, and results that survive the disk."""

import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax.evals import results, statistics
from tests.tiny import tiny_config


def test_wilson_against_published_values():
    low, high = statistics.wilson(81, 263)  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    assert statistics.wilson(5, 5)[1] == pytest.approx(1.0)


def test_clustered_error():
    values = np.random.default_rng(0).random(200)
    assert statistics.clustered_error(values, range(200)) == pytest.approx(values.std(ddof=1) / np.sqrt(200))
    repeated, clusters = np.repeat(values, 5), np.repeat(np.arange(200), 5)  # copies bring no information
    assert statistics.clustered_error(repeated, clusters) == pytest.approx(statistics.clustered_error(values, range(200)))
    assert np.isnan(statistics.clustered_error([1.0, 0.0], ["a", "a"]))


def test_accuracy_table():
    examples = [{"image": i // 2, "answer": a, "correct": c} for i, (a, c) in enumerate([("yes", 1), ("yes", 0), ("no", 1), ("blue", 1)])]
    types = {"yes / no": ("yes", "no"), "colour": ("red", "blue"), "shape": ("circle",)}
    every, binary, colour = statistics.accuracy_table(examples, types)
    assert (every["count"], every["accuracy"], every["majority"], every["majority_answer"]) == (4, 0.75, 0.5, "yes")
    assert (binary["accuracy"], binary["majority"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (colour["accuracy"], colour["error"]) == (1.0, None) and colour["interval"][0] < 0.3


def test_weights_hash_sees_values_names_and_shapes_but_not_order():
    a, b = np.arange(6.0).reshape(2, 3), jnp.ones(3)
    same = results.weights_hash({"a": a, "b": b})
    assert same == results.weights_hash({"b": np.ones(3, np.float32), "a": a})
    others = [{"a": a + 1, "b": b}, {"c": a, "b": b}, {"a": a.reshape(3, 2), "b": b}, {"a": a.astype(np.float32), "b": b}]
    assert len({same, *map(results.weights_hash, others)}) == 5


def test_save_and_load(tmp_path):
    cfg = tiny_config()
    scores = {"accuracy": np.float32(0.5), "curve": jnp.arange(3)}
    result = {"scores": scores, "text": "红苹果", "provenance": results.provenance(cfg, "ab", "step 8")}
    path = results.save(tmp_path / "deep" / "r.json", result)
    back = results.load(path)
    assert back["scores"] == {"accuracy": 0.5, "curve": [0, 1, 2]} and back["text"] == "红苹果"
    assert back["provenance"]["config"]["llm"]["hidden"] == cfg.llm.hidden
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match=r"scores.bad\[1\] is nan"):
        results.save(path, {"scores": {"bad": [1.0, float("nan")]}})
    assert results.load(path) == back
