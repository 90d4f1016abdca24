"""Scores of a result with errors, the paper's rows, and paired comparisons against brute force."""

import numpy as np
import pytest
from scipy import stats

from evlm_jax.evals import score
from evlm_jax.evals.statistics import clustered_error


def result(predictions, answers=None, task="easy-vqa", **row):
    """A result on questions about images of two questions each."""
    answers = answers or ["yes"] * len(predictions)
    rows = [
        {"id": str(i), "cluster": str(i // 2), "answer": a, "prediction": p} | row
        for i, (p, a) in enumerate(zip(predictions, answers))
    ]
    return {"task": task, "examples": rows}


def test_scores_have_clustered_errors():
    rng = np.random.default_rng(0)
    predictions = [
        text for text in rng.choice(["yes", "no"], 100) for _ in range(2)
    ]  # both questions about an image alike
    scored = score.scored(result(predictions))["scores"][0]
    share = np.mean([p == "yes" for p in predictions])
    assert (scored["value"], scored["count"], scored["clusters"]) == (
        pytest.approx(100 * share),
        200,
        100,
    )
    assert scored["error"] == pytest.approx(
        100 * np.sqrt(share * (1 - share) / 99), rel=1e-6
    )  # of 100 images, not 200 questions
    assert score.scored(result(["yes", "no"]))["scores"][0]["error"] is None  # one image


def test_table_shows_the_paper_s_rows():
    mme = score.scored(result(["yes", "no"] * 2, ["yes", "no"] * 2, "mme", category="OCR"))
    lines = {line.split("  ")[0]: line.split() for line in score.table(mme).splitlines()}
    assert lines["metric"][-3:] == ["EVLM-Base", "EVLM-Chat", "EVLM-MoE"]
    assert lines["perception"] == [
        "perception",
        "200.00",
        "-",
        "4",
        "1579.00",
        "1593.56",
        "1607.00",
    ]
    assert lines["OCR"][-3:] == ["-", "-", "-"]
    blind = score.scored(result(["yes"], [None], "vqav2"))
    assert blind["scores"] == [] and "1 predictions are saved" in score.table(blind)


def test_paired_comparison():
    rng = np.random.default_rng(1)
    a, b = (rng.choice(["yes", "no"], 400, p=[p, 1 - p]).tolist() for p in (0.5, 0.65))
    (found,) = [row for row in score.compare(result(a), result(b)) if row["metric"] == "accuracy"]
    difference = 100 * ((np.array(b) == "yes") * 1.0 - (np.array(a) == "yes"))
    assert found["difference"] == pytest.approx(difference.mean()) and found["b"] - found[
        "a"
    ] == pytest.approx(found["difference"])
    images = difference.reshape(-1, 2).mean(1)
    draws = [rng.choice(images, len(images)).mean() for _ in range(4000)]  # bootstrap over images
    assert found["error"] == pytest.approx(np.std(draws), rel=0.1)
    flipped = images * rng.choice([-1, 1], (4000, len(images)))  # sign flips
    assert found["p"] == pytest.approx(
        np.mean(abs(flipped.mean(1)) >= abs(images.mean())), abs=0.01
    )
    same = score.compare(result(a), result(a))[0]
    assert (same["difference"], same["error"], same["p"]) == (0, 0, 1)
    assert score.comparison_table([found]).splitlines()[1].split()[0] == "accuracy"


def test_three_clusters_are_few():
    """Where nothing differs, p below 0.05 comes in 5% of all cases;
    by the normal law it was 21%.
    """
    rng = np.random.default_rng(2)
    drawn = (
        rng.standard_normal((4000, 3, 40)).mean(-1, keepdims=True).repeat(40, -1).reshape(4000, 120)
    )  # questions of a cluster are alike
    clusters = np.repeat(np.arange(3), 40)
    found = [score._p(values.mean(), clustered_error(values, clusters), 2) for values in drawn]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.012)
    assert stats.ttest_1samp(drawn[0, ::40], 0).pvalue == pytest.approx(found[0])


def test_a_difference_that_is_the_same_everywhere_is_sure():
    (found,) = [
        row
        for row in score.compare(result(["no"] * 6), result(["yes"] * 6))
        if row["metric"] == "accuracy"
    ]
    assert (found["difference"], found["p"]) == (100, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b | {"task": "pope"}, "not of the same task: easy-vqa and pope"),
        (lambda b: b | {"split": "val"}, "not of the same split: test and val"),
        (lambda b: b | {"prompts": "llava"}, "not of the same prompts: lmms-eval and llava"),
        (lambda b: with_row(b, prompt="other"), "question 1 has another prompt, 'p' and 'other'"),
        (lambda b: with_row(b, answer="no"), "question 1 has another true answer, 'yes' and 'no'"),
        (lambda b: with_row(b, cluster="9"), "question 1 has another image, '0' and '9'"),
        (
            lambda b: with_row(b, judgement="x", judge="one"),
            r"not judged alike: by nobody and by \['one'\]",
        ),
    ],
)
def test_results_of_something_else_are_refused(change, message):
    a = result(["yes"] * 4, prompt="p") | {"split": "test", "prompts": "lmms-eval"}
    with pytest.raises(ValueError, match=message):
        score.compare(a, change(a))


def with_row(found, **changes):
    rows = [row | changes if row["id"] == "1" else row for row in found["examples"]]
    return found | {"examples": rows}


def test_replies_of_two_judges_are_not_averaged():
    judged = with_row(result(["yes"] * 4, judgement="a", judge="one"), judge="two")
    with pytest.raises(ValueError, match="judged by one and by two: let one judge all of them"):
        score.scored(judged)


def test_other_questions_are_refused():
    with pytest.raises(
        ValueError, match="not of the same questions: 2 only in the first, 0 only in the second"
    ):
        score.compare(result(["yes"] * 4), result(["yes"] * 2))
