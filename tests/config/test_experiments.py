"""Every experiment of full size: published parameter counts, and rules that cover each parameter in
each phase and stage.
"""

import importlib
import math

import jax
import pytest
from flax import nnx

from evlm_jax import optim
from evlm_jax.config import from_config_dict
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import canonical
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase

STAGES = ("pretrain", "continual", "sft")
# Qwen-14B and EVA02-CLIP-E+ without norm and head: counted from the published shapes. Qwen2.5 and
# Qwen3: model.safetensors.index.json. CLIP-L: the 303,179,776 of CLIPVisionModel without its
# post_layernorm (2 x 1024). SigLIP so400m: the 428,225,600 of SiglipVisionModel without its
# post_layernorm and pooling head (15,240,656). Cross-attention of the 14B: the paper's 1.61 B,
# matrices only.
PUBLISHED = {
    "evlm_14b": {"vit/": 4_348_717_312, "llm/": 14_167_290_880},
    "evlm_7b": {"vit/": 303_177_728, "llm/": 7_615_616_512},
    "evlm_8b": {"vit/": 412_984_944, "llm/": 8_190_735_360},
    "evlm_1b": {"vit/": 303_177_728, "llm/": 494_032_768},
}
# Counted from config.json and code of mPLUG-Owl3-7B-240728: so400m without its last block, which is
# not read; Qwen2-7B with 151,851 rows of words instead of 152,064; a linear layer; keys and values
# of four layers, with biases; gates are apart.
OWL = {
    "vit/": 412_984_944 - 15_239_504,
    "llm/": 7_615_616_512 - 2 * (152_064 - 151_851) * 3584,
    "bridge/": 1152 * 3584 + 3584,
    "xattn/": 4 * 2 * (3584 * 512 + 512),
    "media/": 3584,
}


def config(name: str, stage: str = "pretrain"):
    """The experiment's config, checked."""
    return from_config_dict(importlib.import_module(f"experiments.{name}").get_config(stage))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    sizes = {path: math.prod(shape) for path, shape in parameter_shapes(config(name)).items()}

    def count(*parts):
        return sum(size for path, size in sizes.items() if path.startswith(parts))

    assert {part: count(part) for part in PUBLISHED[name]} == PUBLISHED[name]
    if name == "evlm_14b":  # the norms' 1 M more would round to 1.62
        assert (
            round(
                sum(
                    size
                    for path, size in sizes.items()
                    if path.startswith("xattn/") and path.endswith("kernel")
                )
                / 1e9,
                2,
            )
            == 1.61
        )


@pytest.mark.parametrize("form, gates", [("240728", 4 * (128 * 128 + 128)), ("241101", 0)])
def test_parameter_counts_of_mplug_owl3(form, gates):
    cfg = config("mplug_owl3", form)
    sizes = {path: math.prod(shape) for path, shape in parameter_shapes(cfg).items()}
    found = {part: sum(n for path, n in sizes.items() if path.startswith(part)) for part in OWL}
    assert found == OWL | {"xattn/": OWL["xattn/"] + gates}
    assert sum(found.values()) == sum(sizes.values())
    assert cfg.cross_layers == (1, 9, 17, 25)
    plan = optim.optimizer_plan(cfg, 0, nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0)))))
    assert {name.split("/")[0] for name in _names(cfg, plan)} == {"xattn", "bridge", "media"}


def test_parameters_of_the_experts():
    """The paper's 5.8 B of cross-attention, all of them trained."""
    cfg = config("evlm_14b", "moe")
    sizes = {
        path: math.prod(shape)
        for path, shape in parameter_shapes(cfg).items()
        if path.startswith("xattn/")
    }
    assert round(sum(sizes.values()) / 1e9, 1) == 5.8
    assert (cfg.name, cfg.train, cfg.optim) == (
        "evlm_14b_moe",
        config("evlm_14b", "sft").train,
        config("evlm_14b", "sft").optim,
    )
    plan = optim.optimizer_plan(cfg, 0, nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0)))))
    assert sizes.keys() <= _names(cfg, plan)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_trains(name, stage):
    cfg = config(name, stage)
    first = config(name).vit.image_size
    assert cfg.vit.image_size == (first if stage == "pretrain" else 2 * first)
    shapes = nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    *_, last = plans = [
        optim.optimizer_plan(cfg, phase, shapes) for phase in range(len(cfg.optim.phases))
    ]
    blocks = {
        int(name.split("/")[2]) for name in _names(cfg, last) if name.startswith("vit/blocks/")
    }
    depth = cfg.vit.depth
    first = depth - depth // 4 if stage == "sft" else depth // 2
    assert blocks == set(range(first, depth))
    assert len(plans) == (2 if stage == "pretrain" else 1)
    assert not any(name.startswith("llm/") for name in _names(cfg, last))
    if stage == "pretrain":
        assert all(name.startswith(("xattn/", "media/")) for name in _names(cfg, plans[0]))


@pytest.mark.parametrize("form, gib", [("adapters", 14), ("cross", 29)])
def test_what_one_card_holds_of_the_14b_in_4_bits(form, gib):
    """Between steps: parameters, and two moments of those that are trained."""
    cfg = config("evlm_14b_nf4", form)
    phase = TrainPhase(cfg, 0, make_layout(cfg))
    trained = {name.rpartition("/")[2] for name in _names(cfg, phase.plan)}
    assert {"lora_a", "lora_b", "embedding"} <= trained
    assert ("kernel" in trained) == (form == "cross")
    frozen = {p: jax.tree.leaves(leaf)[0] for p, leaf in nnx.to_flat_state(phase.frozen_spec())}
    assert {path[0] for path, leaf in frozen.items() if leaf.dtype == "uint8"} == {"vit", "llm"}
    held = [*frozen.values(), *jax.tree.leaves(phase.spec())]
    assert gib - 1 < sum(leaf.size * leaf.dtype.itemsize for leaf in held) / 2**30 < gib


def _names(cfg, plan) -> set[str]:
    return {name for path in plan.rates for name in canonical(cfg, path)}


def test_unknown_stage_is_named():
    with pytest.raises(ValueError, match="no stage 'finetune'; there are pretrain, continual, sft"):
        config("evlm_14b", "finetune")
