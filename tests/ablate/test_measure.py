"""Losses of right answers by family: of all questions about a picture at once as of each alone."""

import numpy as np
import pytest
from PIL import Image

from evlm_jax.ablate import finished
from evlm_jax.ablate.measure import measure
from evlm_jax.ablate.study import Measure, Study, Task
from evlm_jax.data.samples import MARKER, ImageRef, Sample, question
from evlm_jax.evals import choice, task, tasks
from evlm_jax.evals.tasks.demo import from_samples
from evlm_jax.runs import Trained
from tests.data.made import TOKENIZER
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

NATS = Measure("made/loss", "nats", -1, ("colour", "text"))
ASKED = (("colour", "what colour?", "blue"), ("text/word", "what is written?", "a word"))


@pytest.fixture
def samples(tmp_path):
    """Three pictures; of the last one question."""
    rng, made = np.random.default_rng(0), []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        labels, *dialogs = zip(*ASKED[: 1 + (i < 2)])
        said = tuple(question(MARKER + q, a) for q, a in zip(*dialogs))
        made.append(Sample(str(i), "made", ((ImageRef(str(path)),),), said, labels=labels))
    return made


@pytest.mark.ci
def test_losses_by_family(samples, tmp_path, monkeypatch):
    made = task.Task(
        "made", lambda *_: from_samples(samples), lambda rows: None, ("test",), data=False
    )
    monkeypatch.setitem(tasks.TASKS, "made", made)
    cfg = tiny_config(
        llm=dict(vocab=TOKENIZER.vocab_size),
        data=dict(template="plain", length=96, images=2, targets=32, block_pairs=24),
    )
    model = random_model(cfg, 0)
    study = Study(tested="", tasks=(Task("made"),), measures=(NATS,), claims=())
    found = measure(study, None, Trained(model, TOKENIZER, {}), tmp_path, "0")
    assert found["clusters"] == {"made, colour": [1, 1, 1], "made, text": [1, 1]}
    for number, (label, *_) in enumerate(ASKED):
        alone = [
            Sample(s.key, "made", s.visuals, s.dialogs[number : number + 1])
            for s in samples
            if len(s.dialogs) > number
        ]
        wanted = choice.answer_losses(model, TOKENIZER, alone)
        name = f"made, {label.partition('/')[0]}"
        for metric, values in zip(("loss", "greedy"), zip(*wanted)):
            packed = found["measured"][f"{name}/{metric}"]
            np.testing.assert_allclose(
                finished.unpack(packed, len(alone)),
                np.concatenate(values) * (100 if metric == "greedy" else 1),
                atol=2e-4,
            )
    few = measure(study, 1, Trained(model, TOKENIZER, {}), tmp_path, "0")
    assert few["clusters"] == {"made, colour": [1], "made, text": [1]}  # a picture's stay together
