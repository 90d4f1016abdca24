"""Every benchmark from small official files to scores."""

from pathlib import Path

import pytest

from evlm_jax.evals import score, tasks
from evlm_jax.evals.judge import Judge
from evlm_jax.evals.paper import PAPER
from evlm_jax.evals.runner import evaluate
from evlm_jax.evals.task import STYLES, first
from evlm_jax.evals.tasks import captions
from tests.evals import layouts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        captions, "has_java", lambda: False
    )  # it takes seconds; tests/evals/test_captions.py has it


class Told:
    """Answers with `say(question)`."""

    method, tokens, chunk = "told", 1, 3

    def __init__(self, say):
        self.say, self.seen = say, []

    def order(self, asked):
        return (asked.id,)

    def __call__(self, questions):
        self.seen += [q.id for q in questions]
        return [{"prediction": self.say(q), "ranking": [self.say(q)]} for q in questions]


def right(question):
    """A prediction that every rule takes for right."""
    answer = question.answer
    if isinstance(answer, list) and isinstance(answer[0], float):
        return str(answer)
    return answer if isinstance(answer, str) else answer[0]


def reply(prompt):
    return "Verbosity: 4\nAccuracy: 10" if "It grows brighter." in prompt else "Z"


@pytest.mark.parametrize("name", sorted(layouts.WRITERS))
def test_right_and_wrong_answers(name, tmp_path):
    task, data = tasks.find(name), layouts.write(name, tmp_path / "data")
    questions = task.questions(data, None)
    assert len(questions) > 1 and all(
        Path(visual[0].path).is_file() for q in questions for visual in q.visuals
    )
    good, bad = (
        score.scored(evaluate(task, questions, Told(say), {}, None, Judge("reply", reply)))
        for say in (right, lambda q: "人")
    )
    values = {row["metric"]: row["value"] for row in good["scores"]}
    main = next(iter(PAPER.get(name, values)))
    if name == "video-captions":
        assert values == {"verbosity": 4, "accuracy": 10, "not judged": 0, "unreadable replies": 0}
        return
    assert values[main] == (400 if name == "mme" else pytest.approx(100, abs=0.1)) and set(
        PAPER.get(name, {})
    ) <= set(values)
    assert {row["metric"]: row["value"] for row in bad["scores"]}[main] <= 50 and score.table(
        good
    ).count("\n") == len(good["scores"])


def test_every_task_has_a_layout_or_an_asset():
    assert {name for name, task in tasks.TASKS.items() if task.data} == set(layouts.WRITERS)
    assert all(
        len(Path(family.__file__).read_text().splitlines()) < 150 for family in tasks.FAMILIES
    )
    assert set(PAPER) <= set(tasks.TASKS)


@pytest.mark.parametrize("style", STYLES)
def test_prompts(style, tmp_path):
    """One of each kind, in full; tests/evals/test_prompts.py compares them with lmms-eval's."""
    text = {}
    for name in ("gqa", "scienceqa-img", "mmbench-cn", "ai2d", "refcoco", "coco", "classes"):
        text[name] = (
            tasks.find(name).questions(layouts.write(name, tmp_path / name), None, style)[-1].text
        )
        assert text[name].startswith("<image>\n") == (style == "llava")
        text[name] = text[name].removeprefix("<image>\n")
    lettered = "A. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert text["gqa"] == (
        "Is it red? Answer:"
        if style == "qwen-vl"
        else "Is it red?\nAnswer the question using a single word or phrase."
    )
    named = "Context: Look.\nQuestion: Which?\nOptions: A. cat\nB. dog\nAnswer:"
    assert text["scienceqa-img"] == (
        named if style == "qwen-vl" else f"Context: Look.\nWhich?\n{lettered}"
    )
    rotated = "Which?\nA. dog\nB. cat"
    assert (
        text["mmbench-cn"]
        == {
            "lmms-eval": (
                "Which? There are several options:\nA. dog\nB. cat\n\n"
                "请直接使用所提供的选项字母作为答案回答。"
            ),
            "llava": rotated + "\n请直接回答选项字母。",
            "qwen-vl": rotated + " Answer:",
        }[style]
    )
    assert text["classes"] == "What is in this image?" and ("ref" in text["refcoco"]) == (
        style == "qwen-vl"
    )


def test_limit_keeps_pairs_and_rotations(tmp_path):
    asked = tasks.find("mmbench-en").questions(layouts.write("mmbench-en", tmp_path), None)
    assert [q.id for q in first(asked, 1)] == ["0", "1000000"] and first(asked, None) == asked
    assert (
        len(first(tasks.find("mme").questions(layouts.write("mme", tmp_path / "mme"), None), 3))
        == 4
    )
