"""Predictions survive kills: nothing is asked twice, and the result is the one of a run that was
not cut off.
"""

import json

import pytest

from evlm_jax.data.samples import ImageRef
from evlm_jax.evals import score, tasks
from evlm_jax.evals.judge import Judge
from evlm_jax.evals.runner import evaluate
from evlm_jax.evals.task import Question, draw

TASK = tasks.find("easy-vqa")
ABOUT = {"weights_sha256": "ab", "size": (2, 3)}


def ask(count=10):
    """Questions about five images; the answers are yes and no in turn."""

    def picture(i):
        return ((ImageRef(f"{i % 5}.png"),),)

    return [
        Question(str(i), f"is it {i}?", picture(i), ["yes", "no"][i % 2], str(i % 5))
        for i in range(count)
    ]


class Answers:
    """Says yes; is killed when it is asked for the time `die`."""

    method, tokens, chunk = "greedy", 16, 3

    def __init__(self, die=None):
        self.asked, self.die, self.calls = [], die, 0

    def order(self, asked):
        return (asked.cluster,)

    def __call__(self, questions):
        self.calls += 1
        if self.calls == self.die:
            raise KeyboardInterrupt
        self.asked.append([q.id for q in questions])
        return [{"prediction": f"Yes. 是 {q.id}"} for q in questions]


@pytest.mark.parametrize("die", [1, 2, 4])
def test_a_killed_run_goes_on_and_asks_nothing_twice(die, tmp_path):
    log, whole, cut, rest = tmp_path / "r.jsonl", Answers(), Answers(die), Answers()
    expected = evaluate(TASK, ask(), whole, ABOUT, tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        evaluate(TASK, ask(), cut, ABOUT, log)
    with log.open("a") as file:
        file.write('{"id": "9", "predic')  # a line that was cut
    assert evaluate(TASK, ask(), rest, ABOUT, log) == expected
    assert cut.asked + rest.asked == whole.asked  # the same chunks as well
    again = Answers()
    assert evaluate(TASK, ask(), again, ABOUT, log) == expected and again.asked == []
    assert log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [row["id"] for row in expected["examples"]] == [q.id for q in ask()]


def test_more_questions_keep_the_answers_of_fewer(tmp_path):
    log, few, more = tmp_path / "r.jsonl", Answers(), Answers()
    evaluate(TASK, ask(4), few, ABOUT, log)
    result = evaluate(TASK, ask(10), more, ABOUT, log)
    assert (
        sorted(sum(few.asked + more.asked, [])) == [str(i) for i in range(10)]
        and len(result["examples"]) == 10
    )


def test_predictions_of_something_else_are_refused(tmp_path):
    log = tmp_path / "r.jsonl"
    evaluate(TASK, ask(), Answers(), ABOUT, log)
    with pytest.raises(
        ValueError,
        match=(
            "r.jsonl holds predictions of something else: weights_sha256 differ; give another --out"
        ),
    ):
        evaluate(TASK, ask(), Answers(), ABOUT | {"weights_sha256": "cd"}, log)
    changed = [Question(q.id, q.text + "!", q.visuals, q.answer, q.cluster) for q in ask()]
    with pytest.raises(
        ValueError, match=r"question 0 was answered with another prompt, 'is it 0\?'"
    ):
        evaluate(TASK, changed, Answers(), ABOUT, log)


def test_judgements_are_kept_too(tmp_path):
    task, log, prompts = tasks.find("video-captions"), tmp_path / "r.jsonl", []
    questions = [Question(str(i), "Describe.", (), f"known {i}", str(i)) for i in range(4)]

    def ask(prompt):
        prompts.append(prompt)
        if len(prompts) == 3:
            raise OSError("out of reach")
        return [
            "Verbosity: 4/10, accuracy: **7.5**",
            "no idea",
            "Verbosity: 11\nAccuracy: 2",
            "verbosity 6 accuracy 5",
        ][len(prompts) % 4]

    judge = Judge("one", ask)
    with pytest.raises(OSError):
        evaluate(task, questions, Answers(), ABOUT, log, judge)
    with pytest.raises(ValueError, match="judged by one before, not by two: ask that one"):
        evaluate(task, questions, Answers(), ABOUT, log, Judge("two", ask))
    answers = Answers()
    result = score.scored(evaluate(task, questions, answers, ABOUT, log, judge))
    assert {row["judge"] for row in result["examples"]} == {"one"}
    assert (
        answers.asked == []
        and len(prompts) == 5
        and "known 3" in prompts[-1]
        and "Yes. 是 3" in prompts[-1]
    )
    assert {
        row["metric"]: row["value"] for row in result["scores"] if row["metric"] != "verbosity"
    } == {
        "accuracy": pytest.approx((2 + 7.5) / 2),
        "not judged": 0,
        "unreadable replies": 3,
    }
    unjudged = score.scored(evaluate(task, questions, answers, ABOUT, tmp_path / "other.jsonl"))
    assert [(row["metric"], row["value"]) for row in unjudged["scores"]] == [
        ("not judged", 4),
        ("unreadable replies", 0),
    ]


def test_log_is_readable(tmp_path):
    evaluate(TASK, ask(2), Answers(), ABOUT, tmp_path / "r.jsonl")
    head, *lines = map(json.loads, (tmp_path / "r.jsonl").read_text("utf-8").splitlines())
    assert head == {
        "task": "easy-vqa",
        "method": "greedy",
        "max_new_tokens": 16,
        "weights_sha256": "ab",
        "size": [2, 3],
    }
    assert lines[0] == {"id": "0", "prompt": "is it 0?", "prediction": "Yes. 是 0"}


@pytest.mark.parametrize("line", ["[]", "5", "half", '{"prediction": "x"}', '{"id": "0"}'])
def test_a_log_of_something_else_is_named(tmp_path, line):
    evaluate(TASK, ask(2), Answers(), ABOUT, tmp_path / "r.jsonl")
    head, *_ = (tmp_path / "r.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "r.jsonl").write_text(f"{head}\n{line}\n")
    with pytest.raises(ValueError, match=r"r.jsonl: (line 2 is )?no prediction"):
        evaluate(TASK, ask(2), Answers(), ABOUT, tmp_path / "r.jsonl")


def test_draw_is_seeded_and_without_repeats():
    drawn = draw(ask(100), 30, seed=1)
    assert drawn == draw(ask(100), 30, seed=1) != draw(ask(100), 30, seed=2)
    assert len({q.id for q in drawn}) == 30 and draw(ask(100), 1000) == ask(100)
