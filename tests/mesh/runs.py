"""Whole runs on eight devices; tests/parallel/test_eight_devices.py starts it in a process that has
them.
"""

import contextlib
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.initialize import put_sharded
from evlm_jax.models import param_names
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.status import Stopped
from evlm_jax.phase import TrainPhase
from evlm_jax.train import train
from tests.helpers.tiny import TinyData, tiny_towers
from tests.mesh.devices import POLICIES, config, layout_of


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A function that gives (directory, names of what XLA compiled, steps that were seen) of a run
    on one mesh, with experts or without.
    """

    @functools.cache
    def trained(experts):
        workdir, compiled, seen = tmp_path_factory.mktemp("whole"), [], []

        def listen(event, _, **about):
            return event.endswith("backend_compile_duration") and compiled.append(about["fun_name"])

        jax.monitoring.register_event_duration_secs_listener(listen)
        cfg = config((1, 2, 2, 2), experts, steps=6, keep=3)
        trained_on(cfg, workdir, on_step=lambda step, model: seen.append(step))
        jax.monitoring.unregister_event_duration_listener(listen)
        return workdir, compiled, seen

    return trained


def test_a_step_compiles_once(whole_run):
    _, compiled, seen = whole_run(True)
    assert compiled.count("jit(step)") == 1 and seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "experts, meshes",
    [
        (True, [(1, 2, 1, 2)]),
        *(
            pytest.param(experts, [(8, 1, 1, 1), (1, 1, 1, 1)], marks=pytest.mark.slow)
            for experts in (False, True)
        ),
    ],
)
def test_a_run_goes_on_on_another_mesh(whole_run, tmp_path, experts, meshes):
    """From step 2 of the whole run: bit-equal parameters when nothing is trained in between, and
    the same losses as the whole run, within rounding.
    """
    shutil.copytree(whole_run(experts)[0], tmp_path, dirs_exist_ok=True)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "steps" / str(step))
    for number, mesh in enumerate(meshes):
        last = 6 if number == len(meshes) - 1 else 4

        def stop(step, _, last=last):
            return step == last and os.kill(os.getpid(), signal.SIGTERM)

        trained_on(config(mesh, experts, POLICIES[1 - number], steps=6), tmp_path, on_step=stop)
    runs = whole_run(experts)[0], tmp_path
    whole, moved = map(store.read, runs)
    lines = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    ]
    np.testing.assert_allclose(*lines, rtol=1e-4)
    assert whole.params.keys() == moved.params.keys()


@pytest.mark.slow
def test_a_run_with_parallel_cross_attention_is_that_of_one_device(tmp_path):
    """20 updates: the same losses, within rounding."""
    losses = []
    for mesh in ((1, 1, 1, 1), (1, 2, 2, 2)):
        run = tmp_path / str(mesh)
        trained_on(config(mesh, kind="mplug_owl3", steps=20, save_every=20), run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 20
    np.testing.assert_allclose(*losses, rtol=1e-4)


def trained_on(cfg, workdir, data=lambda cfg, own: TinyData(cfg), on_step=None):
    """Trains on as many devices as the mesh has; what is restored has the bits that were saved."""
    layout = layout_of(cfg)
    if before := store.steps(workdir):
        saved = store.read(workdir, before[-1])
        phase = TrainPhase(cfg, 0, layout)
        whole = put_sharded(
            param_names.unflatten(cfg, saved.frozen | saved.params, phase.shapes), phase.place
        )
        restored = param_names.flatten(cfg, fetch_to_host(whole))
        assert all(
            restored[name].tobytes() == array.tobytes()
            for name, array in (saved.frozen | saved.params).items()
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_, found=list(layout.mesh.devices.flat): found)
        with contextlib.suppress(Stopped):
            train(
                cfg,
                workdir,
                data(cfg, layout.own_groups(cfg.image_groups)),
                tiny_towers(cfg),
                on_step=on_step,
            )
