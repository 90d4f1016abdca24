"""Adapters: where they stand, that they begin as nothing, what a run of them trains and keeps, and
the model that they are merged into.
"""

import dataclasses
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax import cli
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.initialize import begin_with, initialize
from evlm_jax.config.load import load_config
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.convert.merge import merge_run
from evlm_jax.launch import next_stage
from evlm_jax.loss import loss_sums
from evlm_jax.models.decode_weights import Weights
from evlm_jax.models.lora import is_adapter
from evlm_jax.models.param_names import flatten, unflatten
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.parallel.status import Stopped
from evlm_jax.phase import TrainPhase
from evlm_jax.train import train
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model, shapes
from tests.helpers.tiny import TinyData, tiny_batch, tiny_config

PATTERNS = (r"^llm/layers/\d+/(attn/[qv]|mlp/down)/", "^xattn/.*/(k|ffn/fc2)/", "^vit/.*/attn/o/")
LORA = {"patterns": PATTERNS, "rank": 3, "alpha": 6.0}
ADAPTERS_ALONE = ({"pattern": "/lora_", "lr": 1.0}, {"pattern": "", "lr": None})
CFG = tiny_config(
    lora=LORA,
    optim={"phases": ({"rules": ADAPTERS_ALONE},), "lr": 1e-2},
    train={"steps": 12, "save_every": 4, "keep": 9, "remat": "dots"},
)
STEP = 4  # where a run is cut


def adapters(names):
    return {name for name in names if is_adapter(name)}


def test_they_stand_beside_the_kernels_that_patterns_choose():
    sizes = parameter_shapes(CFG)
    kernels = {n for n in sizes if n.endswith("/kernel") and any(re.search(p, n) for p in PATTERNS)}
    assert len(kernels) == 4 * 3 + 4 * 2 + 4
    assert adapters(sizes) == {
        kernel.replace("/kernel", part) for kernel in kernels for part in ("/lora_a", "/lora_b")
    }
    for name in kernels:
        (before, behind), place = sizes[name], name.removesuffix("/kernel")
        assert sizes[f"{place}/lora_a"] == (before, 3) and sizes[f"{place}/lora_b"] == (3, behind)
    assert sizes.keys() - adapters(sizes) == parameter_shapes(CFG.merged).keys()


@pytest.mark.parametrize(
    "patterns, sections, error",
    [
        (("attn/x/",), {}, "has 'attn/x/', which is found in the name of no matrix"),
        (("^llm/",), {}, "choose llm/embed, which is no projection of a layer and cannot be"),
        (("head",), {"llm": {"tied": False}}, "choose llm/head/kernel, which is no projection"),
        (("^vit/patch",), {}, "choose vit/patch/kernel, which is no projection"),
        (("router",), {"moe": {"copies": 2}}, "choose xattn/0/ffn/router/kernel, which is no"),
        (("experts/fc1",), {"moe": {"copies": 2}}, "choose xattn/0/ffn/experts/fc1/kernel, which"),
        (("layers/1/attn/q",), {}, "llm/layers/1/attn/q/kernel and not .*: its layers are one"),
        (("^vit/blocks/0/attn/q",), {}, "vit/blocks/0/attn/q/kernel and not .*: let vit.cuts sep"),
        (("^vit/.*/fc1",), {"data": {"cache_features": True}}, "set data.cache_features=False"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(patterns, sections, error):
    with pytest.raises(ValueError, match=f"^config: lora.patterns.*{error}"):
        parameter_shapes(tiny_config(lora={"patterns": patterns}, **sections))


def test_cuts_let_some_blocks_of_the_tower_be_adapted():
    cfg = tiny_config(lora={"patterns": ("^vit/blocks/0/attn/q",)}, vit={"cuts": (1,)})
    assert adapters(parameter_shapes(cfg)) == {f"vit/blocks/0/attn/q/lora_{x}" for x in "ab"}


def test_the_command_line_sets_a_section_that_experiments_leave_out(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("from experiments.demo import get_config\n")
    made = load_config(str(config), ["--config.lora.patterns=('attn/q/',)", "--config.lora.rank=2"])
    assert made.lora == dataclasses.replace(CFG.lora, patterns=("attn/q/",), rank=2, alpha=16.0)


# ------------------------------------------------------------------------------------- computation


def by_hand(cfg, params):
    """Parameters without adapters, whose products are added to the kernels in float64."""
    out = {name: np.asarray(array) for name, array in params.items() if not is_adapter(name)}
    for name in filter(lambda name: name.endswith("/lora_a"), params):
        place = name.removesuffix("/lora_a")
        a, b = (np.asarray(params[f"{place}/lora_{x}"], np.float64) for x in "ab")
        out[f"{place}/kernel"] = (out[f"{place}/kernel"] + 6.0 / 3 * a @ b).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def models():
    """(random model with open gates and adapters that are not 0, the same merged by hand)."""
    model = random_model(CFG, 1)
    graphdef, state = shapes(CFG.merged)
    params = by_hand(CFG, flatten(CFG, nnx.state(model)))
    return model, nnx.merge(graphdef, unflatten(CFG.merged, params, state))


def test_the_model_computes_what_the_merged_one_does(models):
    batch = tiny_batch(CFG, 0)

    @jax.jit
    def logits(model):
        with jax.default_matmul_precision("highest"):
            return model.logits(model.hidden(batch))

    ours, theirs = (np.asarray(logits(model)) for model in models)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - logits(random_model(CFG.merged, 1))).max() > 0.1


def test_decoding_has_merged_matrices(models):
    ours, theirs = (jax.tree.leaves(Weights.of(model, "float32")) for model in models)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run without adapters, of a model with open gates, and its parameters."""
    folder = tmp_path_factory.mktemp("base")
    run_directory(folder, CFG.merged, random_model(CFG.merged, 0))
    return folder, store.load_params(folder)[0]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs from `base` with adapters: one that nothing interrupts, one that was cut at STEP and
    went on; and what that had then.
    """
    params, trained = next_stage(CFG, str(base[0]))
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "cut")]
    batch = tiny_batch(CFG, 5)

    def data():
        return TinyData(CFG, change=lambda *_: batch)

    def stop(step, _):
        if step == STEP:
            os.kill(os.getpid(), signal.SIGTERM)

    train(CFG, folders[0], data(), params, trained)
    with pytest.raises(Stopped):
        train(CFG, folders[1], data(), params, trained, on_step=stop)
    at = store.read(folders[1])
    train(CFG, folders[1], data(), {})
    return *folders, at


@pytest.mark.ci
def test_a_checkpoint_holds_the_adapters_alone_and_the_base_keeps_its_bits(base, runs):
    last = store.read(runs[0])
    assert last.params.keys() == adapters(parameter_shapes(CFG))
    assert last.frozen.keys() == base[1].keys()
    for name, array in base[1].items():
        assert last.frozen[name].tobytes() == array.tobytes(), name
    assert all(np.any(array) for array in last.params.values())


@pytest.mark.ci
def test_a_resumed_run_trains_the_same_set_to_the_same_bits(runs):
    whole, resumed, at = store.read(runs[0]), store.read(runs[1]), runs[2]
    assert at.meta["step"] == STEP and resumed.meta["step"] == CFG.train.steps
    counts = [sum(a.size for a in snapshot.params.values()) for snapshot in (at, resumed, whole)]
    assert len(set(counts)) == 1 and counts[0] > 0
    assert at.meta["trained"] == resumed.meta["trained"] == whole.meta["trained"]
    for part in ("params", "groups"):
        mine, other = getattr(resumed, part), getattr(whole, part)
        assert mine.keys() == other.keys()
        assert all(mine[name].tobytes() == other[name].tobytes() for name in mine)


def loss(cfg, params):
    graphdef, state = shapes(cfg)
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, unflatten(cfg, params, state)))
    total, sums = jax.jit(loss_sums, static_argnums=2)(model, tiny_batch(CFG, 5), 2)
    return float(total / sums["count"].sum())


@pytest.mark.ci
def test_it_begins_as_the_base_and_learns(base, runs):
    phase = TrainPhase(CFG, 0, make_layout(CFG))
    tensors = begin_with(CFG, phase.shapes, base[1], frozenset(base[1]))
    new = initialize(CFG, phase.shapes, phase.place, tensors)
    begun = {name: np.asarray(array) for name, array in flatten(CFG, new).items()}
    assert not any(np.any(begun[name]) for name in begun if name.endswith("lora_b"))
    drawn = [begun[n].ravel() * len(begun[n]) ** 0.5 for n in begun if n.endswith("lora_a")]
    drawn = np.concatenate(drawn)
    assert np.abs(drawn).max() <= 1 and abs(drawn.std() - 3**-0.5) < 0.02  # as PEFT: uniform
    before = loss(CFG.merged, base[1])
    assert loss(CFG, begun) == before
    assert loss(CFG, store.load_params(runs[0])[0]) < before - 0.05


@pytest.mark.ci
def test_merged_by_the_command(runs, tmp_path):
    out = str(tmp_path / "merged")
    assert not cli.main(["convert", "merge", "--checkpoint", str(runs[0]), "--out", out])
    params, before = store.load_params(runs[0])
    found, cfg = store.load_params(out)
    assert cfg == before.merged
    want = by_hand(cfg, params)
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)
    assert abs(loss(cfg, found) - loss(before, params)) <= 1e-5
    kernels = {name for name in want if not np.array_equal(want[name], params[name])}
    assert kernels <= store.trained(out)  # a later stage keeps their dtype
    with pytest.raises(ValueError, match="has no adapters: there is nothing to merge"):
        merge_run(out, str(tmp_path / "again"))


@pytest.mark.ci
def test_a_stage_takes_up_adapters_or_refuses(runs, base):
    more = dataclasses.replace(CFG.lora, patterns=(*PATTERNS, "^llm/.*/attn/k/"))
    wider = dataclasses.replace(CFG, lora=more)
    params, trained = next_stage(wider, str(runs[0]))
    phase = TrainPhase(wider, 0, make_layout(wider))
    tensors = begin_with(wider, phase.shapes, params, trained)
    begun = flatten(wider, initialize(wider, phase.shapes, phase.place, tensors))
    for name in adapters(params):
        assert np.asarray(begun[name]).tobytes() == params[name].read().tobytes()
    assert adapters(begun) - adapters(params) == {
        f"llm/layers/{i}/attn/k/lora_{x}" for i in range(4) for x in "ab"
    }
    with pytest.raises(ValueError, match="lora_a, for which the config has no place: give its lor"):
        next_stage(CFG.merged, str(runs[0]))
    with pytest.raises(ValueError, match="alpha / lora.rank = 2, the config has 1"):
        other = dataclasses.replace(CFG.lora, alpha=3.0)
        next_stage(dataclasses.replace(CFG, lora=other), str(runs[0]))


def test_adapters_that_nothing_trains_are_refused(base, tmp_path):
    cfg = tiny_config(lora=LORA)  # whose rules freeze the towers
    with pytest.raises(ValueError, match="no rule trains llm/layers/0/attn/q/lora_a, which begins"):
        train(cfg, tmp_path, TinyData(cfg), dict(base[1]))
