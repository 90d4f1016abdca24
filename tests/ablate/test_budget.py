"""Where a run is read: what was planned is what the batches of training hold."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from evlm_jax import assets
from evlm_jax.ablate.budget import FLOPS, QUESTIONS, budgets, course
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.pipeline import batches
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.metrics import work
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from tests.helpers.checkpoints import tokenizer_directory
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config

pytestmark = [needs_asset("easy-vqa"), pytest.mark.ci]


@pytest.fixture(params=[False, True], ids=["pixels", "cached"])
def cfg(request, tmp_path):
    """Two lanes of easy-vqa at a constant rate."""
    data = dict(
        sources=("easy-vqa",),
        weights=(1.0,),
        template="plain",
        length=600,
        images=3,
        targets=200,
        block_pairs=90,
    )
    init = dict(vision="", llm=str(tokenizer_directory(tmp_path / "tokenizer")))
    return tiny_config(
        data=data | {"cache_features": request.param}, init=init, optim=dict(lr=1e-3, min_lr=1e-3)
    )


def test_the_course_is_that_of_training(cfg, tmp_path):
    """Questions are counted from easy-vqa's own file, FLOPs from the batches that training gets."""
    asked = Counter(
        str(row[2])
        for row in json.loads((assets.path("easy-vqa") / "train" / "questions.json").read_text())
    )

    def zeros(pixels):
        return np.zeros((len(pixels), len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width))

    features = FeatureStore(tmp_path / "features", zeros, cfg) if cfg.data.cache_features else None
    data, trained = (
        batches(cfg, load_tokenizer(cfg.init.llm), features),
        TrainPhase(cfg, 0, make_layout(cfg)).trained,
    )
    questions, flops = 0, 0.0
    for step, cut in zip(range(1, 7), course(cfg)):
        batch, info = next(data)
        questions += sum(
            asked[key.removeprefix("easy-vqa/")] for row in info["keys"] for key in row
        )
        flops += work(cfg, batch, info, trained)["flops"]
        assert cut == (step, questions, pytest.approx(flops, rel=1e-12))
    data.close()


def test_budgets(cfg):
    same = budgets(cfg, cfg, 300)
    assert same[QUESTIONS] == same[FLOPS] and same[QUESTIONS].questions >= 300
    dear = replace(cfg, xattn=replace(cfg.xattn, heads=16, ffn=512))
    cuts = budgets(cfg, dear, 300)
    reached = [cut for _, cut in zip(range(cuts[QUESTIONS].step), course(dear))]
    assert reached[-1] == cuts[QUESTIONS] and reached[-1].questions >= 300 > reached[-2].questions
    assert (
        1 < cuts[FLOPS].step < cuts[QUESTIONS].step
        and reached[cuts[FLOPS].step - 1].flops >= same[QUESTIONS].flops
    )
    assert reached[cuts[FLOPS].step - 2].flops < same[QUESTIONS].flops


def test_a_rate_that_falls_is_refused():
    with pytest.raises(ValueError, match="set optim.min_lr = optim.lr"):
        budgets(tiny_config(), tiny_config(), 100)
