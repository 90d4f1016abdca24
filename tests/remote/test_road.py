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


def test_the_whole_road(evlm, bucket, store, tmp_path):
    root, torch = f"{bucket}/road", importlib.util.find_spec("torch")
    sizes = {
        "data": {"length": 96, "images": 2, "targets": 32, "pairs": 24},
        "train": {"steps": STEPS, "save_every": EVERY},
    }
    file = experiment(tmp_path / "mine.py", make(root, tmp_path / "scratch", **sizes))
    done(evlm("convert", "import", "--config", file, "--out", f"{root}/towers"))

    train = (
        "train",
        "--config",
        file,
        "--init",
        f"{root}/towers",
        "--workdir",
        f"{root}/run",
        "--tensorboard",
    )
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

    out, data = f"{root}/evals/gqa.json", layouts.write("gqa", tmp_path / "gqa")
    asked = (
        "eval",
        "--checkpoint",
        f"{root}/run",
        "--task",
        "gqa",
        "--data",
        str(data),
        "--out",
        out,
    )
    done(evlm(*asked))
    scores, lines = results.load(out)["scores"], read_lines(out.replace(".json", ".jsonl"))
    done(evlm(*asked))
    done(evlm("score", out))
    assert (
        results.load(out)["scores"] == scores
        and read_lines(out.replace(".json", ".jsonl")) == lines
    )

    for form in ("hf", "llm", *["torch"] * bool(torch)):
        done(
            evlm(
                "convert",
                "export",
                "--checkpoint",
                f"{root}/run",
                "--format",
                form,
                "--out",
                f"{root}/out/{form}",
            )
        )
        assert not store.exists(f"{root}/out/{form}/plan.json")
    assert bool(torch) == store.exists(f"{root}/out/torch/evlm.pt")
    done(
        evlm(
            "convert",
            "import",
            "--config",
            file,
            "--model",
            f"{root}/out/hf",
            "--out",
            f"{root}/back",
        )
    )
    mine, back = (checkpoint.load_params(f"{root}/{name}")[0] for name in ("run", "back"))
    assert mine.keys() == back.keys() and all(
        np.array_equal(array, back[name]) for name, array in mine.items()
    )

    done(
        evlm(
            "upcycle",
            "--checkpoint",
            f"{root}/run",
            "--config",
            file,
            "--config.moe.copies=2",
            "--out",
            f"{root}/moe",
        )
    )
    more = ("--config.moe.copies=2", "--config.data.cache_features=True", "--config.train.steps=2")
    done(
        evlm(
            "train",
            "--config",
            file,
            *more,
            "--init",
            f"{root}/moe",
            "--workdir",
            f"{root}/moe-run",
        )
    )
    assert checkpoint.steps(f"{root}/moe-run") == [2]
    assert list((tmp_path / "cache/features").rglob("taps.bin"))
    assert list((tmp_path / "here").iterdir()) == []
    left = {path.parent.name for path in (tmp_path / "temporary").rglob("*") if path.is_file()}
    assert len(left) <= 1 and all(
        name.startswith("evlm-") for name in left
    )  # TensorBoard's, of the process that was killed
