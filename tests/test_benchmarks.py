"""Every benchmark still runs: each module's --smoke, as its own command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.parity import needs_asset

ROOT = Path(__file__).parent.parent
HELPERS = {"peers", "torch_step"}  # of demo_speed
ASSETS = {
    "data": ("photos", "smollm2-135m-instruct"),
    "demo_speed": ("smollm2-135m-instruct", "dinov2-small"),
    "lmms": ("easy-vqa",),
}
NAMES = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if path.stem != "__init__" and path.stem not in HELPERS
)
CASES = [
    pytest.param(name, marks=[needs_asset(asset) for asset in ASSETS.get(name, ())])
    for name in NAMES
]


@pytest.mark.parametrize("name", CASES)
def test_smoke(name):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]


def test_helpers_are_no_commands():
    assert not [
        name for name in HELPERS if "__main__" in (ROOT / "benchmarks" / f"{name}.py").read_text()
    ]
