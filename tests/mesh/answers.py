"""Generation and losses on eight devices, and `evlm eval` there;
tests/parallel/test_eight_devices.py starts it in a process that has them.
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import evlm_jax
from evlm_jax import cli
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, question
from evlm_jax.evals import choice
from evlm_jax.evals.command import mesh_of
from evlm_jax.evals.monitor import monitor
from evlm_jax.generate import Generator
from evlm_jax.runs import load_trained
from tests.evals import layouts
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.mesh.devices import config

MESHES = {
    "dense": ["fsdp=4,tensor=2,frozen=sharded,images=rows"],
    "experts": ["data=2,fsdp=2,expert=2,frozen=sharded"],
    "other meshes": ["", "tensor=8"],  # the command below takes the first one too
    "llava": ["fsdp=4,tensor=2,frozen=sharded"],
}
RUNS = [
    "dense",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("experts", "other meshes", "llava")),
]


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A run's directory, and the data of a task."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = config(
        experts=request.param == "experts", kind="llava" if request.param == "llava" else "routed"
    )
    if request.param == "dense":  # caches of two lengths, norms over all heads of all devices
        cfg = replace(cfg, llm=replace(cfg.llm, window=(6, 0), qk_norm="all"))
    run_directory(folder, cfg, random_model(cfg, 0))
    return folder, layouts.write("gqa", folder / "gqa")


def found(trained, data):
    """(tokens of greedy answers, losses) to questions of several lengths about one, two and no
    pictures.
    """
    pictures = [ImageRef(str(path)) for path in sorted((data / "images").iterdir())]
    asked = [
        (
            f"{MARKER * (i % 3)}{'what is it' * (1 + i % 4)}?",
            tuple((pictures[k % len(pictures)],) for k in range(i % 3)),
        )
        for i in range(5)
    ]
    generator = Generator(trained.model, trained.tokenizer, rows=8, layout=trained.layout)
    with jax.default_matmul_precision("highest"):
        answers = generator.generate(
            [generator.prompt([Turn("user", text)], visuals) for text, visuals in asked], 12
        )
        dialogs = [
            Sample(str(i), "test", v, (question(t, "yes"), question(t, "a dog")))
            for i, (t, v) in enumerate(asked)
        ]
        losses = choice.answer_losses(
            trained.model, trained.tokenizer, dialogs, rows=8, layout=trained.layout
        )
    return [answer.tokens for answer in answers], np.array([loss for loss, _ in losses])


def test_answers_are_those_of_one_device(run):
    wanted, losses = found(load_trained(str(run[0])), run[1])
    assert len(set(wanted)) > 2
    for mesh in MESHES[run[0].name.rstrip("0")]:
        trained = load_trained(str(run[0]), mesh=mesh_of(mesh), rows=8)
        split = [x for x in jax.tree.leaves(trained.model) if not x.sharding.is_fully_replicated]
        assert len(trained.model.llm.embed[...].sharding.device_set) == 8 and bool(split) == bool(
            mesh
        )
        tokens, mine = found(trained, run[1])
        assert tokens == wanted, mesh
        np.testing.assert_allclose(mine, losses, rtol=1e-5, err_msg=mesh)


def evaluated(run, out, mesh="") -> dict:
    """What `evlm eval` writes."""
    words = ["--checkpoint", run[0], "--task", "gqa", "--data", run[1], "--out", out]
    assert cli.main(["eval", *map(str, words), *(["--mesh", mesh] if mesh else [])]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("run", ["dense"], indirect=True)
def test_the_command_and_monitors_take_all_devices(run, tmp_path):
    mesh = "fsdp=4,tensor=2,frozen=sharded"
    whole, pieces = (
        evaluated(run, tmp_path / name, mesh)
        for name, mesh in (("whole.json", ""), ("pieces.json", mesh))
    )
    assert whole["examples"] == pieces["examples"]
    assert all("prediction" in row for row in whole["examples"])

    trained = load_trained(str(run[0]), mesh=mesh_of(mesh), rows=8)
    cfg = trained.model.cfg
    followed = {"monitors": (f"gqa:{run[1]}",), "monitor_every": 1, "monitor_questions": 0}
    cfg = replace(cfg, train=replace(cfg.train, **followed))
    seen = monitor(cfg, trained.tokenizer, None, trained.layout)(1, lambda: trained.model)
    wanted = {f"monitor/gqa/{row['metric']}": row["value"] for row in whole["scores"]}
    assert {name: value for name, value in seen.items() if name != "monitor/seconds"} == wanted


@pytest.mark.parametrize("run", ["dense"], indirect=True)
def test_a_batch_that_devices_cannot_share_is_refused(run, capsys):
    words = [
        "eval",
        "--checkpoint",
        str(run[0]),
        "--task",
        "gqa",
        "--data",
        str(run[1]),
        "--batch",
        "6",
    ]
    assert (
        cli.main(words) == 1 and "6 rows cannot be split over 8 devices" in capsys.readouterr().err
    )


@pytest.mark.parametrize("run", ["dense"], indirect=True)
def test_the_library_spreads_a_model(run):
    """Over all devices; logits and loss are those of one."""
    one, all_of_them = (
        evlm_jax.load(run[0], devices=devices) for devices in (jax.devices()[0], jax.devices())
    )
    assert any(
        not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(all_of_them.params)
    )
    picture = str(sorted((run[1] / "images").iterdir())[0])
    samples = [evlm_jax.make_sample("what is it?", "a dog", images=picture)]
    with jax.default_matmul_precision("highest"):
        for ask in (
            lambda model: model.logits("a dog", picture),
            lambda model: model.loss(samples),
        ):
            wanted, found = map(np.asarray, map(ask, (one, all_of_them)))
            assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
