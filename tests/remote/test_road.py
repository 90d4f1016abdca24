"""The whole road in a bucket, by the command line: import, train, kill, go on, evaluate, export,
import again, upcycle, cached features.

Run with -m slow.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.checkpoint import store as checkpoint
from evlm_jax.evals import results
from evlm_jax.journal import read_lines
from tests.evals import layouts
from tests.remote.road import experiment, make

pytestmark = pytest.mark.slow
STEPS, EVERY = 40, 4


@pytest.fixture
def evlm(bucket, tmp_path):
    """Starts the command line in an empty folder, with a cache and a place for temporary files of
    its own.
    """
    for name in ("here", "cache", "temporary"):
        (tmp_path / name).mkdir()
    places = {
        "EVLM_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
    }

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "evlm_jax", *words]
        return subprocess.Popen(
            command,
            cwd=tmp_path / "here",
            env=os.environ | places,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def done(process: subprocess.Popen) -> str:
    """What it printed, when it has ended well."""
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    return out


def train_and_kill(evlm, file, root, store):
    """Training that is killed behind its first save, and goes on."""
    places = ("--init", f"{root}/towers", "--workdir", f"{root}/run")
    train = ("train", "--config", file, *places, "--tensorboard")
    killed = evlm(*train)
    deadline = time.monotonic() + 600
    while not checkpoint.steps(f"{root}/run"):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert 0 < checkpoint.steps(f"{root}/run")[-1] < STEPS
    assert "resume from step" in done(evlm(*train))
    assert checkpoint.steps(f"{root}/run") == [STEPS - EVERY, STEPS]
    assert {name.rpartition("/")[2] for name in store.ls(f"{root}/run/steps", detail=False)} == {
        str(STEPS - EVERY),
        str(STEPS),
    }
    assert len(read_lines(f"{root}/run/metrics.jsonl")) == STEPS


def evaluate(evlm, root, data):
    """Asked again and scored again, the run gives what it gave."""
    out = f"{root}/evals/gqa.json"
    asked = ("--checkpoint", f"{root}/run", "--task", "gqa", "--data", str(data), "--out", out)
    done(evlm("eval", *asked))
    scores, lines = results.load(out)["scores"], read_lines(out.replace(".json", ".jsonl"))
    done(evlm("eval", *asked))
    done(evlm("score", out))
    assert (
        results.load(out)["scores"] == scores
        and read_lines(out.replace(".json", ".jsonl")) == lines
    )


def export_and_import(evlm, file, root, store):
    """Every form; the whole model comes back bit for bit."""
    torch = importlib.util.find_spec("torch")
    for form in ("hf", "llm", *["torch"] * bool(torch)):
        words = ("--checkpoint", f"{root}/run", "--format", form, "--out", f"{root}/out/{form}")
        done(evlm("convert", "export", *words))
        assert not store.exists(f"{root}/out/{form}/plan.json")
    assert bool(torch) == store.exists(f"{root}/out/torch/evlm.pt")
    words = ("--config", file, "--model", f"{root}/out/hf", "--out", f"{root}/back")
    done(evlm("convert", "import", *words))
    mine, back = (checkpoint.load_params(f"{root}/{name}")[0] for name in ("run", "back"))
    assert mine.keys() == back.keys() and all(
        np.array_equal(array, back[name]) for name, array in mine.items()
    )


def test_the_whole_road(evlm, bucket, store, tmp_path):
    root = f"{bucket}/road"
    sizes = {
        "data": {"length": 96, "images": 2, "targets": 32, "block_pairs": 24},
        "train": {"steps": STEPS, "save_every": EVERY},
    }
    file = experiment(tmp_path / "mine.py", make(root, tmp_path / "scratch", **sizes))
    done(evlm("convert", "import", "--config", file, "--out", f"{root}/towers"))
    train_and_kill(evlm, file, root, store)
    evaluate(evlm, root, layouts.write("gqa", tmp_path / "gqa"))
    export_and_import(evlm, file, root, store)

    experts = ("--config", file, "--config.moe.copies=2")
    done(evlm("upcycle", "--checkpoint", f"{root}/run", *experts, "--out", f"{root}/moe"))
    more = ("--config.data.cache_features=True", "--config.train.steps=2")
    places = ("--init", f"{root}/moe", "--workdir", f"{root}/moe-run")
    done(evlm("train", *experts, *more, *places))
    assert checkpoint.steps(f"{root}/moe-run") == [2]
    assert list((tmp_path / "cache/features").rglob("taps.bin"))
    assert list((tmp_path / "here").iterdir()) == []
    left = {path.parent.name for path in (tmp_path / "temporary").rglob("*") if path.is_file()}
    assert len(left) <= 1 and all(
        name.startswith("evlm-") for name in left
    )  # TensorBoard's, of the process that was killed
