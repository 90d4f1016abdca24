"""The wheel: built, installed outside the checkout into an environment of its own, and every
subcommand runs once from there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from evlm_jax.cli import COMMANDS
from evlm_jax.config import to_dict
from tests.evals import layouts
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ci
RUNS = [  # in the folder `place`; a later one may need what earlier ones left
    "fetch photos",
    "train --config experiment.py --workdir run --tensorboard",
    "generate --checkpoint run --image pictures/0.png --prompt which --max-new-tokens 4",
    "eval --checkpoint run --task gqa --data gqa --out gqa.json",
    "score gqa.json",
    "convert import --config experiment.py --out imported",
    "convert export --checkpoint run --out exported",
    "convert verify run run --image pictures/0.png --prompt which",
    "upcycle --checkpoint run --config experts.py --out experts",
    "flops --config experiment.py --frames 2 --text 9 --context 12",
    "plan --config experiment.py --topology cpu:1",
    "data inspect experiment.py --out inspect.html",
    "data stats experiment.py",
    "data bench experiment.py --documents 20",
    "data build experiment.py --source folder:pictures --out built --workers 1",
    (
        "ablate --config ablation.py --variants base --seeds 1 --questions 100 --test 10 --out"
        " ablation"
    ),
]
# In one process: each would import and compile anew what the others have.
ALL = """
import sys
from evlm_jax.cli import main
sys.exit(next((f"failed: {words}" for words in sys.argv[1:] if main(words.split())), None))
"""


def run(*command, cwd: Path) -> str:
    """What a process prints that knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("evlm_jax", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        folder / "dist",
        folder,
        cwd=folder,
    )
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory):
    """Where the commands of an environment lie that has the wheel; what it depends on is taken from
    this environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny towers, data, experiments and a run that was cut off."""
    folder = tmp_path_factory.mktemp("elsewhere") / "place"
    shutil.copytree(ROOT / "tests/golden/format1_dense", folder)
    shutil.copy(ROOT / "tests/golden/format0_experts/experiment.py", folder / "experts.py")
    data = {
        "sources": ("easy-vqa",),
        "weights": (1.0,),
        "template": "plain",
        "length": 600,
        "images": 3,
        "targets": 200,
        "block_pairs": 90,
    }
    init = {"vision": "vision", "llm": "llm", "centre_norms": True}
    cfg = tiny_config(init=init, data=data | {"cache_features": True}, optim={"min_lr": 1e-3})
    (folder / "ablation.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(variant):\n    return"
        f" ConfigDict({to_dict(cfg)!r})\n"
    )
    layouts.write("gqa", folder / "gqa")
    return folder


def test_it_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (
        file for package in ("evlm_jax", "experiments") for file in (ROOT / package).rglob("*.*")
    )
    assert held == {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"}


@needs_asset("photos")
@needs_asset("easy-vqa")
@needs_asset("openmoji")
def test_every_subcommand_runs(scripts, place):
    assert {words.split()[0] for words in RUNS} == COMMANDS.keys() - {
        "demo",  # which CI runs
        "chat",  # serves until it is interrupted
    }
    run(scripts / "evlm", *RUNS[0].split(), cwd=place)
    run(scripts / "python", "-c", ALL, *RUNS[1:], cwd=place)
    assert all(
        (place / name).is_file()
        for name in ("inspect.html", "ablation/report.html", "exported/modeling_evlm.py")
    )


def test_its_modules_and_experiments_are_found_anywhere(scripts, place):
    code = (
        "import evlm_jax, experiments.demo as demo; print(evlm_jax.__file__); print(demo.__file__);"
        " demo.get_config('fast')"
    )
    assert all(
        line.startswith(str(scripts.parent))
        for line in run(scripts / "python", "-c", code, cwd=place).splitlines()
    )
    assert "SUBCOMMAND" in run(scripts / "python", "-m", "evlm_jax", "--help", cwd=place)
    run(
        scripts / "evlm",
        "plan",
        "--config",
        "experiments/demo.py:fast",
        "--topology",
        "cpu:1",
        "--what",
        "encode",
        cwd=place,
    )
