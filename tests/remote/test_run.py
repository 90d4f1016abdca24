"""A run in a bucket, in this process: cut off, taken up, looked at; and it computes what it would
on a disk.
"""

import contextlib
import json
import os
import signal

import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.checkpoint import store as checkpoint
from evlm_jax.convert.engine import load_towers
from evlm_jax.data.pipeline import batches
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.journal import read_lines
from evlm_jax.launch import train_run
from evlm_jax.parallel.status import Stopped
from evlm_jax.train import train
from tests.remote.road import make

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def cfg(bucket, tmp_path_factory):
    return make(f"{bucket}/fast", tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def run(bucket, cfg):
    """A run that SIGTERM stopped after three of four updates, and that went on."""
    workdir = f"{bucket}/fast/run"

    def stop(step, model):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with (
        contextlib.closing(batches(cfg, load_tokenizer(cfg.init.llm))) as data,
        pytest.raises(Stopped),
    ):
        train(cfg, workdir, data, load_towers(cfg), on_step=stop, tensorboard=True, profile=(2, 2))
    assert checkpoint.steps(workdir) == [2, 3]
    assert train_run(cfg, workdir, tensorboard=True) == 4
    return workdir


def test_the_bucket_has_it_all(run, store):
    assert checkpoint.steps(run) == [3, 4]
    assert [json.loads(line)["step"] for line in read_lines(f"{run}/metrics.jsonl")] == [1, 2, 3, 4]
    found = [file.removeprefix(run.removeprefix("gs://") + "/") for file in store.find(run)]
    assert {file.partition("/")[0] for file in found} == {
        "frozen",
        "metrics.jsonl.parts",
        "profile",
        "steps",
        "tensorboard",
        "tokenizer",
    }
    assert len([file for file in found if file.startswith("tensorboard/")]) == 2
    assert any(file.endswith(".xplane.pb") for file in found)


def test_it_is_the_run_of_a_disk(run, cfg, tmp_path):
    """The same batches, so the same bits."""
    assert train_run(cfg, str(tmp_path / "run")) == 4
    mine, other = checkpoint.read(str(tmp_path / "run")), checkpoint.read(run)
    for part in ("params", "frozen", "groups"):
        assert getattr(mine, part).keys() == getattr(other, part).keys()
        assert all(
            np.array_equal(array, getattr(other, part)[name])
            for name, array in getattr(mine, part).items()
        )
    assert mine.meta == other.meta


def test_it_answers(run, cfg, capsys):
    picture = cfg.init.vision.replace("vision", "data/pictures/3.png")
    assert (
        cli.main(
            [
                "generate",
                "--checkpoint",
                run,
                "--image",
                picture,
                "--prompt",
                "which?",
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out


def test_what_a_kill_left_is_removed(run, store, capsys):
    """A step without its mark, and a store without its manifest, are none; a whole step of another
    time is not touched.
    """
    left = [
        f"{run}/steps/9/params/d/1",
        f"{run}/frozen/0123456789abcdef/model.safetensors",
        f"{run}/frozen/new.incomplete/model.safetensors",
    ]
    for file in [*left, f"{run}/steps/notes/hand.txt"]:
        store.pipe_file(file, b"half")
    assert checkpoint.steps(run) == [3, 4]
    checkpoint.Checkpoints(run, keep=2).close()
    assert capsys.readouterr().out.count("half-written") == 3
    assert not any(map(store.exists, left)) and store.exists(f"{run}/steps/notes/hand.txt")
    assert checkpoint.steps(run) == [3, 4]
