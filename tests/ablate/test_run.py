"""`evlm ablate` on a tiny model: what is done is not done again, and a run that was killed ends as one that was not."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evlm_jax import cli
from evlm_jax.ablate import job
from evlm_jax.checkpoint import steps
from evlm_jax.config import to_dict
from evlm_jax.evals import results
from tests.checkpoints import dinov2_directory, llama_directory
from tests.parity import needs_asset
from tests.tiny import tiny_config

EXPERIMENT = """
import json
from ml_collections import ConfigDict


def tuples(section):
    return {{key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}}


def get_config(variant):
    config = ConfigDict(json.loads({text!r}, object_hook=tuples))
    config.name = variant
    if variant == "wide":
        config.xattn.update(ffn=512, heads=16)
    return config
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`evlm ablate` but for --out: two variants of different cost, some 40 and 20 updates."""
    folder = tmp_path_factory.mktemp("experiment")
    cfg = tiny_config()
    init = dict(vision=str(dinov2_directory(folder / "vit", cfg)), llm=str(llama_directory(folder / "llm", cfg)), centre_norms=True)
    data = dict(sources=("easy-vqa",), weights=(1.0,), template="plain", length=600, images=3, targets=200, pairs=90, cache_features=True)
    cfg = tiny_config(init=init, data=data, optim=dict(lr=1e-3, min_lr=1e-3), train=dict(save_every=5, keep=1, log_every=3))
    file = folder / "tiny.py"
    file.write_text(EXPERIMENT.format(text=json.dumps(to_dict(cfg))))
    return ["ablate", "--config", str(file), "--variants", "wide", "--seeds", "1", "--questions", "1000", "--test", "20"]


def test_a_finished_run_is_not_repeated(tmp_path):
    (tmp_path / "base" / "0").mkdir(parents=True)
    (tmp_path / "base" / "0" / "result.json").write_text("{}")

    def load(variant):
        raise AssertionError(variant)

    job.run(load, "base", 0, 1000, None, tmp_path, False)
    assert (tmp_path / "base" / "0" / "result.json").read_text() == "{}"


@pytest.mark.slow
@needs_asset("easy-vqa")
@needs_asset("openmoji")
def test_a_killed_ablation_goes_on(command, tmp_path, monkeypatch):
    """Killed while it trains and while it is read; the results are those of runs that were not cut off."""
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main([*command, "--out", str(whole)]) == 0
    trains = lambda: max(steps(cut / "base" / "0"), default=0) >= 10
    answers = lambda: len(list((cut / "wide" / "0" / "evals").glob("*.jsonl"))) >= 2
    for reached in (trains, answers):
        process = subprocess.Popen([sys.executable, "-m", "evlm_jax", *command, "--out", str(cut)], start_new_session=True)
        deadline = time.monotonic() + 600
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / "results.json").exists()
    assert cli.main([*command, "--out", str(cut)]) == 0
    a, b = (results.load(folder / "results.json") for folder in (whole, cut))
    assert [run["variant"] for run in a["runs"]] == ["base", "wide"] and a["settings"] == b["settings"]
    for one, other in zip(a["runs"], b["runs"], strict=True):
        assert one["budgets"] == other["budgets"] and len(one["readings"]) == 1 + (one["variant"] == "wide")
        for step, reading in one["readings"].items():
            for name in ("measured", "loss", "weights_sha256"):
                assert reading[name] == other["readings"][step][name], (one["variant"], step, name)
    assert not (cut / "base" / "0" / "steps").exists() and "Ablations" in (cut / "report.html").read_text()
    before = (cut / "base" / "0" / "result.json").stat().st_mtime_ns
    assert cli.main([*command, "--out", str(cut)]) == 0
    assert (cut / "base" / "0" / "result.json").stat().st_mtime_ns == before
    other = [*command[:-3], "900", *command[-2:], "--out", str(cut)]
    shutil.rmtree(cut / "wide")
    assert cli.main(other) == 1  # runs of two budgets
