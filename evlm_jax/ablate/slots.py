"""Runs as processes of their own, several at a time, each on its share of the machine.

Imports nothing that starts threads.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
PATIENCE = 60  # seconds, enough to save


class Slot(NamedTuple):
    """Room for one run."""

    cores: tuple[int, ...]
    gpu: str | None  # its number; None: what JAX finds


class Run(NamedTuple):
    """A run by name, and its command."""

    name: str
    command: list[str]
    log: Path


def slots(jobs: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """`jobs` slots that share the cores evenly, or one for each GPU.

    Raises ValueError where a slot would have no core.
    """
    count = len(gpus) or jobs
    if not 1 <= count <= len(cores):
        raise ValueError(
            f"ablate: {count} runs at a time cannot share {len(cores)} cores; set --jobs from 1 to"
            f" {len(cores)}"
        )
    share = [
        tuple(cores[len(cores) * i // count : len(cores) * (i + 1) // count]) for i in range(count)
    ]
    return [Slot(own, gpus[i] if gpus else None) for i, own in enumerate(share)]


def run_all(
    todo: Sequence[Run], room: Sequence[Slot], say: Callable[[str], None] = print
) -> list[str]:
    """Runs all; returns the names of those that failed.

    Stopped, it stops its runs, and returns when they have saved what they have.
    """
    waiting, running, failed = list(todo), {}, []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            for slot in [slot for slot in room if slot not in running][: len(waiting)]:
                run = waiting.pop(0)
                running[slot] = run, _start(run, slot), time.monotonic()
                say(f"{run.name}: begins; {len(waiting)} wait")
            for slot, (run, process, since) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    failed += [run.name] if process.returncode else []
                    end = (
                        f"failed, the end of {run.log}:\n{_tail(run.log)}"
                        if process.returncode
                        else "done"
                    )
                    say(f"{run.name}: {end} after {(time.monotonic() - since) / 60:.1f} min")
            time.sleep(0.2)
    finally:
        _stop([process for _, process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ends them by SIGTERM; again each PATIENCE seconds, for training that was at its end takes the
    first and goes on to be read.
    """
    while alive := [process for process in processes if process.poll() is None]:
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(process.poll() is None for process in alive):
            time.sleep(0.1)


def bind(cores: Sequence[int] | None) -> None:
    """What a run does first: keeps itself, and the threads it will start, to its cores, and ends by
    SIGTERM when its parent ends.

    Raises ValueError where this machine has no such cores.
    """
    try:
        os.sched_setaffinity(0, cores or os.sched_getaffinity(0))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--cores {','.join(map(str, cores))}: this machine has {os.cpu_count()}, from 0:"
            f" {error}"
        ) from error
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(run: Run, slot: Slot) -> subprocess.Popen:
    """The process of a run, told its cores and its GPU."""
    environment = os.environ | ({} if slot.gpu is None else {"CUDA_VISIBLE_DEVICES": slot.gpu})
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a") as log:
        command = [*run.command, "--cores", ",".join(map(str, slot.cores))]
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-5:])
