"""What the demo asks, where not all of its assets could be fetched, and its table by family."""

from types import SimpleNamespace

import pytest

from evlm_jax.asset_packages import AssetError
from evlm_jax.data.samples import ImageRef, Sample, Turn
from evlm_jax.demo import asked, command
from experiments import demo as experiment
from tests.helpers.scenes import needs_scenes


def test_sources_without_their_assets_are_left_out_and_told(monkeypatch, capsys):
    missing = ("emoji-hands-en", "scenes-zh")

    def opened(name):
        if name in missing:
            raise AssetError(f"asset of {name} is not there")
        return object()

    monkeypatch.setattr(command, "open_source", opened)
    config, cfg = experiment.get_config(), command.configured("")
    shares = dict(zip(config.data.sources, config.data.weights))
    assert dict(zip(cfg.data.sources, cfg.data.weights)) == {
        name: share for name, share in shares.items() if name not in missing
    }
    told = capsys.readouterr().err.splitlines()
    assert told == [f"left out: {n}: asset of {n} is not there" for n in shares if n in missing]


def test_benchmarks_without_their_assets_are_not_asked(monkeypatch, capsys):
    class Task:
        def __init__(self, name):
            self.name = name

        def questions(self, data, split):
            if (self.name, split) == ("scenes", "style"):
                raise AssetError("no new hand")
            return [asked.Question(f"{self.name}-{i}", "?", (), "yes", str(i)) for i in range(9)]

    monkeypatch.setattr(asked.tasks, "find", Task)
    found = asked.questions({"vqa": 5, "greedy": 3})
    assert found.keys() == asked.RESULTS.keys() - {"style"}
    assert len(found["vqa"]) == 5 and len(found["greedy"]) == 3 and len(found["known"]) == 9
    assert {q.id for q in found["greedy"]} <= {q.id for q in found["vqa"]}
    assert capsys.readouterr().err == "left out: style: no new hand\n"


def test_what_is_asked_of_training_data_are_questions(monkeypatch):
    def opened(name):
        said = (Turn("assistant", "<image>A cat."),)
        asked = (Turn("user", "<image>What is it?"), Turn("assistant", "cat"))
        dialogs = {"captions": (said,), "both": (said, asked)}[name]
        return [Sample(f"{name}-1", name, ((ImageRef("cat.png"),),), dialogs)]

    monkeypatch.setattr(asked, "open_source", opened)
    monkeypatch.setattr(asked.report, "sources_section", lambda examples, refs: examples)
    cfg = SimpleNamespace(data=SimpleNamespace(sources=("captions", "both")))
    (example,) = asked.taught(cfg, lambda questions: [{"prediction": "Cat"} for _ in questions])
    assert example["source"] == "both" and example["question"] == "What is it?"
    assert example["correct"]


def result(shares: dict[str, float]) -> dict:
    """Scores and examples: of each kind of question ten."""
    rows = [{"label": label, "answer": str(i % 5)} for label in shares for i in range(10)]
    scores = [{"metric": f"accuracy, {label}", "value": 100 * v} for label, v in shares.items()]
    return {"examples": rows, "scores": scores}


@needs_scenes
def test_families_count_alike_in_the_mean():
    held_out = {"name": 0.5, "count": 0.4, "colour": 0.9, "text/digit": 0.8, "text/word": 0.2}
    held_out |= {"where/place": 0.7, "where/which": 0.9}
    table = asked.family_rows(
        {"held out": result(held_out), "known": result(held_out | {"name": 1.0})},
        result(dict.fromkeys(held_out, 0.1)),
    )
    by_kind = {row["kind"]: row for row in table}
    assert list(by_kind) == [*sorted(held_out), "mean"]
    assert by_kind["name"]["held out"] == 0.5 and by_kind["name"]["known"] == 1.0
    assert by_kind["count"]["chance"] == pytest.approx(1 / 6)
    assert by_kind["where/which"]["chance"] == 0.5 and by_kind["text/word"]["chance"] == 0.05
    assert all(row["majority"] == 0.2 and row["style"] is None for row in table)
    mean = by_kind["mean"]
    assert mean["held out"] == pytest.approx((0.5 + 0.4 + 0.9 + 0.5 + 0.8) / 5)
    assert mean["known"] - mean["held out"] == pytest.approx(0.1)
    assert mean["guessed"] == pytest.approx(0.1)
