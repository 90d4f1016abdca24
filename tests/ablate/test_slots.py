"""Runs side by side: each on its own cores; failures are named, nothing outlives its parent."""

import argparse
import os
import signal
import subprocess
import sys
import time

import pytest

from evlm_jax.ablate import arguments
from evlm_jax.ablate.slots import Run, Slot, run_all, slots


def python(name, tmp_path, code):
    return Run(name, [sys.executable, "-c", code], tmp_path / f"{name}.txt")


def test_cores_are_shared_evenly():
    assert slots(2, [0, 1, 2, 3, 4], []) == [Slot((0, 1), None), Slot((2, 3, 4), None)]
    assert slots(1, [0, 1], ["3", "5"]) == [Slot((0,), "3"), Slot((1,), "5")]
    with pytest.raises(ValueError, match="3 runs at a time cannot share 2 cores"):
        slots(3, [0, 1], [])


@pytest.mark.parametrize("argument", ["--gpus", "--cores", "--variants"])
def test_what_is_named_twice_is_refused(argument, capsys):
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([argument, "0,1,0"])
    assert f"argument {argument}: 0 is given twice" in capsys.readouterr().err


def test_each_run_has_its_cores_and_its_gpu(tmp_path):
    core = min(os.sched_getaffinity(0))
    code = """
import os, sys
from evlm_jax.ablate.slots import bind
bind([int(sys.argv[-1])])
print(len(os.sched_getaffinity(0)), *os.sched_getaffinity(0), os.environ["CUDA_VISIBLE_DEVICES"])
"""
    assert run_all([python("a", tmp_path, code)], [Slot((core,), "7")], lambda _: None) == []
    assert (tmp_path / "a.txt").read_text() == f"1 {core} 7\n"


def test_a_failure_is_told_and_the_others_run(tmp_path):
    said, cores = [], sorted(os.sched_getaffinity(0))
    runs = [
        python("bad", tmp_path, "raise ValueError('why')"),
        *(python(name, tmp_path, "print(1)") for name in "ab"),
    ]
    assert run_all(runs, slots(1, cores, []), said.append) == ["bad"]
    assert any("why" in line for line in said) and (tmp_path / "b.txt").read_text() == "1\n"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_its_parent(tmp_path, how):
    core, log = min(os.sched_getaffinity(0)), tmp_path / "a.txt"
    sleeps = (
        f"import os, time; from evlm_jax.ablate import slots; slots.bind([{core}]);"
        " print(os.getpid(), flush=True); time.sleep(600)"
    )
    code = f"""
from pathlib import Path
from evlm_jax.ablate.slots import Run, Slot, run_all
run = Run("a", [{sys.executable!r}, "-c", {sleeps!r}], Path({str(log)!r}))
run_all([run], [Slot(({core},), None)])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait(lambda: log.exists() and log.read_text())
    child = int(log.read_text())
    parent.send_signal(how)
    parent.wait()
    wait(lambda: not alive(child))


def alive(process):
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
