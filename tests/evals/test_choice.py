"""Choosing by lowest loss equals scoring every candidate alone, by brute force."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import MARKER, ImageRef, Sample, question
from evlm_jax.data.text import score_document
from evlm_jax.evals import choice
from evlm_jax.evals.answer import LowestLoss
from evlm_jax.evals.tasks.demo import from_samples
from evlm_jax.loss import losses
from tests.data.made import TOKENIZER
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

CANDIDATES = ["yes", "no", "red", "reddish", "blue"]  # "red" begins "reddish"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Four images with 1 to 4 questions; two questions are the same."""
    image = pytest.importorskip("PIL.Image")
    folder, rng, made = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i in range(4):
        path = folder / f"{i}.png"
        image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        asked = [
            ("is it red?", "yes"),
            ("what colour?", "blue"),
            ("is it red?", "no"),
            ("is it blue?", "no"),
        ][: i + 1]
        made.append(
            Sample(
                str(i),
                "test",
                ((ImageRef(str(path)),),),
                tuple(question(MARKER + q, a) for q, a in asked),
            )
        )
    return made


@pytest.fixture(scope="module")
def model():
    cfg = tiny_config(
        llm=dict(vocab=TOKENIZER.vocab_size),
        data=dict(template="plain", length=96, images=2, targets=32, block_pairs=24),
    )
    return random_model(cfg, 0)


@pytest.mark.parametrize("candidates", [CANDIDATES, ["yes", "no", "blue"]])
def test_equals_each_candidate_alone(samples, model, candidates):
    end = len(candidates) == 5
    assert choice.needs_end(TOKENIZER, candidates, model.cfg) == end
    together = choice.candidate_losses(model, TOKENIZER, samples, candidates)
    alone = []
    for sample in samples:
        for dialog in sample.dialogs:
            each = [
                replace(sample, dialogs=(question(dialog[0].text, answer),))
                for answer in candidates
            ]
            alone += [score_document(one, TOKENIZER, model.cfg, end=end) for one in each]
    expected = np.zeros(len(alone))
    for batch, document, _ in rows_in_order(
        alone, replace(model.cfg, data=replace(model.cfg.data, window=1)), 2
    ):
        loss = np.asarray(jax.jit(losses)(model, batch), np.float64)
        np.add.at(expected, document[document >= 0], loss[document >= 0])
    np.testing.assert_allclose(np.concatenate(together).reshape(-1), expected, rtol=1e-5)
    assert np.concatenate(together).std() > 0.1


def test_answers_are_the_candidates_of_lowest_loss(samples, model):
    asked = [
        q for turn in range(4) for q in from_samples(samples) if q.id.endswith(f"-{turn}")
    ]  # no image's questions are neighbours
    answers = LowestLoss(model, TOKENIZER, CANDIDATES)(asked)
    losses = dict(
        zip(
            (q.id for q in from_samples(samples)),
            np.concatenate(choice.candidate_losses(model, TOKENIZER, samples, CANDIDATES)),
        )
    )
    for question_, answer in zip(asked, answers, strict=True):
        best = np.argsort(losses[question_.id])
        assert (
            answer["ranking"] == [CANDIDATES[i] for i in best]
            and answer["prediction"] == answer["ranking"][0]
        )
        np.testing.assert_allclose(answer["losses"], np.sort(losses[question_.id]), atol=1e-3)
    assert len({tuple(answer["losses"]) for answer in answers}) > 5


def test_greedy_is_what_the_whole_forward_pass_likes_best(samples):
    cfg = tiny_config(
        llm=dict(vocab=TOKENIZER.vocab_size),
        data=dict(length=96, images=2, targets=32, block_pairs=24),
    )
    model = random_model(cfg, 5)  # it likes to say "z"
    letters = [chr(i) for i in range(32, 127)]
    asked = [
        replace(samples[0], dialogs=tuple(question(f"{MARKER}{n}?", letter) for letter in letters))
        for n in range(4)
    ]
    found = choice.answer_losses(model, TOKENIZER, asked, end=False)
    best = jax.jit(lambda model, batch: model.logits(model.hidden(batch)).argmax(-1))
    documents = [score_document(sample, TOKENIZER, model.cfg, end=False) for sample in asked]
    for batch, document, dialog in rows_in_order(
        documents, choice.fit_budget(model.cfg, documents), 1
    ):
        said = np.asarray(best(model, batch))[0][batch.target_positions[0]] == batch.targets[0]
        for d, number, right in zip(document[0], dialog[0], said):
            assert d < 0 or found[d][1][number] == right
    assert 0 < sum(greedy.any() for _, greedy in found) and all(
        greedy.sum() <= 1 for _, greedy in found
    )


def test_candidates_of_equal_tokens_are_refused(model):
    with pytest.raises(ValueError, match="'no', 'no' are the same tokens"):
        choice.needs_end(TOKENIZER, ["yes", "no", "no"], model.cfg)


def test_a_question_may_have_candidates_of_its_own(samples, model):
    """Each is chosen as if its candidates were all that there are, and the loss of the right one is
    told.
    """
    colours, words = ("red", "blue"), ("yes", "no")
    asked = [
        replace(q, candidates=colours if "what" in q.text else words) for q in from_samples(samples)
    ]
    found = LowestLoss(model, TOKENIZER, [])(asked)
    for candidates in (colours, words):
        own = [i for i, q in enumerate(asked) if q.candidates == candidates]
        alone = LowestLoss(model, TOKENIZER, candidates)(
            [replace(asked[i], candidates=()) for i in own]
        )
        for i, row in zip(own, alone, strict=True):
            loss = row["losses"][row["ranking"].index(asked[i].answer)]
            assert found[i] == row | {"loss": loss}
