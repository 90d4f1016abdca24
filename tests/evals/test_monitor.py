"""Tasks followed in training: the numbers are those of `evlm eval`, and a run that goes on repeats
no line.
"""

import json
from dataclasses import replace

import pytest

from evlm_jax import cli
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.evals import monitor, results
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.train import train
from tests.evals import layouts
from tests.helpers.checkpoints import dinov2_directory, llama_directory
from tests.helpers.tiny import TinyData, tiny_config, tiny_towers


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Classes by lowest loss, every three updates of eight."""
    folder = tmp_path_factory.mktemp("data")
    plain = tiny_config()
    init = dict(
        vision=str(dinov2_directory(folder / "vit", plain)),
        llm=str(llama_directory(folder / "llm", plain)),
        centre_norms=False,
    )
    data = dict(length=96, images=2, targets=32, block_pairs=24)
    followed = dict(
        monitors=(f"classes:{layouts.write('classes', folder / 'classes')}",),
        monitor_every=3,
        monitor_questions=2,
    )
    return tiny_config(
        init=init,
        data=data,
        optim=dict(lr=1e-2),
        train=dict(steps=8, save_every=3, keep=9, log_every=2) | followed,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def follow(cfg, folder, stop=None):
    """Trains; `stop`: an update behind whose look the process dies."""
    look = monitor.monitor(cfg, load_tokenizer(cfg.init.llm), None, make_layout(cfg))

    def die(step, model):
        if step == stop:
            raise KeyboardInterrupt
        return look(step, model)

    return train(cfg, folder, TinyData(cfg), tiny_towers(cfg), on_step=die)


@pytest.mark.ci
def test_numbers_and_lines(cfg, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        follow(cfg, run, stop=5)
    follow(cfg, run)
    seen = {line["step"]: line for line in lines(run) if "monitor/seconds" in line}
    assert [line["step"] for line in lines(run)] == [2, 3, 4, 6, 8] and list(seen) == [3, 6, 8]
    assert "loss" in seen[6] and "loss" not in seen[3]  # every second update has a line of its own
    path, out = cfg.train.monitors[0].removeprefix("classes:"), tmp_path / "out.json"
    assert (
        cli.main(
            [
                "eval",
                "--checkpoint",
                str(run),
                "--task",
                "classes",
                "--data",
                path,
                "--limit",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    found = {
        f"monitor/classes/{row['metric']}": row["value"] for row in results.load(out)["scores"]
    }
    assert found == {
        name: seen[8][name] for name in ("monitor/classes/acc@1", "monitor/classes/acc@5")
    }


def test_nothing_to_follow_and_wrong_tasks(cfg):
    plain = tiny_config()
    assert monitor.monitor(plain, None, None, make_layout(plain)) is None
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        monitor.monitor(
            tiny_config(train=dict(monitors=("nope",), monitor_every=1)),
            None,
            None,
            make_layout(plain),
        )
    twice = replace(cfg, train=replace(cfg.train, monitors=cfg.train.monitors * 2))
    with pytest.raises(ValueError, match="train.monitors has classes twice"):
        monitor.monitor(twice, None, None, make_layout(plain))
    with pytest.raises(ValueError, match="train.monitor_every must be positive"):
        tiny_config(train=dict(monitors=("pope",)))
