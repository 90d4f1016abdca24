"""Scorers of letters and of rotations against lmms-eval's task functions."""

import random

import pytest

from evlm_jax.evals.scorers import choices
from evlm_jax.evals.tasks import mmbench
from tests.evals.predicted import COUNT, NEED, OPTIONS, lmms
from tests.evals.predicted import said as said


def test_scienceqa_letters(said):
    theirs = lmms("tasks.scienceqa.utils").sqa_process_results
    for text in said:
        for i, name in enumerate("ABCDE"):
            expected = theirs({"choices": list("vwxyz"), "answer": i}, [text])["exact_match"]
            assert float(choices.letter(text, OPTIONS, "scienceqa") == name) == expected, text


def test_ai2d_letters(said):
    theirs = lmms("tasks.ai2d.utils").MultiChoiceRegexFilter(
        regex_pattern=r"([A-Z])\.", group_select=0
    )
    match = lmms("api.metrics").exact_match_hf_evaluate
    for text, filtered in zip(said, theirs.apply([[text] for text in said], [{}] * COUNT)):
        for name in "ABCD":
            expected = match([filtered], [name], ignore_case=True, ignore_punctuation=True)[
                "exact_match"
            ]
            assert float(choices.letter(text, OPTIONS, "ai2d") == name) == expected, text


def test_mmbench_letters(said):
    theirs = lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    extract = lmms("tasks._task_utils.mcq_extract").extract_mcq_answer
    found = [theirs.can_infer(text, dict(OPTIONS)) or "" for text in said]
    assert [choices.letter(text, OPTIONS, "mmbench") for text in said] == found
    assert [choices.guess(text, "ABCD") for text in said] == [
        extract(text, list("ABCD")) for text in said
    ]
    assert 0.1 < sum(map(bool, found)) / COUNT < 0.9


def test_circular_eval(said):
    pandas = pytest.importorskip("pandas", reason=NEED)
    theirs = lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    rng, rows = random.Random(4), []
    for i, text in enumerate(said):
        for turn in range(rng.randint(1, 3)):
            truth = rng.choice("ABCD")
            prediction = rng.choice(
                [text, truth, truth, truth, f"{truth}. {OPTIONS[truth]}", OPTIONS[truth]]
            )
            rows.append(
                {
                    "index": i + turn * choices.ROTATION,
                    "answer": truth,
                    "prediction": prediction,
                    "category": "x",
                }
                | OPTIONS
            )
    rng.shuffle(rows)
    overall, *_ = theirs.eval_result(rows, "static")
    right = [
        choices.letter(row["prediction"], OPTIONS, "mmbench-static") == row["answer"]
        for row in rows
    ]
    hits = [
        hit for hit in choices.circular(right, [row["index"] for row in rows]) if hit is not None
    ]
    assert (
        len(hits) == COUNT
        and sum(hits) / COUNT == pytest.approx(overall, abs=1e-12)
        and 0.2 < overall < 0.8
    )
    assert pandas.DataFrame(rows)["index"].is_unique
    with pytest.raises(ValueError, match="question 5 has rotations but no first round"):
        choices.circular([True], [5 + choices.ROTATION])


def test_circular_eval_with_a_judge(said):
    """Both ask the same judge, who always names an option."""
    theirs, rng, rows = (
        lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator(),
        random.Random(7),
        [],
    )
    for i, text in enumerate(said):
        for turn in range(rng.randint(1, 2)):
            row = {
                "index": i + turn * choices.ROTATION,
                "answer": rng.choice("ABCD"),
                "prediction": text,
                "category": "x",
                "question": "?",
            }
            rows.append(
                row
                | {
                    "reply": rng.choice(
                        [f"{row['answer']}.", row["answer"], f"({rng.choice('ABCD')})"]
                    )
                }
            )
    table = [row | OPTIONS for row in rows]
    theirs.extract_answer_from_item = lambda item: (
        theirs.can_infer(item["reply"], dict(OPTIONS)),
        item["reply"],
    )
    overall, *_ = theirs.eval_result(table, "openai")
    ours = [row | {"options": OPTIONS} for row in rows]
    waiting = mmbench.score(ours)
    assert (
        "circular (judge)" not in waiting.each
        and waiting.whole["not judged"] == sum(bool(mmbench.judge(row)) for row in ours) > 100
    )
    judged = mmbench.score(
        [row | ({"judgement": row["reply"]} if mmbench.judge(row) else {}) for row in ours]
    )
    hits = [hit for hit in judged.each["circular (judge)"] if hit is not None]
    assert (
        sum(hits) / COUNT == pytest.approx(100 * overall, abs=1e-9)
        and 0.1 < overall < 0.9
        and judged.whole["not judged"] == 0
    )
