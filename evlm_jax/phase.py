"""One update, and the phase of training in which it is compiled.

Unusual: gradients exist for the trainable State only, frozen parameters are plain arguments of the
step. An update whose loss or gradient is not finite changes nothing."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax import optim
from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.loss import loss_sums
from evlm_jax.models import param_names, quant
from evlm_jax.models.evlm import EVLM
from evlm_jax.ops.grouped_attention import FORMS, attention_form
from evlm_jax.parallel.agreement import agreed
from evlm_jax.parallel.compiler import step_options, told
from evlm_jax.parallel.distributed import log_once
from evlm_jax.parallel.mesh import Layout, check_parameters
from evlm_jax.parallel.sharding import all_gather_params, in_each_slice, reduce_scatter_grads


class TrainState(NamedTuple):
    """All arrays that a step updates."""

    step: jax.Array  # int32, finished updates
    params: nnx.State  # trainable
    groups: optim.Groups


def gradients(
    cfg: EVLMConfig, graphdef: nnx.GraphDef, params: nnx.State, frozen: nnx.State, batch: Batch
) -> tuple[nnx.State, dict]:
    """Gradient of the mean loss over all targets of the batch, from sums over the micro-batches;
    float32, sharded as parameters are stored.

    Returns:
      (gradients like `params`, sums over the batch as in loss.loss_sums)
    """

    def loss(params, rows):
        return loss_sums(nnx.merge(graphdef, params, frozen), rows, len(cfg.data.sources))

    def gradient(params, rows):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
        return reduce_scatter_grads(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), sums

    def zeros(params, zero):
        return reduce_scatter_grads(
            jax.tree.map(lambda p: jnp.full_like(p, zero, jnp.float32), params)
        )

    def micro_batch(total, rows):
        grads, sums = gradient(params, rows)
        return jax.tree.map(jnp.add, total, grads), sums

    params, slices = all_gather_params(params, cfg.train.operands), cfg.mesh.slices
    # The balance of experts is over all rows of a micro-batch, so its gradient needs those of all.
    apart = slices > 1 and not cfg.moe.copies
    if apart:
        gradient, zeros = in_each_slice(gradient), in_each_slice(zeros)
    groups = len(batch.tokens) // cfg.data.image_group
    micro_batches = jax.tree.map(
        functools.partial(_split, groups, cfg.train.accumulate, (slices,) * apart), batch
    )
    total = zeros(params, jnp.zeros((slices,) * apart))
    total, sums = jax.lax.scan(micro_batch, total, micro_batches)
    if apart:  # across the network once a step
        total = reduce_scatter_grads(jax.tree.map(lambda g: g.sum(0), total))
        sums = jax.tree.map(lambda x: x.sum(1), sums)
    sums = jax.tree.map(lambda x: x.sum(0), sums)
    count = jnp.maximum(sums["count"].sum(), 1)
    return jax.tree.map(lambda g: g / count, total), sums


def _split(groups: int, k: int, slices: tuple[int, ...], x: jax.Array) -> jax.Array:
    """[B or C, ...] -> k micro-batches, [k, *slices, ..].

    Pool c goes to number c % k, so that every device has its share of each.
    """
    return (
        x.reshape(groups // k, k, len(x) // groups, *x.shape[1:])
        .swapaxes(0, 1)
        .reshape(k, *slices, len(x) // math.prod((k, *slices)), *x.shape[1:])
    )


def train_step(
    cfg: EVLMConfig,
    graphdef: nnx.GraphDef,
    plan: optim.OptimizerPlan,
    state: TrainState,
    frozen: nnx.State,
    batch: Batch,
) -> tuple[TrainState, dict]:
    """One update. Returns the new state and the values that are logged."""
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


class TrainPhase:
    """A span of updates with one set of trained parameters: its plan, the shardings of its arrays,
    the frozen parameters, one compiled step.
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
        self.options = step_options(layout.mesh.devices.flat)
        self._step = layout.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, layout.replicated),
            compiler_options=self.options,
        )
        self.on_disk = jax.jit(
            lambda state: (param_names.flatten(cfg, state.params), optim.flatten(cfg, state.groups))
        )

    def begin(self, step: int, trainable: nnx.State, groups: optim.Groups) -> TrainState:
        """The state at the first step of the phase.

        Parameters are promoted to their dtype; all is copied, for a step overwrites it.
        """

        def own(tree, dtype):
            return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)

        trainable = own(trainable, self.cfg.train.param_dtype)
        return TrainState(
            jnp.int32(step),
            trainable,
            optim.begin(self.cfg, self.plan, trainable, own(groups, None)),
        )

    def attention(self) -> str:
        """One line about the form of attention on these devices."""
        wanted = self.cfg.train.attention
        with self.layout.active():
            form = attention_form(wanted, self.cfg.train.dtype)
        if form != wanted:
            platform, dtypes = FORMS[wanted]
            where = f"{platform.upper()}s and {' or '.join(dtypes)}"
            return f"attention by {form}: train.attention = '{wanted}' is for {where}"
        parts = [f"attention by {form}"]
        parts += ["to images by xla"] * (form == "cudnn")
        parts += ["of pictures by xla: vit.tiles is a mask"] * bool(
            form != "xla" and self.cfg.vit.tiles
        )
        return ", ".join(parts)

    def spec(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(
            self.begin, 0, nnx.split_state(self.shapes, self.plan.trains, ...)[0], {}
        )

    def frozen_spec(self) -> nnx.State:
        """Shapes and dtypes of what is frozen: train.frozen_dtype, or quantised."""

        def held(path, leaf):
            x = jax.tree.leaves(leaf)[0]
            dtype = x.dtype if quant.is_quantised(path, x) else self.cfg.train.frozen_dtype
            return leaf.replace(jax.ShapeDtypeStruct(x.shape, dtype))

        frozen = nnx.split_state(self.shapes, self.plan.trains, ...)[1]
        return nnx.from_flat_state([(p, held(p, x)) for p, x in nnx.to_flat_state(frozen)])

    def place(self, tree) -> Any:
        """Shardings of parameters of the whole model or of a part, or of moments."""
        if not isinstance(tree, nnx.State):
            return self.layout.trained(tree)
        trainable, frozen = nnx.split_state(tree, self.plan.trains, ...)
        return nnx.merge_state(self.layout.trained(trainable), self.layout.frozen(frozen))

    def enter(self, step: int, params: nnx.State, groups: optim.Groups) -> TrainState:
        """Splits the parameters of the whole model and begins; they may be sharded as in the phase
        before.
        """
        trainable, frozen = nnx.split_state(params, self.plan.trains, ...)
        self.frozen = _moved(frozen, self.layout.frozen(frozen))

        def size(tree):
            sizes = (quant.parameters(self.cfg, *leaf) for leaf in nnx.to_flat_state(tree))
            return f"{sum(sizes):,} parameters"

        log_once(
            f"phase {self.number} from step {step}: trains {size(trainable)}, freezes"
            f" {size(self.frozen)}"
        )
        log_once(self.attention())
        if self.options:
            log_once(told(self.options))
        log_once(
            "compiling and making the first step; a minute or more, less where the compiled program"
            " was kept"
        )
        return self._begin(step, trainable, groups)

    def lower(self) -> jax.stages.Lowered:
        """The step lowered for the devices of the layout, which need not be attached; `compile()`
        it to read memory, FLOPs and collectives.
        """
        inputs, layout = (self.spec(), self.frozen_spec(), Batch.spec(self.cfg)), self.layout
        frozen = inputs[1]
        shardings = layout.trained(inputs[0]), layout.frozen(frozen), layout.batch(inputs[2])
        return self._step.lower(
            *jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), inputs, shardings
            )
        )

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One step; `state` is donated."""
        return self._step(state, self.frozen, batch)

    def all_params(self, state: TrainState) -> nnx.State:
        """The parameters of the whole model."""
        return nnx.merge_state(state.params, self.frozen)

    def model(self, state: TrainState) -> EVLM:
        """The model, on the same arrays."""
        return nnx.merge(self.graphdef, state.params, self.frozen)


def _moved(tree: nnx.State, shardings: nnx.State) -> nnx.State:
    """The arrays of a tree as they are to lie; those that lie so already are the same buffers."""
    leaves, structure = jax.tree.flatten(tree)
    wanted = dict(enumerate(jax.tree.leaves(shardings)))
    away = {
        number: leaf
        for number, leaf in enumerate(leaves)
        if not leaf.sharding.is_equivalent_to(wanted[number], leaf.ndim)
    }
    if away:
        out = {number: wanted[number] for number in away}
        away = jax.jit(lambda arrays: arrays, out_shardings=out)(away)
    return jax.tree.unflatten(structure, [away.get(n, leaf) for n, leaf in enumerate(leaves)])
