"""Each baseline on the demo's weights and data, by the demo's configuration with at most three
fields changed.
"""

import json

import numpy as np
import pytest
from flax import nnx

from evlm_jax.config import from_config_dict
from evlm_jax.data.samples import MARKER, Turn
from evlm_jax.evals import tasks
from evlm_jax.evals.answer import LowestLoss
from evlm_jax.evals.tasks.demo import ANSWERS
from evlm_jax.generate import Generator
from evlm_jax.launch import train_run
from evlm_jax.models import param_names
from evlm_jax.runs import features_of, load_trained
from experiments import demo
from tests.helpers.parity import needs_asset

CHANGES = {
    "fused": {"bridge.kind": "fused"},
    "flamingo": {"bridge.kind": "flamingo", "media.tokens": 1},
    "llava": {"bridge.kind": "llava", "xattn.every": 0, "media.tokens": 64},
    "text only": {"xattn.every": 0},
}


@pytest.mark.slow
@needs_asset("smollm2-135m-instruct")
@needs_asset("dinov2-small")
@needs_asset("easy-vqa")
@pytest.mark.parametrize("kind", CHANGES)
def test_trains_on_the_demo(kind, tmp_path):
    """A few steps: the loss falls; the checkpoint has the model's bits; it generates, and chooses
    by loss.
    """
    config = demo.get_config("fast")
    config.update_from_flattened_dict(CHANGES[kind])
    config.optim.warmup, config.train.log_every = 2, 1
    assert train_run(from_config_dict(config), str(tmp_path)) == config.train.steps
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    print(f"\n{kind}: {np.round(losses, 3)}")
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3

    trained = load_trained(str(tmp_path))
    restored = param_names.flatten(trained.model.cfg, nnx.state(trained.model))
    assert all(
        np.asarray(restored[name]).tobytes() == array.tobytes()
        for name, array in trained.params.items()
    )
    asked, features = tasks.find("easy-vqa").questions(None, None)[:4], features_of(trained)
    generator = Generator(trained.model, trained.tokenizer, features=features.get)
    prompts = [
        generator.prompt([Turn("user", MARKER + question.text)], question.visuals)
        for question in asked
    ]
    assert [len(answer.tokens) for answer in generator.generate(prompts, 4, stop=())] == [4] * 4
    assert {
        row["prediction"]
        for row in LowestLoss(trained.model, trained.tokenizer, ANSWERS, features)(asked)
    } <= set(ANSWERS)
