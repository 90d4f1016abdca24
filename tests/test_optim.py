"""Rules, phases, schedule, and the update of each group."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from evlm_jax import optim
from evlm_jax.config import Rule
from evlm_jax.models.evlm import EVLM
from tests.helpers.tiny import CROSS_ONLY, UPPER_VIT, tiny_config

TWO = (
    {"start": 0.0, "warmup": 0, "rules": CROSS_ONLY},
    {"start": 0.25, "warmup": 0, "rules": UPPER_VIT},
)


@functools.cache
def shapes(cfg):
    return nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))


def test_first_match_decides():
    rules = (Rule("^vit/blocks/1/", 0.5), Rule("gate$", None), Rule(".", 1.0))
    rates = optim.resolve(rules, ["vit/blocks/1/gate", "xattn/0/gate", "vit/blocks/10/scale1"])
    assert rates == {"vit/blocks/1/gate": 0.5, "xattn/0/gate": None, "vit/blocks/10/scale1": 1.0}


def test_every_name_needs_a_rule_and_every_rule_a_name():
    with pytest.raises(ValueError, match="no rule matches llm/embed"):
        optim.resolve((Rule("^vit/", 1.0),), ["vit/cls", "llm/embed"])
    with pytest.raises(ValueError, match=r"no parameter is decided by '\^llm/head'"):
        optim.resolve(
            (Rule("^llm/", None), Rule("^llm/head", 1.0)), ["llm/embed", "llm/head/kernel"]
        )


def test_layers_of_a_stack_must_agree():
    phases = (
        {
            "start": 0.0,
            "warmup": 0,
            "rules": ({"pattern": "^vit/blocks/[123]/", "lr": 1.0}, *CROSS_ONLY),
        },
    )
    split = tiny_config(optim={"phases": phases})
    with pytest.raises(ValueError, match=r"vit/blocks/0/.*vit/blocks/1/.*add 1 to vit\.cuts"):
        optim.optimizer_plan(split, 0, shapes(split))
    mended = tiny_config(optim={"phases": phases}, vit={"cuts": (1,)})
    trained = {
        path[2]
        for path in optim.optimizer_plan(mended, 0, shapes(mended)).rates
        if path[0] == "vit"
    }
    assert trained == {1, 2, 3}  # the stacks of block 1, of block 2, and of block 3


def test_phases_begin_on_time():
    cfg = tiny_config(optim={"phases": TWO}, train={"steps": 12})
    assert [optim.phase_at(cfg, step) for step in (0, 2, 3, 11)] == [0, 0, 1, 1]
    late = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=1))
    with pytest.raises(ValueError, match="must ascend"):
        optim.phase_at(late, 0)


def test_what_becomes_trainable_in_mid_run_warms_up():
    """By default as long as the run did; the first phase needs none, and a number that is given
    counts.
    """

    def phases(*later):
        return {
            "phases": ({"rules": CROSS_ONLY}, {"start": 0.25, "rules": UPPER_VIT} | dict(later)),
            "warmup": 3,
        }

    for given, steps in (((), 3), ((("warmup", 0),), 0), ((("warmup", 7),), 7)):
        cfg = tiny_config(optim=phases(*given), train={"steps": 12})
        assert optim.optimizer_plan(cfg, 1, shapes(cfg)).warmup == {0: 0, 1: steps}


def test_schedule_warms_up_and_ends_at_the_minimum():
    cfg = tiny_config(optim={"lr": 1.0, "min_lr": 0.1, "warmup": 4}, train={"steps": 12})
    rates = np.array([optim.schedule(cfg, jnp.int32(step)) for step in range(12)])
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[7], 0.55, rtol=1e-6)  # half way down
    np.testing.assert_allclose(rates[11], 0.1, rtol=1e-6)
    assert (np.diff(rates[3:]) < 0).all()


def trainable(cfg, plan, seed=0):
    rng = np.random.default_rng(seed)
    state = nnx.filter_state(shapes(cfg), plan.trains)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), state)


def begin(cfg, plan, *args):
    return jax.jit(lambda *args: optim.begin(cfg, plan, *args))(*args)


def update(cfg, plan, *args):
    return jax.jit(lambda *args: optim.update(cfg, plan, *args))(*args)


def test_update_equals_optax_adamw():
    """One group, one rate, no clipping and decay everywhere: optax's own AdamW,
    three steps long.
    """
    cfg = tiny_config(optim={"no_decay": (), "clip": 1e9})
    plan = optim.optimizer_plan(cfg, 0, shapes(cfg))
    params = trainable(cfg, plan)
    theirs, groups = params, begin(cfg, plan, params, {})
    tx = optax.adamw(
        lambda n: optim.schedule(cfg, n),
        cfg.optim.b1,
        cfg.optim.b2,
        cfg.optim.eps,
        weight_decay=cfg.optim.weight_decay,
    )
    state, apply = tx.init(theirs), jax.jit(tx.update)
    for step in range(3):
        grads = trainable(cfg, plan, seed=step + 1)
        params, groups, norm = update(cfg, plan, jnp.int32(step), params, grads, groups)
        updates, state = apply(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, theirs
    )
    np.testing.assert_allclose(norm, optax.global_norm(grads), rtol=1e-6)


def test_clip_decay_and_multiplier():
    cfg = tiny_config(
        optim={
            "phases": ({"start": 0.0, "warmup": 0, "rules": UPPER_VIT},),
            "clip": 1.0,
            "weight_decay": 0.5,
            "b1": 0.0,
        }
    )
    plan = optim.optimizer_plan(cfg, 0, shapes(cfg))
    params = trainable(cfg, plan)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), params)
    new, groups, norm = update(cfg, plan, jnp.int32(1), params, grads, begin(cfg, plan, params, {}))
    clipped = 3.0 / float(norm)
    np.testing.assert_allclose(
        groups[0].mu.xattn.q.kernel[...], clipped, rtol=1e-5
    )  # b1 = 0: the gradient itself
    rate, direction = float(optim.schedule(cfg, 1)), clipped / (clipped + cfg.optim.eps)

    def expect(p, lr, decay):
        return p - rate * lr * (direction + decay * p)

    for got, before, lr, decay in (
        (new.xattn.q.kernel, params.xattn.q.kernel, 1.0, 0.5),
        (new.xattn.attn_gate.scalar, params.xattn.attn_gate.scalar, 1.0, 0.0),
        (new.vit.stacks[2].mlp.fc1.kernel, params.vit.stacks[2].mlp.fc1.kernel, 0.5, 0.5),
        (new.vit.stacks[2].norm1.scale, params.vit.stacks[2].norm1.scale, 0.5, 0.0),
    ):
        np.testing.assert_allclose(got[...], expect(before[...], lr, decay), rtol=1e-4, atol=1e-6)


def test_groups_begin_go_on_and_end():
    """Cross-attention, then the upper ViT too, then cross-attention alone, then the ViT again: it
    starts anew.
    """
    starts = (0.0, 0.25, 0.5, 0.75)
    rules = (CROSS_ONLY, UPPER_VIT, CROSS_ONLY, UPPER_VIT)
    phases = tuple(
        {"start": s, "warmup": 4 * (i == 1), "rules": r}
        for i, (s, r) in enumerate(zip(starts, rules, strict=True))
    )
    cfg = tiny_config(optim={"phases": phases, "warmup": 0, "weight_decay": 0.0})
    groups, seen = {}, []
    for phase in range(4):
        plan = optim.optimizer_plan(cfg, phase, shapes(cfg))
        params = trainable(cfg, plan)
        groups = begin(cfg, plan, params, groups)
        new, groups, _ = update(
            cfg, plan, jnp.int32(0), params, trainable(cfg, plan, seed=1), groups
        )
        seen.append({g: int(adam.count) for g, adam in groups.items()})
        if phase == 1:  # its own warm-up: a quarter of the rate, beside the rule's half
            moved = new.vit.stacks[2].mlp.fc1.kernel[...] - params.vit.stacks[2].mlp.fc1.kernel[...]
            rms = float(jnp.sqrt(jnp.mean(moved**2)))
            np.testing.assert_allclose(rms, float(optim.schedule(cfg, 0)) * 0.5 / 4, rtol=0.01)
    assert seen == [{0: 1}, {0: 2, 1: 1}, {0: 3}, {0: 4, 3: 1}]


def test_groups_survive_the_way_to_disk():
    cfg = tiny_config(optim={"phases": TWO})
    plan = optim.optimizer_plan(cfg, 1, shapes(cfg))
    params = trainable(cfg, plan)
    groups = begin(
        cfg, plan, params, begin(cfg, optim.optimizer_plan(cfg, 0, shapes(cfg)), params, {})
    )
    _, groups, _ = update(cfg, plan, jnp.int32(0), params, params, groups)
    arrays = {name: np.asarray(array) for name, array in optim.flatten(cfg, groups).items()}
    assert {"0/count", "0/mu/xattn/3/q/kernel", "1/nu/vit/blocks/3/attn/q/kernel"} <= set(arrays)
    back = optim.unflatten(cfg, plan, arrays, shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, groups, back)
