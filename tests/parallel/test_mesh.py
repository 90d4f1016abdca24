"""The mesh: on several processes, and what is refused before anything is compiled. Eight devices
of one process are in test_eight_devices.py.
"""

import json
import math
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from evlm_jax.checkpoint import store
from evlm_jax.parallel.mesh import AXES, RULES, Layout, check_parameters, make_layout, mesh_sizes
from evlm_jax.phase import TrainPhase
from tests.evals import layouts
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config
from tests.parallel.test_eight_devices import ROOT, devices

pytestmark = pytest.mark.mesh


@pytest.mark.parametrize(
    "mesh, message",
    [
        ({"data": 3}, r"mesh .*'data': 3.* is 3 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "one of data and fsdp may be -1"),
        ({"data": 1, "fsdp": 0}, "axes are positive"),
        ({"data": -1, "tensor": 3}, "is 3 devices, there are 8: 3 must divide that"),
        ({"data": 4, "tensor": 2, "slices": 3}, "mesh.slices = 3 must divide mesh.data = 4"),
        ({"data": 8, "slices": 0}, "mesh.slices must be at least 1, got 0"),
        (
            {"data": 8},
            (
                r"train.batch / train.accumulate = 2 rows cannot be split over 8 devices"
                r" .*multiple, or give devices to mesh.tensor"
            ),
        ),
        ({"data": 1, "tensor": 8}, "llm.heads = 4 must be a multiple of mesh.tensor = 8"),
        (
            {"data": 1, "fsdp": 2, "tensor": 4},
            "llm.kv_heads = 2 must be a multiple of mesh.tensor = 4",
        ),
    ],
)
def test_a_wrong_mesh_is_refused_before_any_compilation(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_layout(tiny_config(mesh=mesh), jax.devices() * 8)


def test_rows_of_a_device_must_be_whole_groups():
    cfg = tiny_config(
        data={"image_group": 2}, train={"batch": 12, "accumulate": 2}, mesh={"data": 2}
    )
    with pytest.raises(
        ValueError,
        match=(
            r"3 rows of a device and micro-batch .* are no whole image groups of"
            r" data.image_group = 2: .*or data.image_group = 1"
        ),
    ):
        make_layout(cfg, jax.devices() * 2)
    with pytest.raises(
        ValueError, match="data.image_group must divide the rows of train.batch / train.accumulate"
    ):
        tiny_config(data={"image_group": 2}, train={"batch": 12, "accumulate": 4})
    with pytest.raises(
        ValueError,
        match=r"data.slots must lie in data.images..data.image_group \* data.images = 4..8",
    ):
        tiny_config(data={"image_group": 2, "slots": 9}, train={"batch": 2})


def test_experts_and_images_must_divide():
    cfg = tiny_config(moe={"copies": 3, "slices": 1}, mesh={"data": 1, "expert": 2})
    with pytest.raises(ValueError, match="3 experts cannot be split over mesh.expert = 2"):
        make_layout(cfg, jax.devices() * 2)
    odd = tiny_config(data={"images": 3}, mesh={"data": 1, "tensor": 2})
    with pytest.raises(ValueError, match="data.slots = 3 must be a multiple of mesh.tensor = 2"):
        make_layout(odd, jax.devices() * 2)
    with pytest.raises(ValueError, match="vit.heads = 1 must be"):
        make_layout(
            tiny_config(vit={"heads": 1}, mesh={"data": 1, "tensor": 2, "images": "rows"}),
            jax.devices() * 2,
        )


def test_adapters_wait_in_pieces():
    """Where rank or the other dimension has equal ones; they lie as they are used where neither
    has.
    """
    mesh = jax.sharding.AbstractMesh((1, 1, 4, 1, 2), AXES)
    layout = Layout(mesh, tiny_config().mesh)

    def adapter(*shape, axes):
        param = nnx.Param(jax.ShapeDtypeStruct(shape, np.float32), axes=axes, uneven=True)
        return layout.place(param, stored=True).spec

    assert adapter(6, 64, 16, axes=("embed", "rank")) == P(None, "fsdp", None)
    assert adapter(64, 16, axes=("heads", "rank")) == P("tensor", "fsdp")
    assert adapter(16, 64, axes=("rank", "embed")) == P("fsdp", None)
    assert adapter(3, 64, axes=("rank", "embed")) == P(None, "fsdp")
    assert adapter(64, 3, axes=("heads", "rank")) == P("tensor", None)
    assert adapter(66, 3, axes=("embed", "rank")) == P(None, None)


def test_sizes_of_axes():
    mesh = tiny_config(mesh={"data": 2, "fsdp": -1, "tensor": 4}).mesh
    assert mesh_sizes(mesh, 64) == {"data": 2, "fsdp": 8, "expert": 1, "tensor": 4}
    assert mesh_sizes(replace(mesh, fsdp=8), 64)["fsdp"] == 8


class Workers:
    """Processes of tests/mesh/worker.py that train together; each has an equal share of the mesh's
    devices.
    """

    def __init__(self, workdir, count: int, steps: int, mesh: tuple, *host: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = devices(math.prod(mesh) // count)
        command = [sys.executable, "-m", "tests.mesh.worker"]
        arguments = [str(count), str(port), str(workdir), str(steps), str(mesh), *host]
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(count)]
        self.processes = [
            subprocess.Popen(
                [*command, str(i), *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            for i, log in enumerate(self.logs)
        ]

    def reach(self, step: int) -> None:
        """Waits until process 0 has made an update."""
        assert any(line == f"step {step}\n" for line in self.processes[0].stdout), self.errors()

    def end(self) -> list[int]:
        """Exit statuses, when all have ended."""
        for process in self.processes:
            process.communicate()
        return [process.returncode for process in self.processes]

    def finish(self) -> None:
        """They must end well."""
        assert not any(self.end()), self.errors()

    def errors(self) -> str:
        """What they said last."""
        for log in self.logs:
            log.seek(0)
        return "\n".join(log.read()[-3000:] for log in self.logs)


def losses(workdir) -> list[float]:
    """Of every step."""
    return [
        json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    "count, mesh",
    [
        (2, (1, 2, 1, 1)),
        pytest.param(2, (1, 2, 1, 2), marks=pytest.mark.slow),
        pytest.param(4, (1, 2, 1, 2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.ci
def test_processes_train_as_one_does(tmp_path, count, mesh):
    for name, processes in (("one", 1), ("several", count)):
        Workers(tmp_path / name, processes, 4, mesh).finish()
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "several"), rtol=1e-5)
    one, several = (store.read(tmp_path / name) for name in ("one", "several"))
    assert one.meta | {"config": {}} == several.meta | {"config": {}}
    for name, array in one.params.items():
        np.testing.assert_allclose(
            several.params[name], array, atol=1e-3 * np.abs(array).max() + 1e-4, err_msg=name
        )


@pytest.mark.slow
def test_a_killed_process_and_a_restart_of_all(tmp_path):
    """One of two processes is killed in mid-run; started again, all go on from the newest
    checkpoint.
    """
    Workers(tmp_path / "whole", 2, 8, (1, 2, 1, 2)).finish()
    cut = Workers(tmp_path / "cut", 2, 8, (1, 2, 1, 2))
    cut.reach(5)
    cut.processes[1].kill()
    assert all(cut.end())  # the other one notices and fails
    assert max(store.steps(tmp_path / "cut")) in (2, 4)
    Workers(tmp_path / "cut", 2, 8, (1, 2, 1, 2)).finish()
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-6)
    assert store.read(tmp_path / "cut").meta == store.read(tmp_path / "whole").meta


@pytest.mark.slow
def test_sigterm_of_one_process_stops_all_at_one_step(tmp_path):
    workers = Workers(tmp_path, 2, 1000, (1, 2, 1, 2))
    workers.reach(3)
    workers.processes[1].terminate()
    workers.finish()
    (step,) = {max(store.steps(tmp_path))}
    assert 3 <= step < 1000 and store.read(tmp_path).meta["data"] == {"next": step}


@pytest.mark.slow
def test_another_number_of_processes_and_another_mesh(tmp_path):
    """4 -> 1 -> 2 processes; each compares what it restores with what was saved, bit for bit
    (trained_on).
    """
    for steps, (count, mesh) in enumerate(
        [(4, (2, 2, 1, 2)), (1, (1, 1, 1, 1)), (2, (1, 2, 2, 1))], start=1
    ):
        Workers(tmp_path, count, 2 * steps, mesh).finish()
    assert len(losses(tmp_path)) == 6


def test_a_parameter_that_no_rule_covers_is_named(monkeypatch):
    cfg = tiny_config()
    phase = TrainPhase(cfg, 0, make_layout(cfg))
    monkeypatch.delitem(RULES, "heads")
    with pytest.raises(
        ValueError,
        match=(
            r"xattn/q/kernel has axes \('embed', 'heads'\): name every dimension by one of whole,"
            r" norm"
        ),
    ):
        check_parameters(phase.layout, phase.shapes, lambda path: "/".join(map(str, path)))


@pytest.mark.ci
def test_processes_answer_as_one_does(tmp_path):
    """`evlm eval` on two processes of two devices each: what one process of one device finds."""
    run, data = tmp_path / "run", layouts.write("gqa", tmp_path / "gqa")
    cfg = tiny_config(data={"length": 96, "images": 2, "targets": 32, "block_pairs": 24})
    run_directory(run, cfg, random_model(cfg, 0))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "evlm_jax",
        "eval",
        "--checkpoint",
        run,
        "--task",
        "gqa",
        "--data",
        data,
        "--batch",
        "4",
        "--out",
    ]
    together = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    commands = [
        [*words, tmp_path / "one.json"],
        *([*words, tmp_path / "two.json", *together, str(i)] for i in range(2)),
    ]
    started = [
        subprocess.Popen(list(map(str, command)), cwd=ROOT, env=devices(count))
        for command, count in zip(commands, (1, 2, 2))
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["examples"] == two["examples"] and one["scores"] == two["scores"]


@pytest.mark.slow
def test_processes_that_read_the_same_rows_agree_or_stop(tmp_path):
    """One of two cannot read an image: their copies stay equal.

    Later it reads another word: both stop, by name.
    """
    workers = Workers(tmp_path, 2, 8, (1, 1, 1, 2), "1")
    told = [process.communicate()[0].splitlines() for process in workers.processes]
    copies = [[line for line in lines if line.startswith("copy ")] for lines in told]
    assert min(map(len, copies)) >= 5, workers.errors()
    assert (
        copies[0][:5] == copies[1][:5] and len(set(line.split()[2] for line in copies[0][:4])) == 4
    )
    assert all(process.returncode for process in workers.processes)
    assert (
        "step 5: processes that read the same rows (mesh.tensor) have read other ones. Its"
        " samples: 4/0" in workers.errors()
    )
