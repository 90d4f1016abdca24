"""result.json of a finished run: small, the same when it comes back, and read in any format."""

import copy
import json

import numpy as np
import pytest

from evlm_jax.ablate import collect, finished
from evlm_jax.evals import results

SIZES, NAMES = [3, 1, 5, 2, 4], [1] * 12


@pytest.fixture
def run():
    """A finished run as `evlm ablate` has it in memory, its clusters still in the readings."""
    rng = np.random.default_rng(0)

    def reading():
        return {
            "measured": {
                "easy-vqa-choice/accuracy": finished.pack(100.0 * (rng.random(15) < 0.5)),
                "emoji/loss": finished.pack(rng.normal(5, 1, 12)),
                "emoji/CIDEr (words)": finished.pack(7.0 * (np.arange(12) == 4)),
            },
            "clusters": {"easy-vqa-choice": SIZES, "emoji": NAMES},
            "loss": 0.5,
            "step_seconds": 2.0,
            "peak_bytes": 2**30,
            "weights_sha256": "0" * 64,
            "device": "1 x cpu, 2 CPU cores",
        }

    def cut(step):
        return {"step": step, "questions": 9 * step, "flops": 1e9 * step}

    return {
        "variant": "base",
        "seed": 0,
        "changes": {"vit.taps": [4]},
        "trained": 99,
        "settings": {"questions": 90, "limit": None, "base": {"name": "base", "llm": {"mlp": 4}}},
        "budgets": {"questions": cut(10), "flops": cut(12)},
        "readings": {"10": reading(), "12": reading()},
    }


def test_a_run_comes_back_from_any_format(run, tmp_path):
    """The former form spelled everything out; both give the same, and so do tables of them."""
    former = copy.deepcopy(run)
    for reading in former["readings"].values():
        reading["scores"] = {"emoji": [{"metric": "loss", "value": 5.0}]}
        reading["measured"]["emoji/CIDEr (words)"] = [0.0] * 4 + [7.0] + [0.0] * 7
    old = tmp_path / "old.json"
    old.write_text(json.dumps(former, indent=1))
    new = finished.save(tmp_path / "new.json", run)
    a, b = finished.load(old), finished.load(new)
    assert a["clusters"] == b["clusters"] == {"easy-vqa-choice": SIZES, "emoji": NAMES}
    assert a.keys() == b.keys() == {*finished.PARTS, "clusters"}
    assert finished.load(finished.save(tmp_path / "again.json", b)) == b
    table = collect.table(collect.collect([old, new]))
    assert table == collect.table(collect.collect([new, new])) and "base" in table
    assert results.load(new)["format"] == finished.FORMAT


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"format": finished.FORMAT + 1}, "of format 2, this version reads 0 to 1: update"),
        ({"format": None}, "of format None"),
        ({"clusters": None}, "not what `evlm ablate` writes"),
        ({"clusters": {"emoji": {"questions": 12}}}, "not what `evlm ablate` writes"),
        ({"readings": {"10": {"measured": {"emoji/loss": [1.0]}}}}, "1 outcomes of 12 questions"),
        ({"readings": {"10": {"measured": {"emoji/loss": "AA=="}}}}, "no outcomes of 12"),
        ({"readings": {"10": {"measured": {"emoji/loss": {"12": 1.0}}}}}, "out of bounds"),
    ],
)
def test_what_is_no_finished_run_is_refused(run, tmp_path, wrong, said):
    file = finished.save(tmp_path / "result.json", run)
    results.save(file, results.load(file) | wrong)
    with pytest.raises(ValueError, match=f"result.json: .*{said}"):
        finished.load(file)


def test_what_lacks_a_part_is_refused(tmp_path):
    file = results.save(tmp_path / "result.json", {"variant": "base", "seed": 0})
    with pytest.raises(ValueError, match="not a finished run .*: no changes, trained, settings"):
        finished.load(file)


def test_each_saved_run_is_small():
    """Those that docs/results.md is written from: a line a part, and none spelled out."""
    from benchmarks.results import RUNS

    files = sorted(RUNS.glob("*/*/result.json"))
    assert files
    for file in files:
        text = file.read_text("utf-8")
        assert text.count("\n") <= 70 and len(text) < 16_000, file
        assert results.load(file)["format"] == finished.FORMAT
