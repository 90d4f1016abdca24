"""Several processes, one run: how they find each other, what they tell each other, and which of
them speaks.

A process runs this program on one host of a pod. All of them dispatch the same steps; only process
0 prints, writes metrics and deletes. Alone, every function here is trivial, so nothing else asks
how many there are."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from evlm_jax.parallel.status import INTERRUPTED, PREEMPTED


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others; arguments that are left out come from the environment (a
    TPU pod, GKE, Slurm, Open MPI).

    Args:
      coordinator: "HOST:PORT" of process 0.
      processes: their number.
      process: number of this one, from 0.
    Raises:
      ValueError: some of the three are given, but not all, and the environment lacks the rest;
        or they contradict one another.
    """
    if coordinator and not re.fullmatch(r".+:[0-9]+", coordinator):
        raise ValueError(f"--coordinator {coordinator}: give HOST:PORT, as 10.0.0.2:8476")
    if None not in (processes, process) and process >= processes:
        raise ValueError(f"--process {process} of --processes {processes}: they count from 0")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"processes: {error}; give --coordinator HOST:PORT, --processes N and --process I"
        ) from error


def check_devices() -> None:
    """Raises ValueError where JAX has no device, or was told to compute in 64 bits."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        said = next(iter(str(error).splitlines()), "it is not installed")
        raise ValueError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: no device: {said}"
        ) from error
    if jax.config.jax_enable_x64:
        raise ValueError("JAX_ENABLE_X64: models compute in at most 32 bits: leave it out")


def is_first() -> bool:
    """Whether this is the process that logs and writes shared files."""
    return jax.process_index() == 0


def log_once(text: str) -> None:
    """Prints a line, on the first process alone."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Blocks until all processes have called it; `name` identifies the place in errors."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def allgather_json(value: Any) -> list:
    """JSON-able values of all processes, in order of process, on each of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes)]


def fetch_to_host(tree: Any) -> Any:
    """All arrays of a tree as NumPy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], int]]:
    """Context that turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that closes, unless nohup
    has it ignored) into a stop between steps.

    Yields:
      a function of the number of finished steps: the exit status to stop with, or 0 to continue.

    A signal to one process stops all of them at the same step. A second Ctrl-C interrupts at once.
    """
    alone, came = jax.process_count() == 1, []
    terminal = [number for number in (1, 2) if os.isatty(number)]

    def note(number: int, _frame) -> None:
        if number in came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        if number == signal.SIGHUP:  # what is printed from here on would be an error
            for stream in terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not alone:
            os.kill(
                os.getpid(), signal.SIGTERM
            )  # jax.distributed has its own handler, which tells the others

    numbers = [signal.SIGTERM, signal.SIGINT] if alone else [signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    reached = (lambda step: bool(came)) if alone else multihost_utils.reached_preemption_sync_point
    try:
        yield (
            lambda step: (
                (INTERRUPTED if signal.SIGINT in came else PREEMPTED) if reached(step) else 0
            )
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
