"""The training loop, flat and readable from the top: the step, the phase, where a run starts, the
loop.

Unusual: gradients exist for the trainable State only, frozen parameters are plain arguments of the
step. An update whose loss or gradient is not finite changes nothing, so the host may look a few
steps later (watch.py); those behind it go on."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax import optim
from evlm_jax.batch import Batch
from evlm_jax.checkpoint import continuity
from evlm_jax.checkpoint.initialize import initialize, restored
from evlm_jax.checkpoint.store import Arrays, Checkpoints, Snapshot
from evlm_jax.config import EVLMConfig, to_saved
from evlm_jax.loss import loss_sums
from evlm_jax.metrics import Meter, work
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.norm_init import centre_norms
from evlm_jax.parallel.agreement import agreed
from evlm_jax.parallel.distributed import allgather_json, fetch_to_host, log_once, stopping
from evlm_jax.parallel.mesh import Layout, check_parameters, make_layout
from evlm_jax.parallel.sharding import all_gather_params, reduce_scatter_grads
from evlm_jax.parallel.status import Stopped
from evlm_jax.watch import Due, Trace, Watch

# ----------------------------------------------------------------------------------------- the step


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32, finished updates
    params: nnx.State  # trainable
    groups: optim.Groups


def gradients(
    cfg: EVLMConfig, graphdef: nnx.GraphDef, params: nnx.State, frozen: nnx.State, batch: Batch
) -> tuple[nnx.State, dict]:
    """Gradient of the mean loss over all targets of the batch, from sums over the micro-batches;
    float32, in the pieces that are stored.

    Returns:
      (gradients like `params`, sums over the batch as in loss.loss_sums)
    """

    def loss(params, rows):
        return loss_sums(nnx.merge(graphdef, params, frozen), rows, len(cfg.data.sources))

    def micro_batch(total, rows):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
        return (
            jax.tree.map(
                jnp.add,
                total,
                (reduce_scatter_grads(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), sums),
            ),
            None,
        )

    params = all_gather_params(params, cfg.train.operands)
    micro_batches = jax.tree.map(
        functools.partial(_split, len(batch.tokens) // cfg.data.pool, cfg.train.accumulate), batch
    )
    zeros = reduce_scatter_grads(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    _, sums = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], micro_batches))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    (grads, sums), _ = jax.lax.scan(micro_batch, (zeros, nothing), micro_batches)
    count = jnp.maximum(sums["count"].sum(), 1)
    return jax.tree.map(lambda g: g / count, grads), sums


def _split(pools: int, k: int, x: jax.Array) -> jax.Array:
    """[B or C, ...] -> k micro-batches.

    Pool c goes to number c % k, so that every device has its share of each.
    """
    return (
        x.reshape(pools // k, k, len(x) // pools, *x.shape[1:])
        .swapaxes(0, 1)
        .reshape(k, len(x) // k, *x.shape[1:])
    )


def train_step(
    cfg: EVLMConfig,
    graphdef: nnx.GraphDef,
    plan: optim.OptimizerPlan,
    state: TrainState,
    frozen: nnx.State,
    batch: Batch,
) -> tuple[TrainState, dict]:
    """One update. Returns the new state and what is reported of the step."""
    batch, same = agreed(batch)
    grads, sums = gradients(cfg, graphdef, state.params, frozen, batch)
    params, groups, norm = optim.update(cfg, plan, state.step, state.params, grads, state.groups)
    good = jnp.isfinite(sums["loss"].sum()) & jnp.isfinite(norm)
    params, groups = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (params, groups), (state.params, state.groups)
    )
    report = {
        "good": good,
        "grad_norm": norm,
        "lr": optim.schedule(cfg, state.step),
        "source_loss": sums["loss"],
    }
    report["source_count"] = sums["count"]
    if cfg.cross_layers:
        gates = nnx.merge(graphdef, params, frozen).xattn.gates()
        report["gates"] = {name: gate.opening() for name, gate in gates.items()}
    report |= {} if same is None else {"same": same}
    if "routing" in sums:
        report["routing"] = sums["routing"]._asdict()
    return TrainState(state.step + 1, params, groups), report


# ---------------------------------------------------------------------------------------- the phase


class TrainPhase:
    """From one change of the trainable set to the next: its plan, where its arrays lie, the frozen
    parameters, one compiled step.
    """

    def __init__(self, cfg: EVLMConfig, number: int, layout: Layout):
        self.cfg, self.number, self.layout = cfg, number, layout
        self.graphdef, self.shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
        check_parameters(layout, self.shapes, lambda path: param_names.canonical(cfg, path)[0])
        self.plan = optim.optimizer_plan(cfg, number, self.shapes)
        self.trained = {
            name for path in self.plan.rates for name in param_names.canonical(cfg, path)
        }
        if cfg.data.cache_features and any(path[0] == "vit" for path in self.plan.rates):
            raise ValueError(
                f"optim.phases[{number}] trains the vision tower, cached taps would not follow: set"
                " data.cache_features=False"
            )

        def step(state, frozen, batch):
            return train_step(cfg, self.graphdef, self.plan, state, frozen, batch)

        shardings = layout.trained(self.spec())
        self._begin = jax.jit(self.begin, out_shardings=shardings)
        self._step = layout.jit(
            step, donate_argnums=0, out_shardings=(shardings, layout.replicated)
        )
        self.on_disk = jax.jit(
            lambda state: (param_names.flatten(cfg, state.params), optim.flatten(cfg, state.groups))
        )

    def begin(self, step: int, trainable: nnx.State, groups: optim.Groups) -> TrainState:
        """The state at the first step of the phase.

        Parameters are promoted to their dtype; all is copied, for a step overwrites it.
        """
        own = lambda tree, dtype: jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)
        trainable = own(trainable, self.cfg.train.param_dtype)
        return TrainState(
            jnp.int32(step),
            trainable,
            optim.begin(self.cfg, self.plan, trainable, own(groups, None)),
        )

    def spec(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(
            self.begin, 0, nnx.split_state(self.shapes, self.plan.trains, ...)[0], {}
        )

    def place(self, tree) -> Any:
        """Shardings of parameters of the whole model or of a part, or of moments."""
        if not isinstance(tree, nnx.State):
            return self.layout.trained(tree)
        trainable, frozen = nnx.split_state(tree, self.plan.trains, ...)
        return nnx.merge_state(self.layout.trained(trainable), self.layout.frozen(frozen))

    def enter(self, step: int, params: nnx.State, groups: optim.Groups) -> TrainState:
        """Splits the parameters of the whole model and begins;
        they may lie as in the phase before.
        """
        trainable, frozen = nnx.split_state(params, self.plan.trains, ...)
        self.frozen = jax.jit(lambda tree: tree, out_shardings=self.layout.frozen(frozen))(frozen)
        size = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)):,} parameters"
        log_once(
            f"phase {self.number} from step {step}: trains {size(trainable)}, freezes"
            f" {size(self.frozen)}"
        )
        log_once(
            "compiling and making the first step; a minute or more, less where the compiled program"
            " was kept"
        )
        return self._begin(step, trainable, groups)

    def lower(self) -> jax.stages.Lowered:
        """The step for the devices of the layout, which need not be there; `compile()` it to read
        memory, FLOPs and collectives.
        """
        frozen = nnx.split_state(self.shapes, self.plan.trains, ...)[1]
        frozen = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, self.cfg.train.frozen_dtype), frozen
        )
        inputs, layout = (self.spec(), frozen, Batch.spec(self.cfg)), self.layout
        shardings = layout.trained(inputs[0]), layout.frozen(frozen), layout.batch(inputs[2])
        return self._step.lower(
            *jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), inputs, shardings
            )
        )

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One step; `state` is donated."""
        return self._step(state, self.frozen, batch)

    def whole(self, state: TrainState) -> nnx.State:
        """The parameters of the whole model."""
        return nnx.merge_state(state.params, self.frozen)

    def model(self, state: TrainState) -> EVLM:
        """The model, on the same arrays."""
        return nnx.merge(self.graphdef, state.params, self.frozen)


# ----------------------------------------------------------------------------------------- the loop


class Start(NamedTuple):
    """Where the loop begins."""

    step: int
    phase: TrainPhase
    params: nnx.State  # of the whole model
    groups: optim.Groups
    trained: frozenset[str]
    bad: int  # updates that were not finite


def train(
    cfg: EVLMConfig,
    workdir: str,
    data: Iterator,
    params: Arrays,
    trained: frozenset[str] = frozenset(),
    on_step: Callable[[int, Callable[[], EVLM]], dict[str, float] | None] | None = None,
    tensorboard: bool = False,
    profile: tuple[int, int] | None = None,
    resume: int | None = None,
    other_data: bool = False,
) -> int:
    """Trains to train.steps; goes on from the newest checkpoint in `workdir` where there is one.

    Args:
      data: yields (Batch of NumPy arrays, info) as data.pipeline.batches; get_state() -> JSON and
        set_state(JSON) keep its position.
      params: canonical name -> array: the towers, or all parameters of an earlier stage
        (checkpoint.load_params).
      trained: those of `params` that an earlier stage trained (checkpoint.trained).
      on_step: called with the finished updates and a function that gives the model, valid until it
        returns; what it returns is noted.
      tensorboard: write TensorBoard files, next to metrics.jsonl.
      profile: (first, last) update of a trace, in `workdir`/profile.
      resume: the step to go on from, instead of the newest; later ones are put aside.
      other_data: a run may go on with other data, or another batch, from the same number of
        documents.
    Returns:
      the number of finished updates, saved.
    Raises:
      ValueError: the config cannot be trained, or is not one with which the run can go on; names
        the field.
      Stopped: a signal came; what was trained is saved.
      FloatingPointError: more than train.bad_updates losses or gradients were not finite; names the
        step and its samples.
      OSError: a save failed, also one under way.
    """
    if cfg.train.param_dtype != "float32":
        raise ValueError(
            "config: train.param_dtype must be float32 in training: bfloat16 loses updates below"
            " 1/256 of a value"
        )
    layout = make_layout(cfg)
    load = functools.partial(layout.put_pools, own=layout.own_pools(cfg.pools), count=cfg.pools)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, cfg.train.keep)))
        snapshot = checkpoints.resume(resume)
        if snapshot:
            continuity.check(cfg, snapshot.meta, data, other_data)
        start = _start(cfg, snapshot, layout, data, load, params, trained)
        if start.step >= cfg.train.steps:
            log_once(
                f"{workdir} is finished: it has step {start.step}, and train.steps is"
                f" {cfg.train.steps}"
            )
        meter = stack.enter_context(Meter(cfg, workdir, start.step, layout.mesh.size, tensorboard))
        trace = Trace(checkpoints.root / "profile", profile)
        step, saved, status = _loop(
            cfg, start, data, load, checkpoints, meter, trace, on_step or (lambda *_: None)
        )
    if step < cfg.train.steps:
        raise Stopped(
            f"stopped by a signal at step {step} of {cfg.train.steps}, saved at {saved}: the same"
            " command goes on",
            status,
        )
    if saved < step:
        raise FloatingPointError(
            f"the last updates to step {step} were not finite, the newest that was saved is {saved}"
        )
    return step


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
    step, phase, whole, groups, trained, bad = start
    watch, due, saved, status, state = (
        Watch(meter, cfg.train.bad_updates, bad),
        Due(cfg.train),
        step,
        0,
        None,
    )
    with stopping() as stop:
        while step < cfg.train.steps and not status:
            if state is None or optim.phase_at(cfg, step) != phase.number:
                if state is not None:
                    watch.look()
                    whole, groups = phase.whole(state), state.groups
                phase = TrainPhase(cfg, optim.phase_at(cfg, step), phase.layout)
                state = phase.enter(step, whole, groups)
                checkpoints.freeze(param_names.flatten(cfg, fetch_to_host(phase.frozen)))
                trained, whole, groups = trained | phase.trained, None, None
            batch, info = next(data)
            trace.before(step + 1)
            state, report = phase.update(state, load(batch))
            step += 1
            meter.dropped(info["drops"])
            watch.add(step, info["keys"], work(cfg, batch, info, phase.trained), report)
            meter.note(step, on_step(step, functools.partial(phase.model, state)))
            status = stop(step)
            last = bool(status) or step == cfg.train.steps
            trace.after(step, last, state)
            checkpoints.check()
            if due(step) or last:
                watch.look()
                meter.flush()
                if watch.sound:
                    checkpoints.save(
                        step, *phase.on_disk(state), _meta(cfg, phase, data, trained, watch.bad)
                    )
                    saved = step
                    due.done()
    return step, saved, status


def _start(
    cfg: EVLMConfig,
    snapshot: Snapshot | None,
    layout: Layout,
    data: Iterator,
    load: Callable,
    params: Arrays,
    trained: frozenset,
) -> Start:
    """From the newest checkpoint, or from `params`."""
    phase = TrainPhase(cfg, snapshot.meta["phase"] if snapshot else 0, layout)
    if snapshot:
        log_once(
            "resume from step"
            f" {snapshot.meta['step']}{continuity.told(cfg, snapshot.meta['config'])}"
        )
        data.set_state(snapshot.meta["data"])
        trained = trained | set(snapshot.meta["trained"])
        whole, groups = restored(cfg, phase.shapes, phase.place, phase.plan, snapshot)
        return Start(
            snapshot.meta["step"], phase, whole, groups, trained, snapshot.meta.get("bad", 0)
        )
    whole = initialize(cfg, phase.shapes, phase.place, params, trained | phase.trained)
    if (
        cfg.init.centre_norms
        and cfg.cross_layers
        and not any(name.startswith("xattn/") for name in trained)
    ):
        whole = layout.jit(centre_norms)(nnx.merge(phase.graphdef, whole), load(_peek(data)))
    return Start(0, phase, whole, {}, trained, 0)


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
    join = lambda values: (
        functools.reduce(dict.__or__, values) if isinstance(values[0], dict) else values[0]
    )
    return {key: join([state[key] for state in states]) for key in states[0]}
