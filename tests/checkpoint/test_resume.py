"""Which changes of a config a run goes on with, and which are refused by name."""

import pytest

from evlm_jax import optim
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.continuity import check
from evlm_jax.config import to_saved
from evlm_jax.train import train
from tests.helpers.tiny import CROSS_ONLY, UPPER_VIT, TinyData, tiny_config, tiny_towers


class Placed:
    """Data of which only the identity of the sources counts."""

    def __init__(self, **sources):
        self.sources = {
            name: {"samples": samples, "digest": digest}
            for name, (samples, digest) in sources.items()
        }

    def get_state(self):
        return {"sources": self.sources} if self.sources else {"next": 0}


def meta(cfg, step=4, phase=0, data=None):
    return {
        "step": step,
        "phase": phase,
        "config": to_saved(cfg),
        "data": (data or Placed()).get_state(),
    }


def phases(first: dict):
    return {"phases": ({"rules": CROSS_ONLY}, {"rules": UPPER_VIT} | first)}


def test_a_phase_that_was_left_does_not_come_back():
    short = tiny_config(optim=phases({"start": 0.5}), train={"steps": 8})
    saved, longer = (
        meta(short, step=6, phase=1),
        tiny_config(optim=phases({"start": 0.5}), train={"steps": 24}),
    )
    with pytest.raises(
        ValueError,
        match=(
            r"step 6 was reached in optim.phases\[1\] and lies in phases\[0\] now.*steps \(0, 12\):"
            r" give phases\[1\].step"
        ),
    ):
        check(longer, saved, Placed(), False)
    mended = tiny_config(optim=phases({"step": 4}), train={"steps": 24})
    check(mended, saved, Placed(), False)
    assert optim.starts(mended) == (0, 4) and [optim.phase_at(mended, step) for step in (3, 4)] == [
        0,
        1,
    ]
    check(
        tiny_config(optim=phases({"start": 0.5}), train={"steps": 2}),
        meta(short, step=4, phase=0),
        Placed(),
        False,
    )  # nothing is left to do


def test_phases_in_steps():
    with pytest.raises(ValueError, match="optim.phases have a start or a step, not both"):
        tiny_config(optim=phases({"step": 4, "start": 0.5}))
    with pytest.raises(ValueError, match="optim.phases the first must start at 0"):
        tiny_config(optim={"phases": ({"step": 4, "rules": CROSS_ONLY},)})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"data": {"seed": 1}}, "data.seed was 0, is 1"),
        ({"data": {"length": 64}}, "data.length was 48, is 64"),
        ({"data": {"window": 9}}, "data.window was 8, is 9"),
        (
            {"data": {"sources": ("caption", "vqa")}},
            r"data.sources was ('vqa', 'caption'), is ('caption', 'vqa')",
        ),
        ({"data": {"weights": (1.0, 2.0)}}, "data.weights was (1.0, 1.0), is (1.0, 2.0)"),
        ({"train": {"batch": 4}}, "train.batch was 2, is 4"),
    ],
)
def test_other_data_are_refused_by_name(change, said):
    other, saved = tiny_config(**change), meta(tiny_config())
    with pytest.raises(
        ValueError, match=r"the data are not those of step 4: .*--allow-data-change goes on"
    ) as error:
        check(other, saved, Placed(), False)
    assert said in str(error.value)
    check(other, saved, Placed(), True)


def test_other_samples_of_a_source_are_refused_by_name():
    cfg, old = tiny_config(), Placed(a=(10, "x"), b=(7, "y"))
    saved = meta(cfg, data=old)
    check(cfg, saved, old, False)
    check(cfg, meta(cfg), old, False)  # older checkpoints do not tell of sources
    with pytest.raises(ValueError, match="data source b has 6 samples, had 7"):
        check(cfg, saved, Placed(a=(10, "x"), b=(6, "z")), False)
    with pytest.raises(ValueError, match="data source a has other samples, or in another order"):
        check(cfg, saved, Placed(a=(10, "z"), b=(7, "y")), False)
    check(cfg, saved, Placed(a=(10, "z"), b=(6, "y")), True)


@pytest.mark.pinned
def test_another_batch_keeps_the_optimizer(tmp_path):
    """Adam's count goes on, and the data from where they are."""
    sizes = {"steps": 2, "save_every": 2, "keep": 9}
    cfg = tiny_config(train=sizes)
    train(cfg, tmp_path, TinyData(cfg), tiny_towers(cfg))
    before = store.read(tmp_path)
    wider = tiny_config(train=sizes | {"steps": 3, "batch": 4})
    with pytest.raises(ValueError, match="train.batch was 2, is 4"):
        train(wider, tmp_path, TinyData(wider), {})
    assert train(wider, tmp_path, TinyData(wider), {}, other_data=True) == 3
    after = store.read(tmp_path)
    assert after.groups["0/count"] == before.groups["0/count"] + 1 == 3 and after.meta["data"] == {
        "next": 3
    }
    name = next(name for name in after.groups if name.startswith("0/nu/xattn/0/ffn"))
    kept = 0.999 * before.groups[name]  # of the second moment; what is new adds
    assert (after.groups[name] >= kept * (1 - 1e-5)).all() and (
        after.groups[name] <= kept + 1e-2
    ).all()


def test_parameters_in_bfloat16_do_not_train(tmp_path):
    cfg = tiny_config(train={"param_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="train.param_dtype must be float32 in training"):
        train(cfg, tmp_path, TinyData(cfg), {})


@pytest.mark.pinned
def test_what_a_run_freezes_again_is_in_a_store_of_its_own(tmp_path):
    phases = (
        {"start": 0.0, "warmup": 0, "rules": UPPER_VIT},
        {"step": 2, "warmup": 0, "rules": CROSS_ONLY},
    )
    cfg = tiny_config(optim={"phases": phases}, train={"steps": 4, "save_every": 2})
    towers = tiny_towers(cfg)
    assert train(cfg, tmp_path, TinyData(cfg), towers) == 4
    before, after = store.read(tmp_path, 2), store.read(tmp_path, 4)
    upper = {name for name in towers if name.startswith(("vit/blocks/2/", "vit/blocks/3/"))}
    assert upper <= before.params.keys() and before.frozen.keys() == towers.keys() - upper
    assert after.frozen.keys() == towers.keys()
    for name, array in after.frozen.items():
        wanted = before.params if name in upper else towers
        assert array.tobytes() == wanted[name].tobytes(), name


@pytest.mark.parametrize(
    "field, was, other",
    [
        ("kind", "nf4", "int4"),
        ("tile", 16, 8),
        ("int8", (), ("/down/",)),
        ("patterns", ("q/",), ()),
    ],
)
def test_quantised_matrices_are_read_as_they_are_held(field, was, other):
    """nf4's bytes are as many as int4's: nothing else would tell them apart."""
    held = {"patterns": ("q/",), "kind": "nf4", "tile": 16, "int8": ()}
    saved = meta(tiny_config(quant=held | {field: was}))
    check(tiny_config(quant=held | {field: was}), saved, Placed(), False)
    with pytest.raises(ValueError, match=rf"otherwise: quant.{field} was .*, is .*\. Give its qua"):
        check(tiny_config(quant=held | {field: other}), saved, Placed(), True)
