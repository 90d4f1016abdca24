"""Machines around a command: no such device, 64 bits, odd caches, full disks, terminals that know
few letters or close.
"""

import errno
import io
import os
import pty
import signal
import subprocess
import sys

import jax
import pytest

from evlm_jax import assets, cli, paths
from evlm_jax.checkpoint.atomic_dir import new_folder
from evlm_jax.cli.parser import reported
from evlm_jax.parallel.distributed import check_devices, stopping
from evlm_jax.parallel.status import INTERRUPTED, PREEMPTED


@pytest.mark.ci
def test_a_device_that_is_not_there_is_no_damaged_checkpoint():
    done = subprocess.run(
        [sys.executable, "-c", "from evlm_jax.parallel import distributed as d; d.check_devices()"],
        env=os.environ | {"JAX_PLATFORMS": "nope"},
        capture_output=True,
        text=True,
    )
    assert "ValueError: JAX_PLATFORMS=nope: no device: Unable to initialize" in done.stderr


def test_64_bits_are_refused():
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(ValueError, match="JAX_ENABLE_X64: models compute in at most 32 bits"):
            check_devices()
    finally:
        jax.config.update("jax_enable_x64", False)


def test_the_cache_is_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EVLM_CACHE", "~/cache")
    assert assets.cache_root() == tmp_path / "cache"
    line = reported(PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/cache/a"))
    assert line.endswith("EVLM_CACHE names another cache")
    (tmp_path / "cache").write_text("")
    with pytest.raises(assets.AssetError, match="EVLM_CACHE=~/cache is no folder"):
        assets.cache_root()


def test_a_home_that_a_shell_has_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(paths.place("~/run")) == f"{tmp_path}/run"
    (tmp_path / "llm").mkdir()
    assert assets.locate("~/llm") == tmp_path / "llm"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: .*a.bin"):
        with paths.writing(tmp_path / "a.bin"):
            os.write(os.open("/dev/full", os.O_WRONLY), b"a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OSError, match=f"{tmp_path}/{place[:4]} is no folder; give another place"):
        paths.probe(tmp_path / place)
    if place == "link":
        with pytest.raises(FileExistsError, match="link exists"), new_folder(tmp_path / place, {}):
            pass


def test_a_working_directory_that_is_gone(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError, match="run: the working directory is gone"):
        paths.place("run")


def test_letters_that_a_terminal_does_not_know(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert cli.main(["fetch", "nothing"]) == 1
    print("ü", flush=True)
    assert written.getvalue().endswith(b"\\xfc\n")


@pytest.mark.parametrize(
    "came, status",
    [
        (signal.SIGTERM, PREEMPTED),
        (signal.SIGHUP, PREEMPTED),
        (signal.SIGINT, INTERRUPTED),
    ],
)
def test_signals_stop_between_steps(came, status):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run in nohup
    with stopping() as stop:
        assert stop(1) == 0
        os.kill(os.getpid(), came)
        assert stop(1) == status
    signal.signal(signal.SIGHUP, before)


def test_nohup_is_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop(1) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.ci
def test_a_terminal_that_closes_stops_a_run_as_a_signal_does(tmp_path):
    """What is printed then is no error."""
    script = (
        "import pathlib, signal, sys, time; from evlm_jax.parallel.distributed import stopping\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored\n"
        "with stopping() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop(1): time.sleep(0.05)\n"
        "    print('saved', flush=True)\n"
        "    print('saved', file=sys.stderr, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'status')!r}).write_text(str(stop(1)))\n"
    )
    terminal, inner = pty.openpty()
    command = ["setsid", "--ctty", sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner) as process:
        os.close(inner)
        assert b"ready" in os.read(terminal, 100)
        os.close(terminal)
        assert process.wait(60) == 0
    assert (tmp_path / "status").read_text() == str(PREEMPTED)
