"""Every benchmark still runs: each module's --smoke, as `python -m` would run it, but in this
process, which has imported most of what they need.
"""

import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.parity import needs_asset

ROOT = Path(__file__).parent.parent
HELPERS = {"peers", "pods_page", "step_profile", "torch_step"}  # of demo_speed and pods
ASSETS = {
    "data": ("photos", "smollm2-135m-instruct"),
    "demo_speed": ("smollm2-135m-instruct", "dinov2-small"),
    "lmms": ("easy-vqa",),
    "quantised": ("easy-vqa",),
}
NAMES = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if path.stem != "__init__" and path.stem not in HELPERS
)
QUICK = {"expert_loads", "packing", "pods", "products"}


def marks(name: str) -> list:
    """What a benchmark needs, and `ci` where it takes more than a few seconds."""
    needs = [needs_asset(asset) for asset in ASSETS.get(name, ())]
    return needs if name in QUICK else [*needs, pytest.mark.ci]


CASES = [pytest.param(name, marks=marks(name)) for name in NAMES]


@pytest.mark.parametrize("name", CASES)
def test_smoke(name, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert capfd.readouterr().out.strip()


def test_helpers_are_no_commands():
    assert not [
        name for name in HELPERS if "__main__" in (ROOT / "benchmarks" / f"{name}.py").read_text()
    ]
