"""The mesh: on eight devices (tests/mesh/devices.py), on several processes, and what is refused before anything is compiled."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from evlm_jax.sharding import RULES, check_parameters, make_layout, mesh_sizes
from evlm_jax.train import Phase
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent


def test_on_eight_devices(capsys):
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/mesh/devices.py"]
    run = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, cwd=ROOT, capture_output=True, text=True)
    with capsys.disabled():
        print(f"\non eight devices: {run.stdout.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    "mesh, message",
    [
        ({"data": 3}, r"mesh .*'data': 3.* is 3 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "one of data and fsdp may be -1"),
        ({"data": 1, "fsdp": 0}, "axes are positive"),
        ({"data": -1, "tensor": 3}, "their product must be that"),
        ({"data": 4, "tensor": 2, "slices": 3}, "mesh.slices = 3 must divide mesh.data = 4"),
        ({"data": 8}, r"train.batch / train.accumulate = 2 rows cannot be split over 8 devices .*multiple, or give devices to mesh.tensor"),
        ({"data": 1, "tensor": 8}, "llm.heads = 4 must be a multiple of mesh.tensor = 8"),
        ({"data": 1, "fsdp": 2, "tensor": 4}, "llm.kv_heads = 2 must be a multiple of mesh.tensor = 4"),
    ],
)
def test_a_wrong_mesh_is_refused_before_any_compilation(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_layout(tiny_config(mesh=mesh), jax.devices() * 8)


def test_experts_and_images_must_divide():
    cfg = tiny_config(moe={"copies": 3, "slices": 1}, mesh={"data": 1, "expert": 2})
    with pytest.raises(ValueError, match="3 experts cannot be split over mesh.expert = 2"):
        make_layout(cfg, jax.devices() * 2)
    odd = tiny_config(data={"images": 3}, mesh={"data": 1, "tensor": 2})
    with pytest.raises(ValueError, match="data.images = 3 must be a multiple of mesh.tensor = 2"):
        make_layout(odd, jax.devices() * 2)
    with pytest.raises(ValueError, match="vit.heads = 1 must be"):
        make_layout(tiny_config(vit={"heads": 1}, mesh={"data": 1, "tensor": 2, "images": "rows"}), jax.devices() * 2)


def test_sizes_of_axes():
    mesh = tiny_config(mesh={"data": 2, "fsdp": -1, "tensor": 4}).mesh
    assert mesh_sizes(mesh, 64) == {"data": 2, "fsdp": 8, "expert": 1, "tensor": 4}
    assert mesh_sizes(replace(mesh, fsdp=8), 64)["fsdp"] == 8


def test_a_parameter_that_no_rule_covers_is_named(monkeypatch):
    cfg = tiny_config()
    phase = Phase(cfg, 0, make_layout(cfg))
    monkeypatch.delitem(RULES, "heads")
    with pytest.raises(ValueError, match=r"xattn/q/kernel has axes \('embed', 'heads'\): name every dimension by one of whole, norm"):
        check_parameters(phase.layout, phase.shapes, lambda path: "/".join(map(str, path)))
