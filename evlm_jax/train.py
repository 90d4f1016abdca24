"""The training loop, flat and readable from the top: the step, the phase, where a run starts, the loop.

Unusual: gradients exist for the trainable State only, frozen parameters are plain arguments of the step. A step whose loss or
gradient is not finite changes nothing, and neither does any step behind it, so the host may look a few steps later.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict

from evlm_jax import names, optim
from evlm_jax.batch import Batch
from evlm_jax.checkpoint import Arrays, Checkpoints, Snapshot
from evlm_jax.config import EVLMConfig, from_saved, to_dict, to_saved
from evlm_jax.loss import loss_sums
from evlm_jax.mesh import Layout, check_parameters, make_layout
from evlm_jax.metrics import Meter, work
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.norm_init import centre_norms
from evlm_jax.paths import Mirror
from evlm_jax.processes import gather, on_host, say, stopping
from evlm_jax.sharding import gather_once, settle
from evlm_jax.start import fresh, restored

IN_FLIGHT = 2  # steps dispatched before the host looks at the values of an older one

# ---------------------------------------------------------------------------------------------------------------- the step


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32, finished updates
    healthy: jax.Array  # bool, False from the first loss or gradient on that is not finite
    params: nnx.State  # trainable
    groups: optim.Groups


def gradients(cfg: EVLMConfig, graphdef: nnx.GraphDef, params: nnx.State, frozen: nnx.State, batch: Batch):
    """Gradient of the mean loss over all targets of the batch, from sums over the micro-batches; float32, in the pieces that are stored.

    Returns:
      (gradients like `params`, sums over the batch as in loss.loss_sums)
    """

    def loss(params, rows):
        return loss_sums(nnx.merge(graphdef, params, frozen), rows, len(cfg.data.sources))

    def micro_batch(total, rows):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
        return jax.tree.map(jnp.add, total, (settle(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), sums)), None

    params = gather_once(params, cfg.train.operands)
    micro_batches = jax.tree.map(functools.partial(_split, len(batch.tokens) // cfg.data.pool, cfg.train.accumulate), batch)
    zeros = settle(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    _, sums = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], micro_batches))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    (grads, sums), _ = jax.lax.scan(micro_batch, (zeros, nothing), micro_batches)
    count = jnp.maximum(sums["count"].sum(), 1)
    return jax.tree.map(lambda g: g / count, grads), sums


def _split(pools: int, k: int, x: jax.Array) -> jax.Array:
    """[B or C, ...] -> k micro-batches. Pool c goes to number c % k, so that every device has its share of each."""
    return x.reshape(pools // k, k, len(x) // pools, *x.shape[1:]).swapaxes(0, 1).reshape(k, len(x) // k, *x.shape[1:])


def train_step(cfg: EVLMConfig, graphdef: nnx.GraphDef, plan: optim.Plan, state: TrainState, frozen: nnx.State, batch: Batch):
    """One update. Returns the new state and what is reported of the step."""
    grads, sums = gradients(cfg, graphdef, state.params, frozen, batch)
    params, groups, norm = optim.update(cfg, plan, state.step, state.params, grads, state.groups)
    healthy = state.healthy & jnp.isfinite(sums["loss"].sum()) & jnp.isfinite(norm)
    moved, still = TrainState(state.step + 1, healthy, params, groups), state._replace(healthy=healthy)
    report = {"healthy": healthy, "grad_norm": norm, "lr": optim.schedule(cfg, state.step), "source_loss": sums["loss"]}
    gates = {path: jnp.tanh(gate[...]) for path, gate in nnx.to_flat_state(params) if str(path[-1]).endswith("gate")}
    report |= {"source_count": sums["count"], "gates": {"/".join(map(str, path)): gate for path, gate in gates.items()}}
    if "routing" in sums:
        report["routing"] = sums["routing"]._asdict()
    return jax.tree.map(lambda a, b: jnp.where(healthy, a, b), moved, still), report


# --------------------------------------------------------------------------------------------------------------- the phase


class Phase:
    """From one change of the trainable set to the next: its plan, where its arrays lie, the frozen parameters, one compiled step."""

    def __init__(self, cfg: EVLMConfig, number: int, layout: Layout):
        self.cfg, self.number, self.layout = cfg, number, layout
        self.graphdef, self.shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
        check_parameters(layout, self.shapes, lambda path: names.canonical(cfg, path)[0])
        self.plan = optim.plan(cfg, number, self.shapes)
        self.trained = {name for path in self.plan.rates for name in names.canonical(cfg, path)}
        if cfg.data.cache_features and any(path[0] == "vit" for path in self.plan.rates):
            raise ValueError(f"optim.phases[{number}] trains the vision tower, cached taps would not follow: set data.cache_features=False")

        def step(state, frozen, batch):
            return train_step(cfg, self.graphdef, self.plan, state, frozen, batch)

        shardings = layout.trained(self.spec())
        self._begin = jax.jit(self.begin, out_shardings=shardings)
        self._step = layout.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
        self.on_disk = jax.jit(lambda state: (names.flatten(cfg, state.params), optim.flatten(cfg, state.groups)))

    def begin(self, step: int, trainable: nnx.State, groups: optim.Groups) -> TrainState:
        """The state at the first step of the phase. Parameters are promoted to their dtype; all is copied, for a step overwrites it."""
        own = lambda tree, dtype: jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)
        trainable = own(trainable, self.cfg.train.param_dtype)
        return TrainState(jnp.int32(step), jnp.bool(True), trainable, optim.begin(self.cfg, self.plan, trainable, own(groups, None)))

    def spec(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.begin, 0, nnx.split_state(self.shapes, self.plan.trains, ...)[0], {})

    def place(self, tree) -> Any:
        """Shardings of parameters of the whole model or of a part, or of moments."""
        if not isinstance(tree, nnx.State):
            return self.layout.trained(tree)
        trainable, frozen = nnx.split_state(tree, self.plan.trains, ...)
        return nnx.merge_state(self.layout.trained(trainable), self.layout.frozen(frozen))

    def enter(self, step: int, params: nnx.State, groups: optim.Groups) -> TrainState:
        """Splits the parameters of the whole model and begins; they may lie as in the phase before."""
        trainable, frozen = nnx.split_state(params, self.plan.trains, ...)
        self.frozen = jax.jit(lambda tree: tree, out_shardings=self.layout.frozen(frozen))(frozen)
        size = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)):,} parameters"
        say(f"phase {self.number} from step {step}: trains {size(trainable)}, freezes {size(self.frozen)}")
        say("compiling and making the first step; a minute or more, less where the compiled program was kept")
        return self._begin(step, trainable, groups)

    def lower(self) -> jax.stages.Lowered:
        """The step for the devices of the layout, which need not be there; `compile()` it to read memory, FLOPs and collectives."""
        frozen = nnx.split_state(self.shapes, self.plan.trains, ...)[1]
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, self.cfg.train.frozen_dtype), frozen)
        inputs, layout = (self.spec(), frozen, Batch.spec(self.cfg)), self.layout
        shardings = layout.trained(inputs[0]), layout.frozen(frozen), layout.batch(inputs[2])
        return self._step.lower(*jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), inputs, shardings))

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One step; `state` is donated."""
        return self._step(state, self.frozen, batch)

    def whole(self, state: TrainState) -> nnx.State:
        """The parameters of the whole model."""
        return nnx.merge_state(state.params, self.frozen)

    def model(self, state: TrainState) -> EVLM:
        """The model, on the same arrays."""
        return nnx.merge(self.graphdef, state.params, self.frozen)


# ---------------------------------------------------------------------------------------------------------------- the loop


class Start(NamedTuple):
    """Where the loop begins."""

    step: int
    phase: Phase
    params: nnx.State  # of the whole model
    groups: optim.Groups
    trained: frozenset[str]


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
) -> int:
    """Trains to train.steps, or to SIGTERM; goes on from the newest checkpoint in `workdir` where there is one.

    Args:
      data: yields (Batch of NumPy arrays, info) as data.pipeline.batches; get_state() -> JSON and set_state(JSON) keep its position.
      params: canonical name -> array: the towers, or all parameters of an earlier stage (checkpoint.load_params).
      trained: those of `params` that an earlier stage trained (checkpoint.trained).
      on_step: called with the finished updates and a function that gives the model, valid until it returns; what it returns is noted.
      tensorboard: write TensorBoard files, next to metrics.jsonl.
      profile: (first, last) update of a trace, in `workdir`/profile.
      resume: the step to go on from, instead of the newest; later ones are put aside.
    Returns:
      the number of finished updates, saved.
    Raises:
      FloatingPointError: loss or gradient is not finite; names the step and its samples. Nothing is saved behind it.
    """
    layout = make_layout(cfg)
    load = functools.partial(layout.put_pools, own=layout.own_pools(cfg.pools), count=cfg.pools)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, cfg.train.keep)))
        step, phase, whole, groups, trained = _start(cfg, checkpoints.resume(resume), layout, data, load, params, trained)
        if step >= cfg.train.steps:
            say(f"{workdir} is finished: it has step {step}, and train.steps is {cfg.train.steps}")
        meter = stack.enter_context(Meter(cfg, workdir, step, layout.mesh.size, tensorboard))
        stop = stack.enter_context(stopping())
        state, pending = None, deque()
        while step < cfg.train.steps:
            if state is None or optim.phase_at(cfg, step) != phase.number:
                if state is not None:
                    _look(pending, 0, meter)
                    whole, groups = phase.whole(state), state.groups
                phase = Phase(cfg, optim.phase_at(cfg, step), layout)
                state = phase.enter(step, whole, groups)
                checkpoints.freeze(names.flatten(cfg, on_host(phase.frozen)))
                trained, whole, groups = trained | phase.trained, None, None
            batch, info = next(data)
            if profile and step + 1 == profile[0]:
                trace = Mirror(checkpoints.root / "profile")
                jax.profiler.start_trace(str(trace.here))
            state, report = phase.update(state, load(batch))
            step += 1
            pending.append((step, info["keys"], work(cfg, batch, info, phase.trained), report))
            meter.dropped(info["drops"])
            _look(pending, IN_FLIGHT, meter)
            if on_step:
                meter.note(step, on_step(step, functools.partial(phase.model, state)))
            last = stop(step) or step == cfg.train.steps
            if profile and (step == profile[1] or profile[0] <= step < profile[1] and last):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                trace.close()
            if last or step % cfg.train.save_every == 0:
                _look(pending, 0, meter)
                checkpoints.save(step, *phase.on_disk(state), _meta(cfg, phase, data, trained))
            if last:
                break
    return step


def _start(
    cfg: EVLMConfig, snapshot: Snapshot | None, layout: Layout, data: Iterator, load: Callable, params: Arrays, trained: frozenset
) -> Start:
    """From the newest checkpoint, or from `params`."""
    phase = Phase(cfg, snapshot.meta["phase"] if snapshot else 0, layout)
    if snapshot:
        say(f"resume from step {snapshot.meta['step']}{_changes(cfg, snapshot.meta['config'])}")
        data.set_state(snapshot.meta["data"])
        trained = trained | set(snapshot.meta["trained"])
        return Start(snapshot.meta["step"], phase, *restored(cfg, phase.shapes, phase.place, phase.plan, snapshot), trained)
    whole = fresh(cfg, phase.shapes, phase.place, params, trained | phase.trained)
    if cfg.init.centre_norms and cfg.cross_layers and not any(name.startswith("xattn/") for name in trained):
        whole = layout.jit(centre_norms)(nnx.merge(phase.graphdef, whole), load(_peek(data)))
    return Start(0, phase, whole, {}, trained)


def _meta(cfg: EVLMConfig, phase: Phase, data: Iterator, trained: frozenset[str]) -> dict:
    """What a checkpoint says beside its arrays."""
    return {"phase": phase.number, "data": _merged(gather(data.get_state())), "config": to_saved(cfg), "trained": sorted(trained)}


def _peek(data: Iterator) -> Batch:
    """The next batch, which will come again."""
    position = data.get_state()
    batch, _ = next(data)
    data.set_state(position)
    return batch


def _changes(cfg: EVLMConfig, saved: dict) -> str:
    """Says where the config is not that of the checkpoint: such a run goes on, but has not the bits of either config."""
    old, new = (flatten_dict(to_dict(c), sep=".") for c in (from_saved(saved), cfg))
    return "".join(f"; {key} was {old[key]}, is {value}" for key, value in new.items() if value != old[key])


def _look(pending: deque, left: int, meter: Meter) -> None:
    """Reports dispatched steps, oldest first, until `left` of them have not been looked at."""
    while len(pending) > left:
        step, keys, counted, report = pending.popleft()
        report = jax.device_get(report)
        if not report["healthy"]:
            sums = f"sum of losses {report['source_loss'].sum()}, gradient norm {report['grad_norm']}"
            raise FloatingPointError(f"step {step}: {sums}; nothing was updated or saved since. Its samples: {', '.join(map(str, keys))}")
        meter.add(step, counted, report)
    if not left:
        meter.flush()


def _merged(states: list[dict]) -> dict:
    """Positions in the data of all processes as one: what is a dict in them is joined."""
    join = lambda values: functools.reduce(dict.__or__, values) if isinstance(values[0], dict) else values[0]
    return {key: join([state[key] for state in states]) for key in states[0]}
