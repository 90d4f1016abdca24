"""COCO's tokens and METEOR through the task, against pycocoevalcap called by itself."""

import random

import pytest

from evlm_jax.evals.scorers import captions
from evlm_jax.evals.tasks.captions import score
from tests.evals.test_text_metrics import AWKWARD, VOCABULARY

SAID = ["A man's bike, on the road.", "", "two-wheeled 3.5 km!", "红苹果", "Line\nbreak don't"]
GIVEN = [
    ["a man rides his bike", "A bike on a road."],
    ["nothing"],
    ["3.5 km two wheels"],
    ["红苹果"],
    ["no line break"],
]


def noisy(count: int) -> tuple[list[str], list[list[str]]]:
    """Captions and their 1 to 5 references, shuffled, repeated and awkward, behind those above."""
    rng, said, given = random.Random(0), list(SAID), list(GIVEN)
    for i in range(count - len(SAID)):
        base = rng.choices(
            [*VOCABULARY, "Bike,", "(a", "b)", "isn't", "12%", "U.S."], k=rng.randint(1, 12)
        )
        given.append(
            [
                " ".join(base),
                *(" ".join(rng.sample(base, len(base))) + "." for _ in range(rng.randint(0, 4))),
            ]
        )
        said.append(
            AWKWARD[i % len(AWKWARD)]
            if i % 10 == 0
            else " ".join(rng.choices(base, k=rng.randint(1, 12)))
        )
    return said, given


@pytest.mark.slow
def test_scores_are_pycocoevalcap_s():
    if not captions.has_java():
        pytest.skip(
            "needs Java and pycocoevalcap: apt install default-jre-headless, pip install -e"
            " '.[test]'"
        )
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenize(groups):
        return PTBTokenizer().tokenize(
            {i: [{"caption": text} for text in g] for i, g in enumerate(groups)}
        )

    said, given = noisy(600)
    res, gts = tokenize([[text] for text in said]), tokenize(given)
    scores = score([{"prediction": text, "answer": right} for text, right in zip(said, given)])
    assert scores.whole["METEOR (coco)"] == pytest.approx(100 * Meteor().compute_score(gts, res)[0])
    assert scores.each["CIDEr (coco)"] == pytest.approx(
        list(100 * Cider().compute_score(gts, res)[1])
    )
    assert scores.each["CIDEr (words)"] != scores.each["CIDEr (coco)"]
    assert {name.split(" (")[0] for name in scores.whole} == {
        "BLEU-1",
        "BLEU-2",
        "BLEU-3",
        "BLEU-4",
        "METEOR",
    }
