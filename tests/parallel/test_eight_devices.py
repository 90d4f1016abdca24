"""The mesh on eight devices: tests/mesh, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.mesh


def devices(count: int) -> dict[str, str]:
    """Environment of a process that has so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    "part, which",
    [
        pytest.param(part, which, marks=mark)
        for which, mark in (("not slow", pytest.mark.ci), ("slow", pytest.mark.slow))
        for part in ("devices", "runs", "answers")
    ]
    + [
        pytest.param("experts", "not slow", marks=pytest.mark.ci),
        pytest.param("published", "slow", marks=pytest.mark.slow),
    ],
)
def test_on_eight_devices(part, which, capsys):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        f"tests/mesh/{part}.py",
    ]
    run = subprocess.run(command, env=devices(8), cwd=ROOT, capture_output=True, text=True)
    with capsys.disabled():
        print(f"\n{part} on eight devices: {run.stdout.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
