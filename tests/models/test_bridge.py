"""The baselines: a fused tap against NumPy; what each sees, trains and refuses."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from evlm_jax import optim
from evlm_jax.checkpoint import store
from evlm_jax.config import EVLMConfig, Rule
from evlm_jax.convert import engine, export, importer
from evlm_jax.convert.activations import look
from evlm_jax.launch import next_stage
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.planning import programs
from evlm_jax.train import train
from tests.helpers.checkpoints import run_directory
from tests.helpers.parity import relative
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, TinyData, tiny_batch, tiny_config, tiny_towers
from tests.models.test_evlm import hidden, repaint, row


def test_fused_equals_numpy_whatever_the_order_of_taps():
    cfg = tiny_config(**BASELINES["fused"])
    module, taps = (
        random_model(cfg, 0).bridge,
        np.random.default_rng(0).standard_normal((3, 2, 4, 5, cfg.vit.width)).astype(np.float32),
    )
    got = np.asarray(module(taps))
    normed = []
    for tap, scale, bias in zip(taps, module.norms.scale[...], module.norms.bias[...]):
        centred = tap - tap.mean(-1, keepdims=True)
        normed.append(
            centred
            / np.sqrt((centred**2).mean(-1, keepdims=True) + cfg.xattn.eps)
            * np.asarray(scale)
            + np.asarray(bias)
        )
    assert (
        relative(got[0], np.concatenate(normed, -1) @ np.asarray(module.proj.kernel[...])) <= 1e-5
    )

    order = np.array([2, 0, 1])
    module.norms.scale[...], module.norms.bias[...] = (
        module.norms.scale[...][order],
        module.norms.bias[...][order],
    )
    module.proj.kernel[...] = (
        module.proj.kernel[...]
        .reshape(3, cfg.vit.width, -1)[order]
        .reshape(module.proj.kernel.shape)
    )
    assert relative(np.asarray(module(taps[order])), got) <= 1e-6


def test_text_only_sees_nothing():
    cfg = tiny_config(**BASELINES["text only"])
    model, batch = random_model(cfg, 0), row(cfg, [[3, "i", 4], ["i", 5]])
    before = np.asarray(hidden(model, batch))
    assert (before == np.asarray(hidden(model, repaint(batch, 0)))).all()
    swapped = batch._replace(media_slot=np.where(batch.media_slot >= 0, 1 - batch.media_slot, -1))
    assert (before != np.asarray(hidden(model, swapped))).any(), "media embeddings are read"


ONE = {"placement": "parallel", "query": "shared", "gate": "softmax", "heads": 4, "sinks": 0}


@pytest.mark.parametrize(
    "kind",
    [
        "llava",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in BASELINES if kind != "llava"),
    ],
)
@pytest.mark.ci
def test_trains_saves_and_goes_on(kind, tmp_path):
    """Through train.py: the loss falls, what trains moves, what is frozen stays, and a run cut in
    the middle ends with the same bits.
    """
    sections = BASELINES[kind] | {
        "train": {"steps": 30, "save_every": 15},
        "optim": {"lr": 1e-2},
        "init": {"centre_norms": kind not in ("idefics", "mllama", "mplug_owl3")},
    }
    cfg = tiny_config(**sections)
    towers, one = tiny_towers(cfg), tiny_batch(cfg, 0)

    def data():
        return TinyData(cfg, change=lambda index, batch: one)

    train(cfg, tmp_path / "a", data(), towers)

    lines = [
        json.loads(line)["loss"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 30 and np.isfinite(lines).all() and lines[-1] < lines[0] - 0.05
    first, last = store.read(tmp_path / "a", 15), store.read(tmp_path / "a", 30)
    assert {name.split("/")[0] for name in last.params} == {
        path[0] for path, _ in nnx.to_flat_state(shapes_of(cfg))
    } - {"vit", "llm"}
    assert all(first.params[name].tobytes() != last.params[name].tobytes() for name in last.params)
    assert all(last.frozen[name].tobytes() == array.tobytes() for name, array in towers.items())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/steps/30")
    train(cfg, tmp_path / "b", data(), {})
    again = store.read(tmp_path / "b", 30)
    assert all(
        again.params[name].tobytes() == array.tobytes() for name, array in last.params.items()
    )


def shapes_of(cfg: EVLMConfig) -> nnx.State:
    """Of the whole model."""
    return nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))


@pytest.mark.parametrize("kind", BASELINES)
def test_names_lead_there_and_back(kind):
    cfg = tiny_config(**BASELINES[kind])
    state = nnx.state(random_model(cfg, 0))
    arrays = param_names.flatten(cfg, state)
    assert {name: array.shape for name, array in arrays.items()} == engine.parameter_shapes(cfg)
    for a, b in zip(
        jax.tree.leaves(state),
        jax.tree.leaves(param_names.unflatten(cfg, arrays, state)),
        strict=True,
    ):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.ci
def test_one_list_of_rules_serves_all_kinds():
    """A rule for what only EVLM has is no mistake in a baseline; a rule that decides nothing of
    EVLM either still is.
    """
    rules = tuple(
        dict(pattern=p, lr=r)
        for p, r in (
            ("^xattn/.*gate$", 15.0),
            (r"^xattn/\d+/o/", 3.0),
            ("^(xattn|media|bridge)/", 1.0),
        )
    )
    frozen = (dict(pattern="^(vit|llm)/", lr=None),)
    for sections in ({}, *BASELINES.values()):
        cfg = tiny_config(
            **sections | {"optim": {"phases": (dict(start=0.0, warmup=0, rules=rules + frozen),)}}
        )
        trained = {path[0] for path in optim.optimizer_plan(cfg, 0, shapes_of(cfg)).rates}
        assert trained == {path[0] for path, _ in nnx.to_flat_state(shapes_of(cfg))} - {
            "vit",
            "llm",
        }
        for wrong in ("^xattn/norms/", "^bridge/gate$"):
            idle = (Rule(wrong, 1.0), *cfg.optim.phases[0].rules)
            other = replace(
                cfg, optim=replace(cfg.optim, phases=(replace(cfg.optim.phases[0], rules=idle),))
            )
            with pytest.raises(ValueError, match="no parameter is decided by"):
                optim.optimizer_plan(other, 0, shapes_of(other))


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"bridge": {"kind": "llava"}, "xattn": {"every": 0}},
            "media.tokens must be 4, one a patch",
        ),
        (
            {"bridge": {"kind": "llava"}, "media": {"tokens": 4}},
            "xattn.every must be 0 where bridge.kind is llava",
        ),
        (
            {"bridge": {"kind": "fused"}, "xattn": {"every": 0}},
            "xattn.every must be positive: bridge.kind fused feeds cross-attention",
        ),
        (
            {"xattn": {"every": 0}, "moe": {"copies": 2}},
            "moe.copies must be 0 where xattn.every is 0",
        ),
        (
            {"xattn": {"every": 5}},
            "xattn.every must lie in 1..llm.layers = 4, or be 0 for no cross-attention",
        ),
        ({"bridge": {"latents": 0}}, "bridge.latents must be at least 1"),
        ({"xattn": {"query": "shared"}}, "xattn.query can be shared where xattn.placement is para"),
        ({"xattn": {"gate": "mixing"}}, "xattn.gate can be mixing where xattn.placement is para"),
        ({"xattn": {"key_rotary": True}}, "xattn.key_rotary can be True where xattn.placement is"),
        (
            {"xattn": {"placement": "parallel"}},
            "xattn.heads must be llm.heads = 4 where xattn.placement is parallel",
        ),
        (
            {"xattn": {"placement": "parallel", "heads": 4}, "moe": {"copies": 2}},
            "moe.copies must be 0 where xattn.placement is parallel",
        ),
        (
            {"xattn": {"placement": "parallel", "heads": 4}, "init": {"centre_norms": True}},
            "init.centre_norms must be False where xattn.placement is parallel",
        ),
        ({"xattn": ONE | {"query": "own"}}, "xattn.query must be shared where xattn.gate is soft"),
        ({"xattn": ONE | {"sinks": 1}}, "xattn.sinks must be 0 where xattn.gate is softmax"),
        (
            {"xattn": ONE, "llm": {"scales": {"score_cap": 5.0}}},
            "xattn.gate can be softmax where llm.scales.query and score_cap are 0",
        ),
        (
            {"xattn": ONE, "train": {"attention": "pallas"}},
            "train.attention must be xla where xattn.gate is softmax",
        ),
        (
            {"xattn": {"every": 0}, "media": {"sight": "all"}},
            "media.sight must be last where xattn.every is 0",
        ),
    ],
)
def test_wrong_combinations_are_named(sections, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**sections)


def test_conversion_knows_evlm_alone(tmp_path):
    cfg = tiny_config(**BASELINES["flamingo"])
    cfg = run_directory(tmp_path, cfg, random_model(cfg, 0))
    with pytest.raises(ValueError, match="is not open_flamingo's model:\n  xattn.heads is 2"):
        export.export(str(tmp_path), str(tmp_path / "out"), "openflamingo")
    for form in ("hf", "torch"):
        with pytest.raises(
            ValueError,
            match=rf"is a baseline \(bridge.kind = flamingo\): --format {form} knows EVLM alone",
        ):
            export.export(str(tmp_path), str(tmp_path / "out"), form)
    with pytest.raises(
        ValueError,
        match=r"is a baseline \(bridge.kind = flamingo\): compared are EVLM and language models",
    ):
        look(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"of a baseline \(bridge.kind = flamingo\), import makes EVLM alone"
    ):
        importer.import_towers(cfg, str(tmp_path / "out"))
    with pytest.raises(
        ValueError,
        match=(
            "has bridge.kind = flamingo, the config .*start a baseline from init.vision and"
            " init.llm"
        ),
    ):
        next_stage(tiny_config(), str(tmp_path))
    export.export(str(tmp_path), str(tmp_path / "llm"), "llm")
    assert (tmp_path / "llm/config.json").exists()


def test_llava_caches_no_keys_of_images():
    """A step of decoding keeps keys and values of the text alone; EVLM's keeps those of an image in
    sight as well.
    """
    cfg, evlm = tiny_config(**BASELINES["llava"]), tiny_config()
    caches, more = (
        programs.build(c, make_layout(c), "decode").arguments["caches"].bytes for c in (cfg, evlm)
    )
    rows, llm, x = cfg.train.batch, cfg.llm, evlm.xattn
    text = 2 * 4 * rows * llm.layers * llm.kv_heads * llm.head_dim * cfg.data.length
    assert more - caches == 2 * 4 * rows * len(evlm.cross_layers) * x.heads * x.head_dim * (
        evlm.vit.tokens + x.sinks
    )
    assert 0 <= caches - text < 100  # tokens, positions, keys of draws
