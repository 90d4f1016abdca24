"""`evlm train` in processes of its own: signals, kills, a full disk, a folder that cannot be
written.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from evlm_jax.checkpoint import store
from evlm_jax.config import to_dict
from tests.data.made import write_jsonl
from tests.helpers.checkpoints import dinov2_directory, llama_directory
from tests.helpers.tiny import tiny_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
EXPERIMENT = (
    "import json\nfrom ml_collections import ConfigDict\nget_config = lambda:"
    " ConfigDict(json.loads({!r}), convert_dict=True)\n"
)
SECONDS = 600  # nothing here takes as long


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A file for --config: tiny towers, forty rows about one picture, more updates than anybody
    waits for.
    """
    folder = tmp_path_factory.mktemp("experiment")
    Image.new("RGB", (20, 20), (200, 30, 60)).save(folder / "a.png")

    def turns(i):
        return [
            {"from": "human", "value": "<image>q" + "?" * (i % 5)},
            {"from": "gpt", "value": "red" * (1 + i % 2)},
        ]

    rows = write_jsonl(
        folder / "rows.jsonl",
        [{"id": f"r{i}", "image": "a.png", "conversations": turns(i)} for i in range(40)],
    )
    cfg = tiny_config(
        data={"sources": (rows,), "weights": (1.0,)},
        train={"steps": 100_000, "save_every": 100_000, "log_every": 1},
    )
    dinov2_directory(folder / "vision", cfg), llama_directory(folder / "llm", cfg)
    cfg = replace(
        cfg, init=replace(cfg.init, vision=str(folder / "vision"), llm=str(folder / "llm"))
    )
    (folder / "mine.py").write_text(EXPERIMENT.format(json.dumps(to_dict(cfg))))
    return folder / "mine.py"


def start(experiment, workdir, *words) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "evlm_jax",
        "train",
        "--config",
        experiment,
        "--workdir",
        workdir,
        *words,
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reach(process, workdir, updates: int) -> None:
    """Waits until so many updates are written down, and the process lives."""
    deadline, file = time.monotonic() + SECONDS, workdir / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < updates:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def end(process) -> tuple[int, str, list[str]]:
    """Exit status, output, and lines of errors without those of the bar."""
    out, err = process.communicate(timeout=SECONDS)
    return (
        process.returncode,
        out,
        [
            line
            for line in err.replace("\r", "\n").splitlines()
            if line.startswith("evlm: ") or "Traceback" in line
        ],
    )


def test_signals_save_and_say_so(experiment, tmp_path):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        before = max(store.steps(tmp_path), default=0)
        process = start(experiment, tmp_path)
        reach(process, tmp_path, before + 3)
        process.send_signal(number)
        code, out, told = end(process)
        step = max(store.steps(tmp_path))
        assert code == status and step >= before + 3
        assert told == [
            f"evlm: stopped by a signal at step {step} of 100000, saved at {step}: the same command"
            " goes on"
        ]
        assert not before or f"resume from step {before}" in out


def test_killed_and_started_again_at_once(experiment, tmp_path):
    process = start(experiment, tmp_path, "--config.train.save_every=2")
    reach(process, tmp_path, 5)
    process.kill()
    again = start(experiment, tmp_path, "--config.train.save_every=2")
    process.wait()
    kept, written = (
        max(store.steps(tmp_path)),
        len((tmp_path / "metrics.jsonl").read_text().splitlines()),
    )
    assert kept >= 2
    reach(
        again, tmp_path, written + 1
    )  # it has begun by leaving out what was written behind the step that was kept
    again.terminate()
    code, out, _ = end(again)
    assert code == 75 and f"resume from step {kept}" in out


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a tmpfs with options at a new folder; only root can."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            check=False,
        ).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def test_a_full_disk_is_told_of(experiment, mounted):
    """In one line: orbax's threads log no tracebacks. What was saved before is whole."""
    disk = mounted("size=4m")
    code, _, told = end(
        start(experiment, disk, "--config.train.save_every=1", "--config.train.keep=1000")
    )
    assert code == 1 and len(told) == 1, told
    assert (
        told[0].startswith(f"evlm: {disk}: a save failed") and "No space left on device" in told[0]
    )
    assert store.steps(disk) and store.read(disk).meta["step"] == max(store.steps(disk))


def test_a_folder_that_cannot_be_written_is_told_of_before_anything_is_read(experiment, mounted):
    disk = mounted("ro")
    code, _, told = end(start(experiment, disk))
    assert code == 1 and len(told) == 1 and str(disk) in told[0]
