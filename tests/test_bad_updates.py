"""Updates that are not finite change nothing; too many of them stop the run."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from evlm_jax.checkpoint import store
from evlm_jax.train import train
from tests.helpers.tiny import TinyData, tiny_config, tiny_towers
from tests.test_train import assert_same_bits


def spoiled(cfg, bad: set[int]) -> TinyData:
    """Data whose batches of these numbers (0-based) have pictures that are not numbers."""
    return TinyData(
        cfg,
        change=lambda index, batch: (
            batch._replace(taps=batch.taps * np.nan) if index in bad else batch
        ),
    )


BAD = {
    "data": {"cache_features": True},
    "train": {"steps": 12, "save_every": 4, "keep": 9, "log_every": 4, "bad_updates": 2},
}


def test_bad_updates_change_nothing_and_those_behind_go_on(tmp_path, capsys):
    cfg = tiny_config(**BAD)
    states = {0: None}

    def keep(step, model):
        return states.update({step: [np.array(a) for a in jax.tree.leaves(nnx.state(model()))]})

    assert train(cfg, tmp_path, spoiled(cfg, {5, 8}), tiny_towers(cfg), on_step=keep) == 12
    changed = {
        step
        for step in range(2, 13)
        if any((a != b).any() for a, b in zip(states[step - 1], states[step], strict=True))
    }
    assert changed == set(range(2, 13)) - {6, 9}
    assert all(np.isfinite(a).all() for a in states[12])
    said = capsys.readouterr().out
    assert (
        "step 6: sum of losses nan" in said
        and "the run's 2. of that kind. Its samples: 8/0, 8/1" in said
    )
    last = store.read(tmp_path)
    assert (
        last.groups["0/count"] == 10 and last.meta["bad"] == 2 and last.meta["data"] == {"next": 12}
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("bad_updates", 0) for line in lines] == [0, 1, 1] and all(
        np.isfinite(line["loss"]) for line in lines
    )


@pytest.mark.ci
def test_too_many_bad_updates_stop_the_run_and_resume_goes_past_them(tmp_path):
    cfg, towers = tiny_config(**BAD), tiny_towers(tiny_config(**BAD))
    bad = {1, 5, 6, 8}
    with pytest.raises(
        FloatingPointError,
        match=(
            r"step 7: .*nan.*Its samples: 6/0, 6/1. Stopped, for train.bad_updates is 2; a"
            r" greater one"
        ),
    ):
        train(cfg, tmp_path / "cut", spoiled(cfg, bad), towers)
    assert store.steps(tmp_path / "cut") == [4] and store.read(tmp_path / "cut").meta["bad"] == 1
    more = tiny_config(**BAD | {"train": BAD["train"] | {"bad_updates": 4}})
    assert train(more, tmp_path / "cut", spoiled(more, bad), towers) == 12
    assert train(more, tmp_path / "whole", spoiled(more, bad), towers) == 12
    assert_same_bits(store.read(tmp_path / "cut"), store.read(tmp_path / "whole"))


@pytest.mark.ci
def test_parameters_that_give_nothing_finite_are_not_saved(tmp_path):
    """Two bad updates in a row are not the fault of a batch: what was saved before stays the
    newest.
    """
    cfg = tiny_config(**BAD | {"train": BAD["train"] | {"bad_updates": 99}})
    with pytest.raises(
        FloatingPointError,
        match="the last updates to step 12 were not finite, the newest that was saved is 4",
    ):
        train(cfg, tmp_path, spoiled(cfg, set(range(6, 12))), tiny_towers(cfg))
    assert store.steps(tmp_path) == [4]
