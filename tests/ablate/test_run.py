"""`evlm ablate` on a tiny model: what is done is not done again, and a run that was killed ends as
one that was not.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.ablate import collect, job
from evlm_jax.ablate import command as ablate_command
from evlm_jax.ablate.budget import Cut
from evlm_jax.ablate.study import EASY_VQA
from evlm_jax.checkpoint.store import steps
from evlm_jax.config import to_dict
from evlm_jax.evals import results
from evlm_jax.flops import real_tokens
from evlm_jax.models.evlm import EVLM
from evlm_jax.runs import load_trained
from tests.helpers.checkpoints import dinov2_directory, llama_directory, run_directory
from tests.helpers.parity import needs_asset
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_batch, tiny_config

EXPERIMENT = """
import json
from ml_collections import ConfigDict


def tuples(section):
    return {{
        key: tuple(value) if isinstance(value, list) else value for key, value in section.items()
    }}


def get_config(variant):
    config = ConfigDict(json.loads({text!r}, object_hook=tuples))
    config.name = variant
    if variant == "wide":
        config.xattn.update(ffn=512, heads=16)
    if variant in ("preserve", "paper"):
        config.moe.update(copies=2, upcycle=variant)
    return config
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`evlm ablate` but for --out: two variants of different cost, some 40 and 20 updates."""
    folder = tmp_path_factory.mktemp("experiment")
    cfg = tiny_config()
    init = dict(
        vision=str(dinov2_directory(folder / "vit", cfg)),
        llm=str(llama_directory(folder / "llm", cfg)),
        centre_norms=True,
    )
    data = dict(
        sources=("easy-vqa",),
        weights=(1.0,),
        template="plain",
        length=600,
        images=3,
        targets=200,
        block_pairs=90,
        cache_features=True,
    )
    cfg = tiny_config(
        init=init,
        data=data,
        optim=dict(lr=1e-3, min_lr=1e-3),
        train=dict(save_every=5, keep=1, log_every=3),
    )
    file = folder / "tiny.py"
    file.write_text(EXPERIMENT.format(text=json.dumps(to_dict(cfg))))
    return [
        "ablate",
        "--config",
        str(file),
        "--variants",
        "wide",
        "--seeds",
        "1",
        "--questions",
        "1000",
        "--test",
        "20",
    ]


def test_a_finished_run_is_not_repeated(tmp_path):
    (tmp_path / "base" / "0").mkdir(parents=True)
    (tmp_path / "base" / "0" / "result.json").write_text("{}")

    def load(variant):
        raise AssertionError(variant)

    job.run(job.Order(load, EASY_VQA, tmp_path, 1000), "base", 0)
    assert (tmp_path / "base" / "0" / "result.json").read_text() == "{}"


@pytest.mark.ci
def test_experts_are_made_of_the_run_that_all_start_from(tmp_path):
    dense, experts = (
        tiny_config(),
        {name: tiny_config(moe={"copies": 2, "upcycle": name}) for name in ("preserve", "paper")},
    )
    model, init = random_model(dense, 0), str(tmp_path / "dense")
    run_directory(tmp_path / "dense", dense, model)
    assert job.start(dense, None, tmp_path) is None and job.start(dense, init, tmp_path) == init
    batch = tiny_batch(dense, 0)

    def hidden(model):
        return np.asarray(EVLM.hidden(model, batch))[real_tokens(batch)]

    expected, found = hidden(model), {}
    for name, cfg in experts.items():
        begin = job.start(cfg, init, tmp_path / name)
        assert (
            job.start(cfg, init, tmp_path / name) == begin == str(tmp_path / name / "start")
        )  # made once
        assert job.start(cfg, begin, tmp_path) == begin  # has experts
        found[name] = (
            np.abs(hidden(load_trained(begin).model) - expected).max() / np.abs(expected).max()
        )
    assert found["preserve"] <= 1e-5 and found["paper"] > 1e-2


def test_a_run_that_began_elsewhere_does_not_go_on(tmp_path):
    run_directory(tmp_path / "dense", tiny_config(), random_model(tiny_config(), 0))
    results.save(tmp_path / "base" / "0" / "begun.json", {"init": None})
    with pytest.raises(
        ValueError,
        match="base/0/begun.json: the run that was cut off here began elsewhere; give its --init",
    ):
        init = str(tmp_path / "dense")
        job.run(job.Order(lambda _: tiny_config(), EASY_VQA, tmp_path, 1000, init=init), "base", 0)


def test_a_seed_begins_with_its_own_dense_run(tmp_path, monkeypatch):
    """What is trained is left out: where each run begins, and what it says of that."""
    cfg, begun = tiny_config(), []
    cuts = {name: Cut(8, 200, 1e9) for name in ("questions", "flops")}

    def read(cfg, begin, folder, order):
        begun.append(begin)
        return {"measured": {}, "clusters": {}, "loss": 1.0}

    monkeypatch.setattr(job, "budgets", lambda *_: cuts)
    monkeypatch.setattr(job, "read", read)
    for seed in range(2):
        run_directory(tmp_path / "dense" / "base" / str(seed), cfg, random_model(cfg, seed))
    dense = str(tmp_path / "dense")
    order = job.Order(lambda _: cfg, EASY_VQA, tmp_path / "on", 200, branch=dense)
    for variant, seed in (("base", 0), ("base", 1), ("same", 0)):
        job.run(order, variant, seed)
    assert begun == [f"{dense}/base/0", f"{dense}/base/1", f"{dense}/base/0"]
    runs = collect.collect(sorted((tmp_path / "on").glob("*/*/result.json")))["runs"]
    base, other, same = (run["begun"] for run in runs)
    assert base == same != other
    ablate_command._check(order, ["base"], 2)
    with pytest.raises(ValueError, match="dense/base/2 has no checkpoint: make it with `evlm abl"):
        ablate_command._check(order, ["base"], 3)


def test_what_cannot_count_is_refused(tmp_path):
    experts = {"paper": {"upcycle": "paper"}, "one": {"top_k": 1}}
    load = {"base": tiny_config()} | {
        name: tiny_config(moe={"copies": 2} | fields) for name, fields in experts.items()
    }
    run_directory(tmp_path, load["base"], random_model(load["base"], 0))
    order = job.Order(load.get, EASY_VQA, tmp_path, 1000)
    for variant, init in (("base", None), ("one", None), ("paper", str(tmp_path))):
        job.check(order, variant, init)
    with pytest.raises(
        ValueError, match="paper: moe.upcycle counts where .* give that run with --init"
    ):
        job.check(order, "paper", None)
    with pytest.raises(ValueError, match="moe.upcycle=preserve needs moe.top_k = moe.slices"):
        job.check(order, "one", str(tmp_path))


def test_other_settings_are_refused_before_anything_runs(tmp_path, monkeypatch):
    order = job.Order({"base": tiny_config()}.get, EASY_VQA, tmp_path, 1000, 20)
    kept = json.loads(json.dumps(job.settings(order, None)))
    monkeypatch.setattr(ablate_command.finished, "load", lambda file: {"settings": kept})
    ablate_command._check_settings(order, ["base/0"])
    for changes, name in (
        ({"questions": 2000}, "questions"),
        ({"limit": None}, "limit"),
        ({"load": {"base": tiny_config(train={"batch": 4})}.get}, "base"),
        ({"init": "elsewhere"}, "init"),
        ({"branch": "elsewhere"}, "branched"),
    ):
        with pytest.raises(ValueError, match=f"base/0/result.json: its {name} differ from those"):
            ablate_command._check_settings(order._replace(**changes), ["base/0"])


def test_a_variant_of_a_folder_has_its_own_seed(tmp_path, monkeypatch):
    """Names are cut at the last slash, as the command line is checked."""
    ran = []
    monkeypatch.setattr(job, "run", lambda order, *name: ran.append(name))
    words = ["ablate", "--variants", "base", "--out", str(tmp_path), "--run"]
    assert cli.main([*words, "base/some/1"]) == 0 and ran == [("base/some", 1)]


@pytest.mark.slow
@needs_asset("easy-vqa")
@needs_asset("openmoji")
def test_all_start_from_one_run(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    config = command[command.index("--config") + 1]
    assert (
        cli.main(["train", "--config", f"{config}:base", "--workdir", str(tmp_path / "dense")]) == 0
    )
    found = {}
    for out, words in (
        ("new", ["--variants", "wide"]),
        ("on", ["--variants", "preserve,paper", "--init", str(tmp_path / "dense")]),
    ):
        assert cli.main([*command, *words, "--questions", "200", "--out", str(tmp_path / out)]) == 0
        found[out] = results.load(tmp_path / out / "results.json")
    assert [run["variant"] for run in found["on"]["runs"]] == ["base", "preserve", "paper"]
    assert found["on"]["settings"].keys() - found["new"]["settings"].keys() == {"init"}
    (first, *_), others = (
        [next(iter(run["readings"].values()))["loss"] for run in found[out]["runs"]]
        for out in ("new", "on")
    )
    assert max(others) < first and not (tmp_path / "on" / "paper" / "0" / "start").exists()
    assert (
        cli.main([*command, "--questions", "200", "--out", str(tmp_path / "on")]) == 1
    )  # its base began elsewhere


def spelled(text, words):
    """A script of docs/ablations.md that makes a run, with these words instead of its own."""
    python = shlex.join([sys.executable, "-m", "evlm_jax", *words])
    return re.sub(r"^(srun |exec )?evlm ablate .* --run", f"{python} --run", text, flags=re.M)


@pytest.mark.slow
@needs_asset("easy-vqa")
@needs_asset("openmoji")
def test_jobs_of_a_cluster_are_collected(command, tmp_path, monkeypatch, capsys):
    """A task of the Slurm array and one of the indexed Job, side by side, as the page has them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    page = (Path(cli.__file__).parents[2] / "docs" / "ablations.md").read_text("utf-8")
    array = re.search(r"```bash\n(.*?)```", page, re.S)[1]
    job = textwrap.dedent(re.search(r"args:\n +- \|\n(.*?\n)(?= +resources)", page, re.S)[1])
    words = [*command, "--questions", "200", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--list"]) == 0
    (tmp_path / "runs.txt").write_text(listed := capsys.readouterr().out)
    assert listed.split() == ["base/0", "wide/0"]
    tasks = [
        subprocess.Popen(
            ["bash", "-c", spelled(text, words)], cwd=tmp_path, env=os.environ | number
        )
        for text, number in (
            (array, {"SLURM_ARRAY_TASK_ID": "1"}),
            (job, {"JOB_COMPLETION_INDEX": "1"}),
        )
    ]
    assert [task.wait(timeout=900) for task in tasks] == [0, 0]
    made = {name: (tmp_path / "out" / name / "result.json") for name in listed.split()}
    before = {name: file.stat().st_mtime_ns for name, file in made.items()}
    assert cli.main([*words, "--list"]) == 0 and capsys.readouterr().out == ""
    assert cli.main(words) == 0
    assert {name: file.stat().st_mtime_ns for name, file in made.items()} == before
    found = results.load(tmp_path / "out" / "results.json")
    assert [run["variant"] for run in found["runs"]] == ["base", "wide"]


@pytest.mark.slow
@needs_asset("easy-vqa")
@needs_asset("openmoji")
def test_each_seed_branches_from_its_dense_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    words, dense = [*command, "--questions", "200", "--seeds", "2"], str(tmp_path / "dense")
    assert cli.main([*words, "--variants", "base", "--keep", "--out", dense]) == 0
    branch = [*words, "--variants", "preserve", "--branch-from", dense, "--config.data.seed=7"]
    assert cli.main([*branch, "--out", str(tmp_path / "on")]) == 0
    runs = results.load(tmp_path / "on" / "results.json")["runs"]
    begun = {(run["variant"], run["seed"]): run["begun"] for run in runs}
    assert begun["base", 0] == begun["preserve", 0] != begun["base", 1] == begun["preserve", 1]
    assert cli.main([*branch, "--seeds", "3", "--out", str(tmp_path / "more")]) == 1
    assert "dense/base/2 has no checkpoint: make it with `evlm ablate" in capsys.readouterr().err


@pytest.mark.slow
@needs_asset("easy-vqa")
@needs_asset("openmoji")
def test_a_killed_ablation_goes_on(command, tmp_path, monkeypatch):
    """Killed while it trains and while it is read; the results are those of runs that were not cut
    off.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main([*command, "--out", str(whole)]) == 0

    def trains():
        return max(steps(cut / "base" / "0"), default=0) >= 10

    def answers():
        return len(list((cut / "wide" / "0" / "evals").glob("*.jsonl"))) >= 2

    for reached in (trains, answers):
        process = subprocess.Popen(
            [sys.executable, "-m", "evlm_jax", *command, "--out", str(cut)], start_new_session=True
        )
        deadline = time.monotonic() + 600
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / "results.json").exists()
    assert cli.main([*command, "--out", str(cut)]) == 0
    a, b = (results.load(folder / "results.json") for folder in (whole, cut))
    assert [run["variant"] for run in a["runs"]] == ["base", "wide"] and a["settings"] == b[
        "settings"
    ]
    for one, other in zip(a["runs"], b["runs"], strict=True):
        assert one["budgets"] == other["budgets"] and len(one["readings"]) == 1 + (
            one["variant"] == "wide"
        )
        for step, reading in one["readings"].items():
            for name in ("measured", "loss", "weights_sha256"):
                assert reading[name] == other["readings"][step][name], (one["variant"], step, name)
    assert (
        not (cut / "base" / "0" / "steps").exists()
        and "Ablations" in (cut / "report.html").read_text()
    )
    before = (cut / "base" / "0" / "result.json").stat().st_mtime_ns
    assert cli.main([*command, "--out", str(cut)]) == 0
    assert (cut / "base" / "0" / "result.json").stat().st_mtime_ns == before
    other = [*command[:-3], "900", *command[-2:], "--out", str(cut)]
    shutil.rmtree(cut / "wide")
    assert cli.main(other) == 1  # runs of two budgets
