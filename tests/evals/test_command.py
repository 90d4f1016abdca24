"""`evlm eval` and `evlm score` on a checkpoint, from the command line to the saved result."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.data.samples import MARKER, ImageRef, Turn
from evlm_jax.evals import results, tasks
from evlm_jax.evals.answer import prompt_text
from evlm_jax.evals.task import Question
from evlm_jax.generate import Generator
from evlm_jax.runs import load_trained
from tests.evals import layouts
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config(data=dict(length=96, images=2, targets=32, block_pairs=24))  # noqa: C408
    run_directory(folder, cfg, random_model(cfg, 0))
    return folder


def evaluated(run, task, data, out, *more):
    assert (
        cli.main(
            [
                "eval",
                "--checkpoint",
                str(run),
                "--task",
                task,
                "--data",
                str(data),
                "--out",
                str(out),
                *more,
            ]
        )
        == 0
    )
    return results.load(out)


def test_answers_are_the_generator_s(run, tmp_path, capsys):
    data, out = layouts.write("gqa", tmp_path / "gqa"), tmp_path / "r.json"
    result = evaluated(run, "gqa", data, out, "--prompt", "qwen-vl")
    trained = load_trained(str(run))
    generator, image = (
        Generator(trained.model, trained.tokenizer),
        lambda i: ((ImageRef(str(data / "images" / f"n{i // 2}.jpg")),),),
    )
    turn = Turn("user", MARKER + "Is it red? Answer:")
    answers = generator.generate(
        [generator.prompt([turn], image(i)) for i in range(4)], max_new_tokens=16
    )
    assert [row["prediction"] for row in result["examples"]] == [
        answer.text.strip() for answer in answers
    ]
    assert result["examples"][3] | {"prediction": ""} == {
        "id": "203",
        "cluster": "n1",
        "prompt": "Is it red? Answer:",
        "answer": "yes",
        "prediction": "",
    }
    assert (
        result["provenance"]["checkpoint"].endswith("step 3")
        and result["weights_sha256"] == result["provenance"]["weights_sha256"]
    )
    assert result["preprocessing"]["resize"] == "squash" and "EVLM-Chat" in capsys.readouterr().out
    lines = out.with_suffix(".jsonl").read_text("utf-8")
    assert evaluated(run, "gqa", data, out, "--prompt", "qwen-vl")["scores"] == result["scores"]
    assert (
        out.with_suffix(".jsonl").read_text("utf-8") == lines and lines.count("\n") == 5
    )  # nothing was generated again


def test_the_plain_template_says_answer_by_itself():
    asked = Question("0", "Is it red? Answer:", (("a",), ("b",)), "yes", "0")
    assert prompt_text(asked, "plain") == 2 * MARKER + "Is it red?" and prompt_text(
        asked, "chatml"
    ).endswith("red? Answer:")


@pytest.mark.slow
def test_a_killed_command_goes_on(run, tmp_path):
    """SIGKILL while it answers; what it had answered stays, and the scores are those of a run that
    was not cut off.
    """
    data, out, whole = (
        layouts.write("gqa", tmp_path / "gqa"),
        tmp_path / "r.json",
        tmp_path / "whole.json",
    )
    row = json.loads((data / "testdev_balanced_questions.json").read_text())["200"]
    many = {str(i): row | {"question": f"Is it {i}?"} for i in range(160)}
    (data / "testdev_balanced_questions.json").write_text(json.dumps(many))
    log = out.with_suffix(".jsonl")
    command = [
        sys.executable,
        "-m",
        "evlm_jax",
        "eval",
        "--checkpoint",
        str(run),
        "--task",
        "gqa",
        "--data",
        str(data),
        "--batch",
        "4",
    ]
    process = subprocess.Popen([*command, "--out", str(out)], cwd=Path(cli.__file__).parents[2])
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_text("utf-8").count("\n") < 9:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = log.read_bytes()
    assert before.count(b"\n") < 161 and not out.exists()
    result = evaluated(run, "gqa", data, out, "--batch", "4")
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert result["scores"] == evaluated(run, "gqa", data, whole, "--batch", "4")["scores"]
    assert (
        log.read_bytes() == whole.with_suffix(".jsonl").read_bytes()
        and log.read_text("utf-8").count("\n") == 161
    )


def test_classes_by_lowest_loss(run, tmp_path):
    result = evaluated(
        run,
        "classes",
        layouts.write("classes", tmp_path / "c"),
        tmp_path / "r.json",
        "--limit",
        "4",
    )
    assert len(result["examples"]) == 4 and result["method"] == "lowest loss"
    for row in result["examples"]:
        assert sorted(row["ranking"]) == ["bird", "black cat", "dog"] and row["losses"] == sorted(
            row["losses"]
        )
        assert row["answer"] == "bird" and jnp.isfinite(np.array(row["losses"])).all()
    assert [row["value"] for row in result["scores"] if row["metric"] == "acc@5"] == [100]


@pytest.mark.ci
def test_videos_are_judged_later(run, tmp_path, capsys):
    data, out = layouts.write("video-captions", tmp_path / "v"), tmp_path / "r.json"
    assert {row["metric"] for row in evaluated(run, "video-captions", data, out)["scores"]} == {
        "not judged",
        "unreadable replies",
    }
    assert cli.main(["score", str(out), "--judge", "tests.evals.test_command:praise"]) == 0
    judged = {row["metric"]: row["value"] for row in results.load(out)["scores"]}
    assert (judged["verbosity"], judged["accuracy"], judged["not judged"]) == (3, 9, 0)
    assert len(tasks.find("video-captions").questions(data, None)[0].visuals[0]) == 16


def praise(prompt):
    return "Verbosity: 3\nAccuracy: 9"


def test_scores_are_computed_again_offline(run, tmp_path, capsys):
    data, a, b = layouts.write("gqa", tmp_path / "gqa"), tmp_path / "a.json", tmp_path / "b.json"
    evaluated(run, "gqa", data, a)
    content = json.loads(a.read_text("utf-8"))
    for row in content["examples"][:3]:
        row["prediction"] = "Yes"
    b.write_text(json.dumps(content | {"scores": []}), "utf-8")
    capsys.readouterr()
    assert cli.main(["score", str(b), "--against", str(a)]) == 0
    shown = capsys.readouterr().out
    assert (
        results.load(b)["scores"][0]["value"] == 75 and "difference" in shown and "75.00" in shown
    )
    assert cli.main(["score", str(a.with_suffix(".jsonl"))]) == 1


def test_errors_are_one_line(run, tmp_path, capsys):
    where = ["eval", "--checkpoint", str(run), "--task"]
    assert cli.main([*where, "nope"]) == 1 and "use one of ai2d" in capsys.readouterr().err
    data = layouts.write("gqa", tmp_path / "gqa")
    (data / "images" / "n1.jpg").unlink()
    assert cli.main([*where, "gqa", "--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "testdev_balanced_questions.json: row 202: no image" in error
