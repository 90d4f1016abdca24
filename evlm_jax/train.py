"""The training loop, readable from the top: where a run starts, its steps, what it saves.

The host looks at a step's figures a few steps later (watch.py): an update that was not finite
changed nothing, and those behind it go on."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flax import nnx

from evlm_jax import optim
from evlm_jax.batch import Batch
from evlm_jax.checkpoint import continuity
from evlm_jax.checkpoint.initialize import begin_with, initialize, restored
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, opened
from evlm_jax.checkpoint.store import Checkpoints, Snapshot
from evlm_jax.config import EVLMConfig, to_saved
from evlm_jax.metrics import Meter, work
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.norm_init import centre_norms
from evlm_jax.parallel.distributed import allgather_json, fetch_to_host, log_once, stopping
from evlm_jax.parallel.mesh import Layout, make_layout
from evlm_jax.parallel.status import Stopped
from evlm_jax.phase import TrainPhase
from evlm_jax.watch import Due, Trace, Watch


@dataclass
class Start:
    """State at the beginning of the loop."""

    step: int
    phase: TrainPhase
    params: nnx.State | None  # of the whole model
    groups: optim.Groups | None
    origin: Tensors  # parameters by name, where their values were read
    trained: frozenset[str]
    bad: int  # updates that were not finite

    def take(self) -> tuple[nnx.State, optim.Groups]:
        """The arrays, which are not kept here any more."""
        taken = self.params, self.groups
        self.params = self.groups = None
        return taken


def train(
    cfg: EVLMConfig,
    workdir: str,
    data: Iterator,
    params: Mapping[str, np.ndarray | Tensor],
    trained: frozenset[str] = frozenset(),
    on_step: Callable[[int, Callable[[], EVLM]], dict[str, float] | None] | None = None,
    tensorboard: bool = False,
    profile: tuple[int, int] | None = None,
    resume: int | None = None,
    other_data: bool = False,
) -> int:
    """Trains to train.steps, from the newest checkpoint in `workdir` where there is one.

    Args:
      data: yields (Batch of NumPy arrays, info) as data.pipeline.batches; get_state() -> JSON and
        set_state(JSON) save and restore its position.
      params: by canonical name, the towers or all of an earlier stage; only a new run reads them.
      trained: those of `params` that an earlier stage trained (checkpoint.trained).
      on_step: called with the number of finished updates and a function that returns the model,
        valid until `on_step` returns; its result is logged.
      tensorboard: write TensorBoard files, next to metrics.jsonl.
      profile: (first, last) update of a trace, in `workdir`/profile.
      resume: the step to continue from, instead of the newest; later ones are moved aside.
      other_data: a run may go on with other data or batches, from the same number of documents.
    Returns:
      the number of finished updates, saved.
    Raises:
      ValueError: the config cannot be trained or continued with; names the field.
      Stopped: a signal came; what was trained is saved.
      FloatingPointError: more than train.bad_updates were not finite; names the step and samples.
      OSError: a save failed, also one in progress.
    """
    began = time.monotonic()
    _check_dtype(cfg)
    layout = make_layout(cfg)
    own = layout.own_groups(cfg.image_groups)
    load = functools.partial(layout.put_groups, own=own, count=cfg.image_groups)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(workdir, cfg.train.keep, cfg.train.keep_every))
        )
        snapshot = checkpoints.resume(resume)
        if snapshot:
            start = _resumed(cfg, checkpoints, snapshot, layout, data, trained, other_data)
        else:
            start = _begun(cfg, layout, data, load, params, trained)
        if start.step >= cfg.train.steps:
            log_once(
                f"{workdir} is finished: it has step {start.step}, and train.steps is"
                f" {cfg.train.steps}"
            )
        meter = Meter(cfg, workdir, start.step, layout.mesh.size, tensorboard, began)
        stack.enter_context(meter)
        trace = Trace(checkpoints.root / "profile", profile)
        step, saved, status = _loop(
            cfg, start, data, load, checkpoints, meter, trace, on_step or (lambda *_: None)
        )
    _check_end(step, cfg.train.steps, saved, status)
    return step


def _check_dtype(cfg: EVLMConfig) -> None:
    if cfg.train.param_dtype != "float32":
        raise ValueError(
            "config: train.param_dtype must be float32 in training: bfloat16 loses updates below"
            " 1/256 of a value"
        )


def _check_end(step: int, steps: int, saved: int, status: int) -> None:
    """Raises Stopped or FloatingPointError where not all was trained and saved."""
    if step < steps:
        raise Stopped(
            f"stopped by a signal at step {step} of {steps}, saved at {saved}: the same command"
            " goes on",
            status,
        )
    if saved < step:
        raise FloatingPointError(
            f"the last updates to step {step} were not finite, the newest that was saved is {saved}"
        )


def _loop(
    cfg: EVLMConfig,
    start: Start,
    data: Iterator,
    load: Callable,
    checkpoints: Checkpoints,
    meter: Meter,
    trace: Trace,
    on_step: Callable,
) -> tuple[int, int, int]:
    """To the last step or a signal.

    Returns (finished updates, the newest saved, exit status of the signal or 0).
    """
    step, phase, origin, trained = start.step, start.phase, start.origin, start.trained
    whole, groups = start.take()
    watch, due = Watch(meter, cfg.train.bad_updates, start.bad), Due(cfg.train)
    saved, status, state, goodput = step, 0, None, meter.goodput
    with stopping() as stop:
        while step < cfg.train.steps and not status:
            if entered := state is None or optim.phase_at(cfg, step) != phase.number:
                if state is not None:
                    watch.look()
                    whole, groups = phase.all_params(state), state.groups
                phase = TrainPhase(cfg, optim.phase_at(cfg, step), phase.layout)
                state = phase.enter(step, whole, groups)
                origin = checkpoints.freeze(_frozen(cfg, phase, origin))
                trained, whole, groups = trained | phase.trained, None, None
            with goodput.during("data"):
                batch, info = next(data)
            trace.before(step + 1)
            state, report = goodput.update(phase.update, state, load(batch), first=entered)
            step += 1
            meter.dropped(info["drops"])
            watch.add(step, info["keys"], work(cfg, batch, info, phase.trained), report)
            with goodput.during("monitor"):
                meter.note(step, on_step(step, functools.partial(phase.model, state)))
            status = stop(step)
            last = bool(status) or step == cfg.train.steps
            trace.after(step, last, state)
            checkpoints.check()
            if due(step) or last:
                watch.look()
                meter.flush()
                if watch.sound:
                    with goodput.during("save"):
                        meta = _meta(cfg, phase, data, trained, watch.bad)
                        checkpoints.save(step, *phase.on_disk(state), meta)
                    saved = step
                    due.done()
    return step, saved, status


def _resumed(
    cfg: EVLMConfig,
    checkpoints: Checkpoints,
    snapshot: Snapshot,
    layout: Layout,
    data: Iterator,
    trained: frozenset,
    other_data: bool,
) -> Start:
    """From a checkpoint. Nothing in the directory changes before all of it has been read."""
    meta = snapshot.meta
    continuity.check(cfg, meta, data, other_data)
    phase = TrainPhase(cfg, meta["phase"], layout)
    log_once(f"resume from step {meta['step']}{continuity.reported_changes(cfg, meta['config'])}")
    data.set_state(meta["data"])
    whole, groups = restored(cfg, phase.shapes, phase.place, phase.plan, snapshot)
    checkpoints.go_on(snapshot)
    origin = {n: t for n, t in snapshot.frozen.items() if n not in snapshot.params}
    trained |= set(meta["trained"])
    return Start(meta["step"], phase, whole, groups, origin, trained, meta.get("bad", 0))


def _begun(
    cfg: EVLMConfig,
    layout: Layout,
    data: Iterator,
    load: Callable,
    params: Mapping[str, np.ndarray | Tensor],
    trained: frozenset,
) -> Start:
    """From `params`."""
    phase = TrainPhase(cfg, 0, layout)
    optim.check_adapters(cfg, phase.shapes, params)
    origin = begin_with(cfg, phase.shapes, params, trained | phase.trained)
    whole = initialize(cfg, phase.shapes, phase.place, origin)
    if (
        cfg.init.centre_norms
        and cfg.cross_layers
        and not any(name.startswith("xattn/") for name in trained)
    ):
        whole = layout.jit(centre_norms)(nnx.merge(phase.graphdef, whole), load(_peek(data)))
        origin = {n: t for n, t in origin.items() if not n.startswith("xattn/")}
    return Start(0, phase, whole, {}, origin, trained, 0)


def _frozen(cfg: EVLMConfig, phase: TrainPhase, origin: Tensors) -> dict[str, Tensor]:
    """What a phase freezes, by name: where it was read, or from the devices what was made there."""
    made = nnx.filter_state(
        phase.frozen,
        lambda path, _: not origin.keys() >= set(param_names.canonical(cfg, path)),
    )
    fetched = opened(param_names.flatten(cfg, fetch_to_host(made)))
    names = [
        name
        for path, _ in nnx.to_flat_state(phase.frozen)
        for name in param_names.canonical(cfg, path)
    ]
    return {name: fetched.get(name, origin.get(name)) for name in names}


def _meta(
    cfg: EVLMConfig, phase: TrainPhase, data: Iterator, trained: frozenset[str], bad: int
) -> dict:
    """What a checkpoint says beside its arrays."""
    position = _merged(allgather_json(data.get_state()))
    return {
        "phase": phase.number,
        "data": position,
        "config": to_saved(cfg),
        "trained": sorted(trained),
        "bad": bad,
    }


def _peek(data: Iterator) -> Batch:
    """The next batch, which will come again."""
    position = data.get_state()
    batch, _ = next(data)
    data.set_state(position)
    return batch


def _merged(states: list[dict]) -> dict:
    """Positions in the data of all processes as one: what is a dict in them is joined."""

    def join(values):
        return functools.reduce(dict.__or__, values) if isinstance(values[0], dict) else values[0]

    return {key: join([state[key] for state in states]) for key in states[0]}
