"""COCO's tokens and METEOR through the task, against pycocoevalcap called by itself."""

import pytest

from evlm_jax.evals.scorers import captions
from evlm_jax.evals.tasks.captions import score

SAID = ["A man's bike, on the road.", "", "two-wheeled 3.5 km!", "红苹果", "Line\nbreak don't"]
GIVEN = [["a man rides his bike", "A bike on a road."], ["nothing"], ["3.5 km two wheels"], ["红苹果"], ["no line break"]]


@pytest.mark.slow
def test_scores_are_pycocoevalcap_s():
    if not captions.has_java():
        pytest.skip("needs Java and pycocoevalcap: apt install default-jre-headless, pip install -e '.[test]'")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = lambda groups: PTBTokenizer().tokenize({i: [{"caption": text} for text in g] for i, g in enumerate(groups)})
    res, gts = tokenize([[text] for text in SAID]), tokenize(GIVEN)
    scores = score([{"prediction": text, "answer": given} for text, given in zip(SAID, GIVEN)])
    assert scores.whole["METEOR (coco)"] == pytest.approx(100 * Meteor().compute_score(gts, res)[0])
    assert scores.each["CIDEr (coco)"] == pytest.approx(list(100 * Cider().compute_score(gts, res)[1]))
    assert scores.each["CIDEr (words)"] != scores.each["CIDEr (coco)"]
    assert {name.split(" (")[0] for name in scores.whole} == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR"}
