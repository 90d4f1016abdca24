"""The lines of a run, and that they go on after a cut."""

import json
import sys

import numpy as np
import pytest

from evlm_jax import flops
from evlm_jax.data.pack import Drop
from evlm_jax.metrics import Meter, work
from tests.helpers.tiny import tiny_batch, tiny_config

TRAINED = {"xattn/0/q/kernel", "media/embedding"}


def report(cfg, loss, count):
    """A report of train_step, on the host."""
    gates = {
        kind: np.arange(cfg.llm.layers) / 10 + shift
        for kind, shift in (("attn_gate", 0.0), ("ffn_gate", 0.5))
    }
    sums = {"source_loss": np.array(loss, np.float32), "source_count": np.array(count, np.float32)}
    return sums | {
        "good": np.True_,
        "grad_norm": np.float32(2.0),
        "lr": np.float32(0.5),
        "gates": gates,
    }


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_line_averages_over_targets(tmp_path):
    cfg = tiny_config(train={"log_every": 2, "peak_flops": 1e12})
    with Meter(cfg, tmp_path, step=0, devices=2, tensorboard=False) as meter:
        meter._since -= 10  # both steps took ten seconds together
        meter.add(
            1, {"tokens": 30.0, "images": 2.0, "flops": 1e12}, report(cfg, [8.0, 0.0], [2, 0])
        )
        assert lines(tmp_path) == []
        meter.add(
            2, {"tokens": 70.0, "images": 3.0, "flops": 3e12}, report(cfg, [2.0, 0.0], [3, 0])
        )
    (line,) = lines(tmp_path)
    assert (line["step"], line["loss"], line["loss/vqa"], line["lr"], line["grad_norm"]) == (
        2,
        2.0,
        2.0,
        0.5,
        2.0,
    )
    assert "loss/caption" not in line  # no target of that source
    np.testing.assert_allclose(
        [line["tokens_per_s"], line["images_per_s"], line["mfu"]], [10, 0.5, 0.2], rtol=0.01
    )
    np.testing.assert_allclose([line["xattn/3/attn_gate"], line["xattn/0/ffn_gate"]], [0.3, 0.5])


def test_lines_of_a_cut_run_are_dropped(tmp_path):
    cfg = tiny_config()
    with Meter(cfg, tmp_path, step=0, devices=1, tensorboard=False) as meter:
        for step in (1, 2, 3):
            meter.add(
                step,
                {"tokens": 1.0, "images": 1.0, "flops": 1.0},
                report(cfg, [1.0 * step, 1.0], [1, 1]),
            )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Meter(cfg, tmp_path, step=2, devices=1, tensorboard=False) as meter:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        meter.add(3, {"tokens": 1.0, "images": 1.0, "flops": 1.0}, report(cfg, [9.0, 1.0], [1, 1]))
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 1.5, 5.0]


def test_the_bar_tells_the_run_and_is_drawn_with_the_first_update(tmp_path, capsys):
    cfg = tiny_config()
    with Meter(cfg, tmp_path / "finished", step=cfg.train.steps, devices=1, tensorboard=False):
        pass
    assert not capsys.readouterr().err
    with Meter(cfg, tmp_path / "mine", step=0, devices=1, tensorboard=False) as meter:
        assert not capsys.readouterr().err
        meter._bar.mininterval = 0  # does not wait
        meter.add(1, {"tokens": 1.0, "images": 1.0, "flops": 1.0}, report(cfg, [1.0, 1.0], [1, 1]))
    assert "tiny, mine:  12%" in capsys.readouterr().err


def test_work_leaves_padding_out():
    cfg = tiny_config()
    batch = tiny_batch(cfg, seed=0, rows=1, fill=0.6)
    used = 1 + int(np.flatnonzero(batch.positions[0]).max())
    seen = {
        i
        for a, b in zip(batch.visible_start[0], batch.visible_stop[0], strict=True)
        for i in range(a, b)
    }
    drops = [Drop("too long", "a"), Drop("unreadable image", "b"), Drop("too long", "c")]
    needed = flops.needed(cfg, TRAINED, flops.Work.of(cfg, batch))
    counted = {"tokens": used, "images": len(seen)}
    counted |= {
        "flops": sum(cost.total for cost in needed.values()),
        "flops/vision": needed[flops.FROZEN_VIT].total,
    }
    counted |= {"fill/tokens": 0.5, "cut": 3, "dropped/too long": 2, "dropped/unreadable image": 1}
    assert work(cfg, batch, {"fill": {"tokens": 0.5}, "drops": drops, "cut": 3}, TRAINED) == counted
    assert 0 < used < cfg.data.length and 0 < len(seen)


def test_left_out_samples_are_counted_and_the_first_is_shown(tmp_path, capsys):
    cfg = tiny_config(train={"log_every": 2})
    with Meter(cfg, tmp_path, step=0, devices=1, tensorboard=False) as meter:
        for step, shares in ((1, (0.5, 1)), (2, (1.0, 2))):
            counted = dict(zip(("fill/tokens", "dropped/too long"), shares))
            meter.dropped([Drop("too long", f"sample {step}")] * shares[1])
            meter.add(
                step,
                {"tokens": 1.0, "images": 1.0, "flops": 1.0} | counted,
                report(cfg, [1.0, 1.0], [1, 1]),
            )
    (line,) = lines(tmp_path)
    assert (line["fill/tokens"], line["dropped/too long"]) == (0.75, 3)
    said = capsys.readouterr()
    assert (
        "left out, too long: sample 1" in said.out
        and "sample 2" not in said.out
        and "too long=3" in said.err
    )


def test_tensorboard(tmp_path, monkeypatch):
    cfg = tiny_config()
    with Meter(cfg, tmp_path, step=0, devices=1, tensorboard=True) as meter:
        meter.add(1, {"tokens": 1.0, "images": 1.0, "flops": 1.0}, report(cfg, [1.0, 1.0], [1, 1]))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/vqa" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install"):
        Meter(cfg, tmp_path, step=0, devices=1, tensorboard=True)
