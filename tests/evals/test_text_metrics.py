"""Scorers against pycocoevalcap and rouge-score on 600 noisy captions, awkward ones included."""

import random

import numpy as np
import pytest

from evlm_jax.evals import text_metrics as tm

VOCABULARY = (
    "a the red blue cat dog on of with sitting table man's two-wheeled bike 3.5 yes no".split()
)
AWKWARD = ["", "Yes.", "12%", "no no no no no", "红苹果", "A man's bike!", "...", "naïve café"]


@pytest.fixture(scope="module")
def captions():
    """600 token lists and their 1 to 5 references: shuffled, shortened, repeated, equal, and the
    awkward strings.
    """
    rng = random.Random(0)
    predictions, references = [], []
    for i in range(600):
        base = rng.choices(VOCABULARY, k=rng.randint(1, 12))
        refs = [base] + [
            rng.sample(base, len(base))[: rng.randint(1, 12)] for _ in range(rng.randint(0, 4))
        ]
        text = (
            AWKWARD[i // 10 % len(AWKWARD)]
            if i % 10 == 0
            else " ".join(rng.choices(base, k=rng.randint(1, 12)) if i % 3 else base)
        )
        predictions.append(tm.words(text))
        references.append([tm.words(" ".join(r)) for r in refs])
    return predictions, references


@pytest.fixture(scope="module")
def coco(captions):
    """The same captions as pycocoevalcap wants them."""
    predictions, references = captions
    res = {i: [" ".join(p)] for i, p in enumerate(predictions)}
    return {i: [" ".join(r) for r in refs] for i, refs in enumerate(references)}, res


def test_cider_equals_pycocoevalcap(captions, coco):
    oracle = pytest.importorskip(
        "pycocoevalcap.cider.cider", reason="needs pycocoevalcap: pip install -e '.[test]'"
    )
    mean, each = oracle.Cider().compute_score(*coco)
    ours = tm.cider(*captions)
    np.testing.assert_allclose(ours, each, atol=1e-9)
    assert np.mean(ours) == pytest.approx(mean) and mean > 0.5


def test_bleu_equals_pycocoevalcap(captions, coco):
    oracle = pytest.importorskip(
        "pycocoevalcap.bleu.bleu", reason="needs pycocoevalcap: pip install -e '.[test]'"
    )
    expected, _ = oracle.Bleu(4).compute_score(*coco, verbose=0)
    np.testing.assert_allclose(tm.bleu(*captions), expected, rtol=1e-9)


def test_bleu_brevity_penalty_equals_pycocoevalcap():
    oracle = pytest.importorskip(
        "pycocoevalcap.bleu.bleu", reason="needs pycocoevalcap: pip install -e '.[test]'"
    )
    expected, _ = oracle.Bleu(4).compute_score(
        {0: ["a red cat on the table", "a cat"]}, {0: ["red cat on the"]}, verbose=0
    )
    ours = tm.bleu(
        ["red cat on the".split()], [["a red cat on the table".split(), "a cat".split()]]
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_rouge_l_equals_pycocoevalcap(captions, coco):
    oracle = pytest.importorskip(
        "pycocoevalcap.rouge.rouge", reason="needs pycocoevalcap: pip install -e '.[test]'"
    )
    _, each = oracle.Rouge().compute_score(*coco)
    np.testing.assert_allclose(tm.rouge_l(*captions), each, rtol=1e-12)


def test_rouge_l_with_beta_one_equals_rouge_score(captions):
    oracle = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="needs rouge-score: pip install -e '.[test]'"
    )
    scorer = oracle.RougeScorer(
        ["rougeL"], tokenizer=type("Split", (), {"tokenize": lambda self, text: text.split()})()
    )
    predictions, references = captions
    first = [refs[:1] for refs in references]
    expected = [
        scorer.score(" ".join(r[0]), " ".join(p))["rougeL"].fmeasure
        for p, r in zip(predictions, first)
    ]
    np.testing.assert_allclose(tm.rouge_l(predictions, first, beta=1.0), expected, rtol=1e-12)


def test_words():
    assert tm.words("A man\u2019s 2-wheeled bike, 3.5 km.") == [
        "a",
        "man",
        "'s",
        "2-wheeled",
        "bike",
        "3.5",
        "km",
    ]
    assert tm.words("红苹果 apple") == ["红", "苹", "果", "apple"]
    assert tm.words("  ?! ") == []


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 predictions for 2"):
        tm.exact_match([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="prediction 0 has no reference"):
        tm.cider([["a"]], [[]])


@pytest.mark.parametrize("language", ["13a", "zh"])
def test_bleu_equals_sacrebleu(language):
    """One reference each, on the same tokens; those of Chinese are characters on both sides."""
    oracle = pytest.importorskip("sacrebleu", reason="needs sacrebleu: pip install -e '.[lmms]'")
    rng = random.Random(6)
    letters = "红苹果猫狗坐在桌子上" if language == "zh" else VOCABULARY
    joint = "" if language == "zh" else " "
    references = [[rng.choice(letters) for _ in range(rng.randint(5, 12))] for _ in range(600)]
    said = [[token for token in tokens if rng.random() < 0.9] or ["a"] for tokens in references]
    said, references = ([joint.join(tokens) for tokens in group] for group in (said, references))
    if language == "zh":

        def tokens(text):
            return tm.words(text)
    else:

        def tokens(text):
            return text.split()

    ours = tm.bleu([tokens(text) for text in said], [[tokens(text)] for text in references])
    cut = {"tokenize": "zh"} if language == "zh" else {"tokenize": "none"}
    theirs = oracle.corpus_bleu(said, [references], smooth_method="none", **cut)
    assert 100 * ours[3] == pytest.approx(theirs.score, rel=1e-6) and 20 < theirs.score < 90
