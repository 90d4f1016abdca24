"""Choosing by lowest loss equals scoring every candidate alone, by brute force."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import MARKER, ImageRef, Sample, question
from evlm_jax.data.text import score_document
from evlm_jax.evals import choice
from evlm_jax.loss import losses
from tests.data.made import TOKENIZER
from tests.random_model import random_model
from tests.tiny import tiny_config

TYPES = {"yes / no": ("yes", "no"), "colour": ("red", "reddish", "blue")}  # "red" begins "reddish"
CANDIDATES = ["yes", "no", "red", "reddish", "blue"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Four images with 1 to 4 questions; two questions are the same."""
    image = pytest.importorskip("PIL.Image")
    folder, rng, made = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i in range(4):
        path = folder / f"{i}.png"
        image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        asked = [("is it red?", "yes"), ("what colour?", "blue"), ("is it red?", "no"), ("is it blue?", "no")][: i + 1]
        made.append(Sample(str(i), "test", ((ImageRef(str(path)),),), tuple(question(MARKER + q, a) for q, a in asked)))
    return made


@pytest.fixture(scope="module")
def model():
    cfg = tiny_config(llm=dict(vocab=TOKENIZER.vocab_size), data=dict(template="plain", length=96, images=2, targets=32, pairs=24))
    return random_model(cfg, 0)


@pytest.mark.parametrize("candidates", [CANDIDATES, ["yes", "no", "blue"]])
def test_equals_each_candidate_alone(samples, model, candidates):
    end = len(candidates) == 5
    assert choice.needs_end(TOKENIZER, candidates, model.cfg) == end
    together = choice.candidate_losses(model, TOKENIZER, samples, candidates)
    alone = []
    for sample in samples:
        for dialog in sample.dialogs:
            each = [replace(sample, dialogs=(question(dialog[0].text, answer),)) for answer in candidates]
            alone += [score_document(one, TOKENIZER, model.cfg, end=end) for one in each]
    expected = np.zeros(len(alone))
    for batch, document, _ in rows_in_order(alone, replace(model.cfg, data=replace(model.cfg.data, window=1)), 2):
        loss = np.asarray(jax.jit(losses)(model, batch), np.float64)
        np.add.at(expected, document[document >= 0], loss[document >= 0])
    np.testing.assert_allclose(np.concatenate(together).reshape(-1), expected, rtol=1e-5)
    assert np.concatenate(together).std() > 0.1


def test_evaluate_picks_the_lowest_and_counts_by_type(samples, model):
    result = choice.evaluate(model, TOKENIZER, samples, TYPES)
    assert [e["question"] for e in result["examples"][:3]] == ["is it red?", "is it red?", "what colour?"]
    for example in result["examples"]:
        assert example["prediction"] == CANDIDATES[int(np.argmin(example["losses"]))]
        assert example["correct"] == (example["prediction"] == example["answer"])
    rows = {row["type"]: row for row in result["accuracy"]}
    assert {kind: row["count"] for kind, row in rows.items()} == {"all": 10, "yes / no": 7, "colour": 3}
    assert rows["all"]["correct"] == sum(e["correct"] for e in result["examples"])


def test_candidates_of_equal_tokens_are_refused(model):
    with pytest.raises(ValueError, match="'no', 'no' are the same tokens"):
        choice.needs_end(TOKENIZER, ["yes", "no", "no"], model.cfg)
