"""Scores of a result with errors, the paper's rows, and paired comparisons against brute force."""

import numpy as np
import pytest

from evlm_jax.evals import score


def result(predictions, answers=None, task="easy-vqa", **row):
    """A result on questions about images of two questions each."""
    answers = answers or ["yes"] * len(predictions)
    rows = [
        {"id": str(i), "cluster": str(i // 2), "answer": a, "prediction": p} | row for i, (p, a) in enumerate(zip(predictions, answers))
    ]
    return {"task": task, "examples": rows}


def test_scores_have_clustered_errors():
    rng = np.random.default_rng(0)
    predictions = [text for text in rng.choice(["yes", "no"], 100) for _ in range(2)]  # both questions about an image alike
    scored = score.scored(result(predictions))["scores"][0]
    share = np.mean([p == "yes" for p in predictions])
    assert (scored["value"], scored["count"], scored["clusters"]) == (pytest.approx(100 * share), 200, 100)
    assert scored["error"] == pytest.approx(100 * np.sqrt(share * (1 - share) / 99), rel=1e-6)  # of 100 images, not 200 questions
    assert score.scored(result(["yes", "no"]))["scores"][0]["error"] is None  # one image


def test_table_shows_the_paper_s_rows():
    mme = score.scored(result(["yes", "no"] * 2, ["yes", "no"] * 2, "mme", category="OCR"))
    lines = {line.split("  ")[0]: line.split() for line in score.table(mme).splitlines()}
    assert lines["metric"][-3:] == ["EVLM-Base", "EVLM-Chat", "EVLM-MoE"]
    assert lines["perception"] == ["perception", "200.00", "-", "4", "1579.00", "1593.56", "1607.00"]
    assert lines["OCR"][-3:] == ["-", "-", "-"]
    blind = score.scored(result(["yes"], [None], "vqav2"))
    assert blind["scores"] == [] and "1 predictions are saved" in score.table(blind)


def test_paired_comparison():
    rng = np.random.default_rng(1)
    a, b = (rng.choice(["yes", "no"], 400, p=[p, 1 - p]).tolist() for p in (0.5, 0.65))
    (found,) = [row for row in score.compare(result(a), result(b)) if row["metric"] == "accuracy"]
    difference = 100 * ((np.array(b) == "yes") * 1.0 - (np.array(a) == "yes"))
    assert found["difference"] == pytest.approx(difference.mean()) and found["b"] - found["a"] == pytest.approx(found["difference"])
    images = difference.reshape(-1, 2).mean(1)
    draws = [rng.choice(images, len(images)).mean() for _ in range(4000)]  # bootstrap over images
    assert found["error"] == pytest.approx(np.std(draws), rel=0.1)
    flipped = images * rng.choice([-1, 1], (4000, len(images)))  # sign flips
    assert found["p"] == pytest.approx(np.mean(abs(flipped.mean(1)) >= abs(images.mean())), abs=0.01)
    same = score.compare(result(a), result(a))[0]
    assert (same["difference"], same["error"], same["p"]) == (0, 0, 1)
    assert score.comparison_table([found]).splitlines()[1].split()[0] == "accuracy"


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="not of the same questions: 2 only in the first, 0 only in the second"):
        score.compare(result(["yes"] * 4), result(["yes"] * 2))
