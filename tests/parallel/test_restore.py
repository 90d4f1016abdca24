"""Four processes restore a checkpoint that eight devices saved on another mesh: what each reads,
and how its memory grows.
"""

import json
import math
import socket
import subprocess
import sys

import pytest

from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from tests.mesh.restore import config, write
from tests.parallel.test_eight_devices import ROOT, devices

pytestmark = pytest.mark.mesh
ROOM = 300 * 10**6  # bytes by which a process may grow beside its shards


def restore(workdir, count: int, size: int, mesh: tuple) -> list[dict]:
    """What processes of tests/mesh/restore.py say, which share the mesh's devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [str(count), str(port), str(workdir), str(size), str(mesh)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.mesh.restore", str(process), *words],
            cwd=ROOT,
            env=devices(math.prod(mesh) // count),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(count)
    ]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), said
    lines = [line for text in said for line in text.splitlines() if line.startswith("{")]
    return list(map(json.loads, lines))


def check_share(found: list[dict]) -> None:
    """Each has read its share and what every device holds whole, and nothing was read twice."""
    for one in found:
        assert one["read"] <= one["all"] / len(found) + one["replicated"], found
    assert sum(one["read"] for one in found) == found[0]["all"], found


@pytest.mark.ci
def test_each_process_reads_its_share(tmp_path):
    """Two restore what one device saved; the worker compares the values. A tensor that is damaged
    then is refused by both, though one has read it.
    """
    cfg = config((1, 1, 1, 1), 64)
    write(cfg, TrainPhase(cfg, 0, make_layout(cfg)), tmp_path)
    check_share(found := restore(tmp_path, 2, 64, (1, 1, 1, 2)))
    assert all("is not what was written there" in one["refused"] for one in found)
    assert found[0]["refused"] == found[1]["refused"]


@pytest.mark.slow
def test_memory_grows_by_the_shards(tmp_path):
    """Four restore some 500 MB that eight devices saved in other pieces."""
    restore(tmp_path, 1, 1024, (1, 8, 1, 1))
    found = restore(tmp_path, 4, 1024, (1, 2, 1, 2))
    print(found)
    check_share(found)
    for one in found:
        assert one["all"] > 4 * 10**8 and one["grown"] <= one["held"] + ROOM, found
