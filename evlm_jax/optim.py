"""What is trained, at which rate, and the update: AdamW with one Adam state per trainable group.

Rules name parameters by their canonical name, one list per phase. A parameter belongs to the group
of the phase in which it became trainable. Each group has its own Adam state, its count included:
under a shared count a tower unfrozen in mid-run would miss Adam's bias correction, and its first
updates would be several times the rate. A frozen parameter has no Adam state at all."""

import itertools
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.config import EVLMConfig, Rule
from evlm_jax.models import param_names, quant
from evlm_jax.models.lora import is_adapter

Path = tuple[str | int, ...]  # of a leaf in the model's State
Groups = dict[int, optax.ScaleByAdamState]  # by the phase in which the group became trainable


def resolve(
    rules: tuple[Rule, ...], parameters: Iterable[str], absent: Iterable[str] = ()
) -> dict[str, float | None]:
    """{canonical name: multiplier of the schedule, None where frozen}; the first rule that matches
    decides.

    Args:
      absent: parameters that a baseline lacks beside EVLM; a rule that decides one of them is no
        mistake.
    Raises:
      ValueError: names that no rule matches; rules that decide no name.
    """
    out, decided = {}, set()

    def decides(name):
        return next((i for i, rule in enumerate(rules) if re.search(rule.pattern, name)), None)

    for name in parameters:
        if (number := decides(name)) is None:
            raise ValueError(
                f"optim.phases: no rule matches {name}; add a rule, lr=None freezes it"
            )
        out[name] = rules[number].lr
        decided.add(number)
    decided |= set(map(decides, absent))
    if idle := [repr(rule.pattern) for i, rule in enumerate(rules) if i not in decided]:
        raise ValueError(
            f"optim.phases: no parameter is decided by {', '.join(idle)}; the first match wins:"
            " move it up or remove it"
        )
    return out


def starts(cfg: EVLMConfig) -> tuple[int, ...]:
    """First step (0-based) of every phase. Raises ValueError where they do not ascend."""
    steps = tuple(
        round(phase.start * cfg.train.steps) if phase.step is None else phase.step
        for phase in cfg.optim.phases
    )
    if any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(
            f"optim.phases begin at steps {steps}; they must ascend: change a `start` or `step`, or"
            f" train.steps = {cfg.train.steps}"
        )
    return steps


def phase_at(cfg: EVLMConfig, step: int) -> int:
    """Number of the phase that makes update `step` (0-based)."""
    return sum(step >= first for first in starts(cfg)) - 1


@dataclass(frozen=True)
class OptimizerPlan:
    """What one phase trains, by in-memory path. Only trainable paths are listed."""

    rates: dict[Path, float]  # multiplier of the schedule
    group: dict[Path, int]  # the phase in which the path became trainable
    decay: dict[Path, float]  # weight decay
    warmup: dict[int, int]  # steps of each group's own warm-up

    def trains(self, path: Path, _value=None) -> bool:
        """Filter for nnx.split: the trainable part."""
        return path in self.rates


def optimizer_plan(cfg: EVLMConfig, phase: int, params: nnx.State) -> OptimizerPlan:
    """Resolves the rules of `phase`, and of the phases before it, over the (abstract) parameters of
    the whole model.

    Raises:
      ValueError: see `resolve`; or the layers of one stack are not treated alike, or what is
        quantised is trained.
    """
    paths = [path for path, _ in nnx.to_flat_state(params)]
    history = [_by_path(cfg, p, paths) for p in range(phase + 1)]
    rates = {path: rate for path, rate in history[phase].items() if rate is not None}
    for path, leaf in nnx.to_flat_state(params):
        if path in rates and quant.is_quantised(path, jax.tree.leaves(leaf)[0]):
            raise ValueError(
                f"optim.phases[{phase}] trains {param_names.canonical(cfg, path)[0]}, which is"
                " quantised: freeze it ('lr': None), or leave it out of quant.patterns"
            )
    group = {
        path: next(
            p for p in range(phase + 1) if all(later[path] is not None for later in history[p:])
        )
        for path in rates
    }

    def decays(path):
        return not any(
            re.search(pattern, param_names.canonical(cfg, path)[0])
            for pattern in cfg.optim.no_decay
        )

    decay = {path: cfg.optim.weight_decay * decays(path) for path in rates}
    return OptimizerPlan(
        rates, group, decay, {g: _warmup(cfg, g) for g in sorted(set(group.values()))}
    )


def _warmup(cfg: EVLMConfig, phase: int) -> int:
    """Steps of the own warm-up of what becomes trainable in a phase."""
    given = cfg.optim.phases[phase].warmup
    return given if given is not None else cfg.optim.warmup if phase else 0


def _by_path(cfg: EVLMConfig, phase: int, paths: list[Path]) -> dict[Path, float | None]:
    """{path: multiplier or None} under the rules of `phase`; every layer of a stack must have the
    same.
    """
    rates = resolve(
        cfg.optim.phases[phase].rules,
        [name for path in paths for name in param_names.canonical(cfg, path)],
        param_names.absent(cfg),
    )
    for path in paths:
        for before, name in itertools.pairwise(param_names.canonical(cfg, path)):
            if rates[before] != rates[name]:
                block = re.search(r"^vit/blocks/(\d+)/", name)
                mend = (
                    f"add {block[1]} to vit.cuts"
                    if block
                    else "its layers are one stack: give them one rule"
                )
                raise ValueError(
                    f"optim.phases[{phase}]: {before} has lr {rates[before]} and {name} has lr"
                    f" {rates[name]}; {mend}"
                )
    return {path: rates[param_names.canonical(cfg, path)[0]] for path in paths}


def check_adapters(cfg: EVLMConfig, shapes: nnx.State, params: Container[str]) -> None:
    """Raises ValueError where adapters of the model with these shapes begin anew, for `params` has
    none, and no phase trains them.
    """
    names = [n for path, _ in nnx.to_flat_state(shapes) for n in param_names.canonical(cfg, path)]
    idle = {name for name in names if is_adapter(name) and name not in params}
    for phase in cfg.optim.phases if idle else ():
        rates = resolve(phase.rules, names, param_names.absent(cfg))
        idle -= {name for name, rate in rates.items() if rate}
    if idle:
        raise ValueError(
            f"optim.phases: no rule trains {min(idle)}, which begins at 0: put one in front, as"
            " {'pattern': '/lora_', 'lr': 1.0}"
        )


def schedule(cfg: EVLMConfig, step: jax.Array) -> jax.Array:
    """Rate of update `step` (0-based): linear to `lr` over `warmup` updates, then a cosine to
    `min_lr` at the last one.
    """
    optim, done = cfg.optim, jnp.asarray(step, jnp.float32) + 1
    progress = jnp.clip((done - optim.warmup) / max(cfg.train.steps - optim.warmup, 1), 0, 1)
    cosine = optim.min_lr + (optim.lr - optim.min_lr) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.where(done < optim.warmup, optim.lr * done / max(optim.warmup, 1), cosine)


def begin(cfg: EVLMConfig, plan: OptimizerPlan, trainable: nnx.State, groups: Groups) -> Groups:
    """Adam states at the start of a phase: new for the newly trainable, without what is frozen
    again, the others as they are.
    """

    def exact(moments):
        return jax.tree.map(lambda x: x.astype(cfg.train.param_dtype), moments)

    old = {
        g: a._replace(mu=members(plan, g, a.mu), nu=exact(members(plan, g, a.nu)))
        for g, a in groups.items()
        if g in plan.warmup
    }
    return old | {
        g: _adam(cfg).init(members(plan, g, trainable)) for g in plan.warmup if g not in groups
    }


def update(
    cfg: EVLMConfig,
    plan: OptimizerPlan,
    step: jax.Array,
    params: nnx.State,
    grads: nnx.State,
    groups: Groups,
) -> tuple[nnx.State, Groups, jax.Array]:
    """One AdamW update of the trainable parameters.

        params -= schedule(step) * multiplier * group warm-up
                  * (adam(clipped gradient) + weight decay * params)

    Args:
      grads: float32 gradients of `params`; they are clipped here, by their global norm.
    Returns:
      (params, groups, norm of the gradients before clipping)
    """
    norm = optax.global_norm(grads)
    scale = cfg.optim.clip / jnp.maximum(norm, cfg.optim.clip)
    clipped = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, params)
    moved, new_groups = [], {}
    for g, adam in groups.items():
        mine = members(plan, g, params)
        direction, new_groups[g] = _adam(cfg).update(members(plan, g, clipped), adam)
        rate = schedule(cfg, step) * jnp.minimum(1.0, (adam.count + 1) / max(plan.warmup[g], 1))

        def move(p, d, lr, decay, rate=rate):
            return (p - rate * lr * (d + decay * p)).astype(p.dtype)

        moved.append(
            jax.tree.map(
                move, mine, direction, _spread(plan.rates, mine), _spread(plan.decay, mine)
            )
        )
    return nnx.merge_state(*moved), new_groups, norm


def flatten(cfg: EVLMConfig, groups: Groups) -> dict[str, jax.Array]:
    """Adam states by name: "0/count", "0/mu/NAME", "0/nu/NAME", "1/count", ... with the canonical
    names of parameters.
    """
    out = {}
    for g, adam in groups.items():
        moments = {"mu": param_names.flatten(cfg, adam.mu), "nu": param_names.flatten(cfg, adam.nu)}
        out |= {
            f"{g}/{kind}/{name}": array
            for kind, arrays in moments.items()
            for name, array in arrays.items()
        }
        out[f"{g}/count"] = adam.count
    return out


def unflatten(
    cfg: EVLMConfig,
    plan: OptimizerPlan,
    arrays: dict[str, np.ndarray | Tensor],
    params: nnx.State,
) -> Groups:
    """Inverse of `flatten`; `params` are those of the whole model, or their shapes. Moments may be
    tensors, counts are arrays.
    """

    def moment(g: int, kind: str) -> nnx.State:
        prefix = f"{g}/{kind}/"
        mine = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        return param_names.unflatten(cfg, mine, members(plan, g, params))

    return {
        g: optax.ScaleByAdamState(arrays[f"{g}/count"], moment(g, "mu"), moment(g, "nu"))
        for g in plan.warmup
    }


def members(plan: OptimizerPlan, group: int, tree: nnx.State) -> nnx.State:
    """The part of `tree` that belongs to `group`."""
    return nnx.filter_state(tree, lambda path, _: plan.group.get(path) == group)


def _adam(cfg: EVLMConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        cfg.optim.b1, cfg.optim.b2, cfg.optim.eps, mu_dtype=cfg.optim.mu_dtype
    )


def _spread(values: dict[Path, float], like: nnx.State) -> nnx.State:
    """`values` in the structure of `like`."""
    return nnx.from_flat_state(
        [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(like)]
    )
