"""Golden run folders (tests/golden): what earlier code saved loads, goes on and is exported as that
code would have done.
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from evlm_jax import cli
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.safetensors_file import read_folder
from evlm_jax.config import from_saved
from evlm_jax.config.load import load_config
from evlm_jax.convert.export import export
from evlm_jax.convert.readers import read_torch
from evlm_jax.data.pipeline import batches
from evlm_jax.data.tokenizer import load_tokenizer

GOLDEN = sorted(
    path
    for path in (Path(__file__).parent / "golden").iterdir()
    if path.is_dir() and path.name != "__pycache__"
)


# Fields of a batch as they were called when the folders were made, and today.
RENAMED = {
    "seen_until": "visible_until",
    "target_at": "target_positions",
    "tile_tokens": "block_tokens",
    "token_tile": "token_place",
    "pair_tile": "pair_block",
}


def sha(array) -> str:
    """As in golden/make.py, which needs torch."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()[
        :20
    ]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request, tmp_path, monkeypatch):
    """A copy of a golden folder, as the working directory; what is expected of it."""
    shutil.copytree(request.param, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return json.loads(Path("expected.json").read_text())


def test_parameters_moments_and_data_position_are_equal(golden):
    snapshot = store.read("run")
    for part in ("params", "frozen", "groups"):
        assert {
            name: sha(array) for name, array in sorted(getattr(snapshot, part).items())
        } == golden[part]
    assert snapshot.meta["data"] == golden["data"]


def test_the_next_batches_are_equal(golden):
    cfg = load_config("experiment.py")
    assert from_saved(store.read("run").meta["config"]) == cfg
    with contextlib.closing(batches(cfg, load_tokenizer(cfg.init.llm))) as stream:
        stream.set_state(golden["data"])
        made = [next(stream)[0]._asdict() for _ in golden["batches"]]
    assert [{name: sha(x) for name, x in batch.items() if x is not None} for batch in made] == [
        {RENAMED.get(name, name): x for name, x in old.items()} for old in golden["batches"]
    ]


# The first and the last of them hold what the others do.
SELDOM = {"format0_experts": pytest.mark.pinned, "format1_dense": pytest.mark.pinned}
SELDOM |= {"format1_experts": pytest.mark.ci}


@pytest.mark.parametrize(
    "golden",
    [pytest.param(p, marks=SELDOM.get(p.name, ())) for p in GOLDEN],
    ids=lambda path: path.name,
    indirect=True,
)
def test_it_goes_on_with_the_same_losses(golden):
    assert cli.main(["train", "--config", "experiment.py", "--workdir", "run"]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {str(line["step"]): line["loss"] for line in lines if "loss" in line}
    for step, loss in golden["losses"].items():
        assert losses[step] == pytest.approx(loss, rel=1e-5), step


@pytest.mark.parametrize("form", ["hf", pytest.param("torch", marks=pytest.mark.ci)])
def test_its_export_has_equal_tensors(golden, form):
    if form == "torch":
        pytest.importorskip("torch", reason="needs the extra parity")
    export("run", "export", form)
    tensors = (
        read_folder(Path("export")) if form == "hf" else read_torch(Path("export/evlm.pt")).tensors
    )
    assert {
        name: sha(tensor.read().astype(np.float32)) for name, tensor in sorted(tensors.items())
    } == golden[form]


def test_a_step_is_readable_by_orbax_alone(golden):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for part in ("params", "groups"):
            found = flatten_dict(reader.restore(Path("run/steps/6").absolute() / part), sep="/")
            assert {
                name: sha(np.asarray(array)) for name, array in sorted(found.items())
            } == golden[part]


@pytest.mark.parametrize("golden", GOLDEN[:1], ids=lambda path: path.name, indirect=True)
@pytest.mark.pinned
def test_a_run_needs_its_towers_no_more(golden):
    """Once it has gone on for a step under this code; also to be exported."""
    go_on = ["train", "--config", "experiment.py", "--workdir", "run"]
    assert cli.main([*go_on, "--config.train.steps=7"]) == 0
    shutil.rmtree("vision")
    shutil.rmtree("llm")
    assert cli.main([*go_on, "--config.train.steps=8"]) == 0 and store.steps("run")[-1] == 8
    export("run", "export", "hf")


@pytest.mark.pinned
def test_cached_taps_are_of_one_tower_before_and_after_a_resume(tmp_path, monkeypatch):
    """Frozen towers may be stored in bfloat16: taps are of what is stored,
    from the first update on.
    """
    shutil.copytree(GOLDEN[-1].with_name("format1_dense"), tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    rules = "{'pattern':'^(xattn|media|bridge)/','lr':1.0},{'pattern':'^(vit|llm)/','lr':None}"
    fields = [
        "data.cache_features=True",
        "train.frozen_dtype=bfloat16",
        f"optim.phases=({{'start':0.0,'warmup':0,'rules':({rules})}},)",
    ]
    for steps in (1, 2):
        words = [
            "train",
            "--config",
            "experiment.py",
            "--workdir",
            "cached",
            *(f"--config.{field}" for field in fields),
        ]
        assert cli.main([*words, f"--config.train.steps={steps}"]) == 0
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
