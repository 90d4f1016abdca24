"""Variants: at most three fields each, and all of them build."""

import jax
import pytest
from flax import nnx

from evlm_jax import optim
from evlm_jax.ablate import job
from evlm_jax.ablate.study import EASY_VQA
from evlm_jax.batch import Batch
from evlm_jax.config import from_config_dict
from evlm_jax.models.evlm import EVLM
from experiments import ablations

pytestmark = pytest.mark.ci


def config(variant):
    return from_config_dict(ablations.get_config(variant))


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_changes_at_most_three_fields_and_builds(variant):
    cfg = config(variant)
    changed = job.changes(config("base"), cfg)
    assert changed.keys() == ablations.VARIANTS[variant].keys() and len(changed) <= 3
    assert bool(changed) == (variant != "base")
    shapes = nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    assert optim.optimizer_plan(cfg, 0, shapes).rates
    batch = Batch.spec(cfg)
    assert (batch.taps is None) == (not cfg.data.cache_features)


@pytest.mark.parametrize(
    "variant",
    [
        "base",
        "every-4",
        "moe-top-8",
        "parallel",
        "fused",
        "flamingo",
        "llava",
        "text-only",
        "vit-upper-half",
    ],
)
def test_runs(variant):
    """Shapes only, of every kind of model there is among them."""
    cfg = config(variant)
    model, batch = nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))), Batch.spec(cfg)
    hidden = jax.eval_shape(lambda model, batch: model.hidden(batch), model, batch)
    assert hidden.shape == (*batch.tokens.shape, cfg.llm.hidden)


def test_claims_are_about_variants_that_exist():
    named = {name for claim in EASY_VQA.claims for name in (claim.better, *claim.than)}
    assert named <= ablations.VARIANTS.keys()


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="no variant 'nope'; there are base, taps-all"):
        ablations.get_config("nope")
