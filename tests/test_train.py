"""The loop: what stays, what moves, where it stops, and that a run cut anywhere ends with the same
bits.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from evlm_jax import optim
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.initialize import begin_with, initialize
from evlm_jax.launch import next_stage
from evlm_jax.loss import loss_sums
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.parallel.status import Stopped
from evlm_jax.phase import TrainPhase, gradients
from evlm_jax.train import train
from tests.helpers.tiny import CROSS_ONLY, UPPER_VIT, TinyData, tiny_batch, tiny_config, tiny_towers

STEPS, BOUNDARY = 50, 24
TWO = (
    {"start": 0.0, "warmup": 0, "rules": CROSS_ONLY},
    {"start": BOUNDARY / STEPS, "warmup": 0, "rules": UPPER_VIT},
)
CFG = tiny_config(
    optim={"phases": TWO, "lr": 1e-2},
    train={"steps": STEPS, "save_every": 12, "keep": 9, "log_every": 5},
)


@pytest.fixture(scope="module")
def towers():
    return tiny_towers(CFG)


@pytest.fixture(scope="module")
def compilations():
    """Names of the functions that XLA compiled in the uninterrupted run, in order."""
    return []


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, towers, compilations):
    """The directory of a run over two phases that nothing interrupts."""

    def listen(event, _, **about):
        return event.endswith("backend_compile_duration") and compilations.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    workdir = tmp_path_factory.mktemp("whole")
    assert train(CFG, workdir, TinyData(CFG), towers) == STEPS
    jax.monitoring.unregister_event_duration_listener(listen)
    return workdir


def begun(phase: TrainPhase, towers) -> nnx.State:
    """The whole model before its first step."""
    tensors = begin_with(CFG, phase.shapes, towers, frozenset())
    return initialize(CFG, phase.shapes, phase.place, tensors)


def assert_same_bits(a: store.Snapshot, b: store.Snapshot):
    for mine, other in ((a.params, b.params), (a.groups, b.groups), (a.frozen, b.frozen)):
        assert mine.keys() == other.keys()
        for name, array in mine.items():
            assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), (
                name
            )
    assert a.meta == b.meta


def test_one_compilation_per_phase(whole_run, compilations):
    assert compilations.count("jit(step)") == 2


def test_frozen_bits_stay(whole_run, towers):
    params, _ = store.load_params(whole_run)
    moved = {name for name, tower in towers.items() if params[name].tobytes() != tower.tobytes()}
    assert moved == {name for name in towers if name.startswith(("vit/blocks/2/", "vit/blocks/3/"))}


def test_what_trains_moves_and_learns(whole_run, towers):
    """Batches are random words: what can be learned of them is themselves."""
    first, last = store.read(whole_run, 12), store.read(whole_run, STEPS)
    assert all(first.params[name].tobytes() != last.params[name].tobytes() for name in first.params)
    phase, data = TrainPhase(CFG, 0, make_layout(CFG)), TinyData(CFG)
    batches = [next(data)[0] for _ in range(STEPS)]

    @jax.jit
    def loss(state, batch):
        total, sums = loss_sums(nnx.merge(phase.graphdef, state), batch, len(CFG.data.sources))
        return total / sums["count"].sum()

    before, after = (
        begun(phase, towers),
        param_names.unflatten(CFG, last.frozen | last.params, phase.shapes),
    )
    assert np.mean([loss(after, batch) for batch in batches]) < np.mean(
        [loss(before, batch) for batch in batches]
    )


def test_media_embeddings_begin_among_the_words(towers):
    phase = TrainPhase(CFG, 0, make_layout(CFG))
    new = param_names.flatten(CFG, begun(phase, towers))
    words, media = towers["llm/embed"], np.asarray(new["media/embedding"])
    assert np.abs(media - words.mean(0)).max() < 5 * words.std(0).max()
    np.testing.assert_allclose((media - words.mean(0)).std(), words.std(), rtol=0.2)
    assert all(
        not np.any(new[f"xattn/{layer}/{gate}"])
        for layer in CFG.cross_layers
        for gate in ("attn_gate", "ffn_gate")
    )


@pytest.mark.ci
def test_first_update_of_the_newly_trainable_group(whole_run, tmp_path, towers):
    before = store.read(whole_run, BOUNDARY)
    after = interrupted(tmp_path, whole_run, start=BOUNDARY, stop=BOUNDARY + 1)
    rate = 0.5 * float(optim.schedule(CFG, BOUNDARY))  # UPPER_VIT halves it
    moved = np.concatenate(
        [(after.params[n] - before.frozen[n]).ravel() for n in after.params if n.startswith("vit/")]
    )
    assert 0.5 * rate < np.sqrt(np.mean(moved**2)) <= 1.1 * rate
    assert after.groups["1/count"] == 1 and after.groups["0/count"] == BOUNDARY + 1


def interrupted(
    workdir, whole_run, start: int, stop: int, number: int = signal.SIGTERM
) -> store.Snapshot:
    """What a copy of `whole_run`, taken when step `start` was its newest, saves when a signal comes
    in step `stop`.
    """
    shutil.copytree(whole_run, workdir, dirs_exist_ok=True)
    for step in store.steps(workdir):
        if step > start:
            shutil.rmtree(workdir / "steps" / str(step))
    with pytest.raises(Stopped, match=f"at step {stop} of {STEPS}, saved at {stop}") as ended:
        train(
            CFG,
            workdir,
            TinyData(CFG),
            {},
            on_step=lambda step, _: step == stop and os.kill(os.getpid(), number),
        )
    assert ended.value.status == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    return store.read(workdir)


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(BOUNDARY - 1, marks=pytest.mark.slow),
        pytest.param(BOUNDARY, marks=pytest.mark.ci),  # one later: test_first_update_of_..
        pytest.param(BOUNDARY + 1, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_has_the_bits_of_the_whole_run(whole_run, tmp_path, cut, capsys, monkeypatch):
    """k steps, SIGTERM or Ctrl-C, resume, N - k steps: just before, at and after the step where the
    upper ViT is unfrozen. What is frozen is not fetched from the devices.
    """
    number, fetched = signal.SIGINT if cut == BOUNDARY else signal.SIGTERM, []

    def fetch(tree):
        fetched.extend(jax.tree.leaves(tree))
        return fetch_to_host(tree)

    monkeypatch.setattr("evlm_jax.train.fetch_to_host", fetch)
    assert interrupted(tmp_path, whole_run, 12, cut, number).meta["step"] == cut
    assert train(CFG, tmp_path, TinyData(CFG), {}) == STEPS
    assert f"resume from step {cut}" in capsys.readouterr().out
    assert_same_bits(store.read(tmp_path), store.read(whole_run))

    def lines(workdir):
        return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in lines(whole_run)]
    assert lines(tmp_path)[-1]["loss"] == lines(whole_run)[-1]["loss"]
    assert not fetched and len(list((tmp_path / "frozen").iterdir())) == 1


def test_refreezing_stage_keeps_trained_bits(whole_run, tmp_path):
    """Stage 3 of the paper freezes what stage 2 trained; bfloat16 towers, so that a cast would
    show.
    """
    params, _ = store.load_params(whole_run)
    stage = tiny_config(train={"steps": 2, "frozen_dtype": "bfloat16"})
    train(stage, tmp_path, TinyData(stage, seed=1), params, store.trained(whole_run))
    after, config = store.load_params(tmp_path)
    assert config == stage
    upper = [name for name in params if name.startswith(("vit/blocks/2/", "vit/blocks/3/"))]
    assert upper and all(after[name].tobytes() == params[name].tobytes() for name in upper)
    assert (
        after["vit/cls"].dtype == ml_dtypes.bfloat16
        and after["xattn/0/q/kernel"].tobytes() != params["xattn/0/q/kernel"].tobytes()
    )
    assert store.trained(tmp_path) == store.trained(whole_run)


@pytest.mark.parity
@pytest.mark.ci
def test_next_stage_at_another_size(whole_run, tmp_path):
    """224 to 448 between the paper's stages 1 and 2: all is taken over but the position table,
    which is resampled as torch does.
    """
    import torch

    before, _ = store.load_params(whole_run)
    same, names_before = next_stage(CFG, whole_run)
    assert names_before == store.trained(whole_run)
    assert all((tensor.read() == before[name]).all() for name, tensor in same.items())
    cfg = tiny_config(vit={"image_size": (16, 8)}, train={"steps": 1})
    params, trained = next_stage(cfg, whole_run)
    table = before["vit/pos"]
    grid = torch.tensor(table[1:]).reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    wanted = (
        torch.nn.functional.interpolate(grid, (4, 2), mode="bicubic")
        .permute(0, 2, 3, 1)
        .reshape(8, -1)
        .numpy()
    )
    resampled = params["vit/pos"].read()
    np.testing.assert_allclose(resampled[1:], wanted, atol=1e-6)
    assert (resampled[:1] == table[:1]).all()
    assert train(cfg, tmp_path, TinyData(cfg, seed=1), params, trained) == 1


@pytest.mark.ci
def test_micro_batches_equal_one_batch():
    """Rows with very different numbers of targets, so that a mean of means would be far off."""
    cfgs = [
        tiny_config(data={"cache_features": True}, train={"batch": 4, "accumulate": k})
        for k in (1, 4)
    ]
    sparse = [
        tiny_batch(cfgs[0], seed, rows=1, fill=fill)
        for seed, fill in enumerate((1.0, 0.3, 0.6, 0.3))
    ]
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), *sparse)
    assert len(set((batch.targets >= 0).sum(1))) >= 3
    model = jax.jit(lambda: EVLM(cfgs[0], nnx.Rngs(0)))()
    for gate in model.xattn.gates().values():
        gate.scalar[...] += 0.5
    graphdef, params, frozen = nnx.split(model, lambda path, _: path[0] in ("xattn", "media"), ...)

    def run(cfg):
        compute = jax.jit(lambda p, f, b: gradients(cfg, graphdef, p, f, b))
        return jax.device_get(compute(params, frozen, batch))

    def norm(arrays):
        return np.sqrt(sum(np.square(array).sum() for array in arrays))

    (one, sums), (many, split) = map(run, cfgs)
    np.testing.assert_array_equal(sums["count"], split["count"])
    one, many = map(jax.tree.leaves, (one, many))
    difference = [a - b for a, b in zip(one, many, strict=True)]
    assert max(abs(array).max() for array in difference) <= 1e-6
    assert norm(difference) <= 5e-6 * norm(one)  # rounding; a mean of means is off by a tenth
    np.testing.assert_allclose(sums["loss"], split["loss"], rtol=1e-6)


@pytest.mark.ci
def test_a_save_is_due_by_minutes_too(tmp_path):
    cfg = tiny_config(
        train={"steps": 6, "save_every": 100, "keep": 9, "log_every": 2, "save_minutes": 1e-9}
    )
    assert train(cfg, tmp_path, TinyData(cfg), tiny_towers(cfg)) == 6
    assert store.steps(tmp_path) == [2, 4, 6]


def test_a_failed_save_is_told_at_once(tmp_path):
    """Before the next save is due: files may not grow any more, as on a full disk, while orbax
    writes in its thread.
    """
    cfg, reached = tiny_config(train={"steps": 1200, "save_every": 20, "log_every": 1000}), []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, _model):
        reached.append(step)
        if step == 19:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with pytest.raises(
            OSError, match=f"^{tmp_path}: a save failed, the newest step that was saved is none: "
        ) as error:
            train(cfg, tmp_path, TinyData(cfg), tiny_towers(cfg), on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(error.value)
    assert 20 <= reached[-1] < 40


@pytest.mark.ci
def test_values_of_on_step_are_noted(tmp_path):
    cfg = tiny_config(train={"steps": 2})
    train(
        cfg,
        tmp_path,
        TinyData(cfg),
        tiny_towers(cfg),
        on_step=lambda step, _: {"my/metric": float(step)},
    )
    assert [
        json.loads(line)["my/metric"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1.0, 2.0]


def test_a_parameter_without_value_is_named(towers, tmp_path):
    with pytest.raises(ValueError, match="missing llm/ln_f/scale"):
        train(
            CFG,
            tmp_path,
            TinyData(CFG),
            {name: array for name, array in towers.items() if name != "llm/ln_f/scale"},
        )


def test_cached_taps_need_a_frozen_tower():
    with pytest.raises(
        ValueError, match=r"phases\[1\] trains the vision tower.*cache_features=False"
    ):
        TrainPhase(
            tiny_config(optim={"phases": TWO}, data={"cache_features": True}), 1, make_layout(CFG)
        )


def test_a_changed_config_is_said(whole_run, tmp_path, towers, capsys):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    longer = tiny_config(
        optim={"phases": TWO, "lr": 1e-2},
        train={"steps": STEPS, "save_every": 12, "keep": 3, "log_every": 5},
    )
    assert train(longer, tmp_path, TinyData(longer), {}) == STEPS
    assert "; train.keep was 9, is 3\n" in capsys.readouterr().out


KILLED = """
import sys
from tests.test_train import CFG, TinyData, tiny_towers, train
say = lambda step, _: print("step", step, flush=True)
train(CFG, sys.argv[1], TinyData(CFG), tiny_towers(CFG), on_step=say)
"""


def run_and_kill(workdir, at_step: int | None, seconds: float) -> tuple[bool, list[str]]:
    """Trains in a process of its own, killed `seconds` after it has said `at_step` steps.

    Returns (killed, its lines).
    """
    command = [sys.executable, "-c", KILLED, workdir]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if sum(line.startswith("step ") for line in lines) == at_step:
                time.sleep(seconds)
                process.kill()
                at_step = None
    return process.returncode == -signal.SIGKILL, lines


@pytest.mark.slow
def test_kill_at_random_moments(whole_run, tmp_path):
    """Each run goes on from the newest finalised step and says so; the last one ends with the bits
    of the whole run.
    """
    rng, killed, interval, newest = np.random.default_rng(20), 0, CFG.train.save_every, 0
    while newest < STEPS:
        at_step = int(rng.integers(1, 2 * interval)) if killed < 20 else None
        died, lines = run_and_kill(tmp_path, at_step, rng.uniform(0, 0.3))
        resumed = [line for line in lines if line.startswith("resume from step")]
        assert [f"from step {newest} of" in line for line in resumed] == [True] * bool(newest)
        reached = max(
            (int(line.split()[1]) for line in lines if line.startswith("step ")), default=newest
        )
        killed, newest = killed + died, max(store.steps(tmp_path), default=0)
        assert (
            newest >= ((reached - 1) // interval - 1) * interval
        )  # all saves but the one under way
        assert not died or killed <= 20
    assert not list(tmp_path.glob("*/*tmp*"))
    assert_same_bits(store.read(tmp_path), store.read(whole_run))
