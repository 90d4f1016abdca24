"""`evlm train --dry-run` on a run that earlier code saved (tests/golden): it says what would run,
changes nothing, and refuses what the run itself would refuse.
"""

import shutil
from pathlib import Path

import pytest

from evlm_jax import cli

GOLDEN = Path(__file__).parent / "golden" / "format1_dense"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the run with its towers and data, as the working directory."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


def content(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dry(*words: str) -> int:
    return cli.main(["train", "--config", "experiment.py", "--dry-run", *words])


def test_a_new_run(folder, capsys):
    before = content(folder)
    assert dry("--workdir", "new") == 0
    said = capsys.readouterr().out
    assert "would begin with vision and llm" in said
    assert "1 devices (cpu) of 1 processes: data 1 fsdp 1 expert 1 tensor 1" in said
    assert "phase 0, steps 0 to" in said and "no step was made" in said
    assert dry("--workdir", "new", "--init", "run") == 0
    assert "would begin with run" in capsys.readouterr().out
    assert content(folder) == before


def test_a_run_that_goes_on(folder, capsys):
    before = content(folder)
    assert dry("--workdir", "run") == 0
    said = capsys.readouterr().out
    assert "would go on from step 6 of run" in said and "steps 6 to" in said
    assert content(folder) == before


def test_an_imported_model_is_a_beginning_and_no_run(folder, capsys):
    assert cli.main(["convert", "import", "--config", "experiment.py", "--out", "towers"]) == 0
    assert dry("--workdir", "new", "--init", "towers") == 0
    assert dry("--workdir", "towers") == 1
    assert "is no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.mesh.fsdp=3"], "is 3 devices, there are 1"),
        (["--init", "nowhere"], "nowhere: no such folder"),
        (["--config.init.vision=nowhere"], "nowhere"),
        (["--config.data.sources=('folder:nowhere',)", "--config.data.weights=(1,)"], "nowhere"),
        (["--config.llm.layers=3"], "layers"),
        (["--step", "3"], "has no checkpoint"),
        (["--workdir", "experiment.py"], "experiment.py"),
        (["--workdir", "run", "--config.data.seed=5"], "data.seed was"),
    ],
)
def test_what_the_run_would_refuse(folder, words, message, capsys):
    before = content(folder)
    elsewhere = () if "--workdir" in words else ("--workdir", "new")
    assert dry(*elsewhere, *words) == 1
    assert message in capsys.readouterr().err
    assert content(folder) == before
