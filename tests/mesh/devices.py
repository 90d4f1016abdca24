"""What runs on eight devices; tests/parallel/test_eight_devices.py starts it in a process that has
them.

Everything is compared with one device.
"""

import operator

import jax
import numpy as np
import pytest
from flax import nnx

from evlm_jax.checkpoint.initialize import put_sharded
from evlm_jax.parallel.agreement import agreed
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.mesh import Layout, make_layout
from evlm_jax.phase import TrainPhase, gradients
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, UPPER_VIT, tiny_batch, tiny_config

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2)]
ONE_SOFTMAX = "mplug_owl3 with one softmax"
POLICIES = [
    {"zero": 3, "frozen": "sharded", "images": "all"},
    {"zero": 2, "frozen": "replicated", "images": "rows"},
]

# A mesh of several axes, which holds what each axis does; the test of image groups has others,
# without experts. The rest is slow.
FAST = {((1, 2, 2, 2), True)}
GRADIENTS = [
    pytest.param(mesh, experts, marks=[] if (mesh, experts) in FAST else [pytest.mark.slow])
    for mesh in MESHES
    for experts in (False, True)
]


# Of every pair of logical axes that kernels have; those of the frozen layers train as well.
ADAPTERS = ("^llm/.*/(q|o|gate|down)/", "^xattn/.*/[qko]/", "^vit/.*/(attn/[qo]|mlp/fc[12])/")

# All that is frozen beside them, in tiles of which some have equal pieces on a mesh and some not.
QUANTISED = ("^vit/blocks/[01]/.*/kernel", "^llm/(layers/.*/kernel$|embed)")


def config(mesh=(1, 1, 1, 1), experts=False, policy=POLICIES[0], kind="", image_group=1, **train):
    """Sizes that eight devices divide; the upper half of the ViT trains too.

    `kind`: of a baseline.
    """
    axes = dict(zip(("data", "fsdp", "expert", "tensor"), mesh))
    parallel = kind in ("mplug_owl3", ONE_SOFTMAX)
    own = BASELINES.get("mplug_owl3" if parallel else kind, {})
    adapters, held = ((), ()) if experts or kind else (ADAPTERS, QUANTISED)
    rules = ({"pattern": "^llm/.*/lora_", "lr": 1.0},) * bool(adapters) + UPPER_VIT
    return tiny_config(
        lora={"patterns": adapters, "rank": 3, "alpha": 0.6},  # more would amplify rounding
        quant={"patterns": held, "kind": "nf4", "tile": 16},
        # of one kind a multiple of 4 alone, as SigLIP so400m's is of 16
        vit={"heads": 8, "width": 64, "mlp": 124 if kind == "open_flamingo" else 128}
        | own.get("vit", {}),
        llm={"heads": 8, "kv_heads": 8, "head_dim": 8} | own.get("llm", {}),
        xattn={"heads": 16, "kv_heads": 8, "head_dim": 8, "ffn": 64}
        | own.get("xattn", {})
        | ({"heads": 8} if parallel else {})  # llm.heads
        | ({"gate": "softmax"} if kind == ONE_SOFTMAX else {}),
        bridge={"heads": 8, "head_dim": 8} | own.get("bridge", {}),
        media=own.get("media", {}),
        moe={"copies": 4 if experts else 0},
        data={
            "images": 8,
            "length": 64,
            "targets": 32,
            "image_group": image_group,
            "slots": 8 * image_group,
            "block_pairs": 24 * image_group,
        },
        optim={"phases": ({"start": 0.0, "warmup": 0, "rules": rules},), "lr": 1e-2},
        train={"batch": 8, "remat": "dots", "loss_chunk": 12, "save_every": 2, "steps": 4} | train,
        mesh=axes | policy,
    )


def layout_of(cfg) -> Layout:
    count = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.expert * cfg.mesh.tensor
    return make_layout(cfg, jax.devices()[:count])


def found(cfg):
    """(gradients and sums of a random model on a batch, with arrays as they lie on the mesh)."""
    layout = layout_of(cfg)
    phase = TrainPhase(cfg, 0, layout)
    params = jax.tree.map(np.asarray, nnx.state(random_model(cfg, 0)))
    trainable, frozen = nnx.split_state(params, phase.plan.trains, ...)
    trainable, frozen = put_sharded(trainable, layout.trained), put_sharded(frozen, layout.frozen)
    run = layout.jit(
        lambda p, f, b: gradients(cfg, phase.graphdef, p, f, b),
        out_shardings=(layout.trained(trainable), layout.replicated),
    )
    with jax.default_matmul_precision("highest"):
        return run(
            trainable,
            frozen,
            layout.put_groups(tiny_batch(cfg, 0), range(cfg.image_groups), cfg.image_groups),
        )


@pytest.fixture(scope="module")
def alone():
    """Gradients and sums on one device, dense and with experts."""
    return [fetch_to_host(found(config(experts=experts))) for experts in (False, True)]


@pytest.mark.parametrize("mesh, experts", GRADIENTS)
def test_gradients_equal_those_of_one_device(mesh, experts, alone):
    policy = POLICIES[(MESHES.index(mesh) + experts) % 2]
    assert_equal_to_alone(config(mesh, experts, policy), alone[experts])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, policy",
    [
        ("open_flamingo", POLICIES[1]),
        ("idefics", POLICIES[1]),
        ("mllama", POLICIES[1]),
        ("fused", POLICIES[1]),
        ("mplug_owl3", POLICIES[1]),
        (ONE_SOFTMAX, POLICIES[1]),
        ("llava", POLICIES[0]),
    ],
)
def test_gradients_of_baselines_equal_those_of_one_device(kind, policy):
    assert_equal_to_alone(
        config((1, 2, 2, 2), policy=policy, kind=kind), fetch_to_host(found(config(kind=kind)))
    )


def assert_equal_to_alone(cfg, alone):
    """Gradients and sums of a mesh, within rounding."""
    grads, sums = found(cfg)
    assert_sharded(cfg, grads)
    assert_equal(grads, sums, alone)


@pytest.mark.parametrize(
    "mesh, accumulate",
    [((1, 2, 2, 2), 1), ((2, 1, 1, 2), 2)],
)
@pytest.mark.slow  # that of slices has groups as well
def test_rows_in_groups_give_the_gradients_of_rows_alone(mesh, accumulate, alone):
    """The same documents: image groups on a mesh against rows with image slots of their own on one
    device.
    """
    assert_equal(
        *found(config(mesh, policy=POLICIES[accumulate - 1], image_group=2, accumulate=accumulate)),
        alone[False],
    )


SLICES = [
    ((2, 1, 1, 2), POLICIES[0], 2, {"image_group": 2}),
    ((2, 2, 1, 2), POLICIES[0], 2, {}),
    ((4, 1, 1, 2), POLICIES[1], 2, {}),
    ((4, 1, 2, 1), POLICIES[0], 1, {"experts": True}),
    ((2, 2, 1, 1), POLICIES[1], 1, {"image_group": 2}),
    ((2, 2, 1, 1), POLICIES[1], 2, {"kind": "llava"}),
    ((2, 2, 1, 1), POLICIES[0], 2, {"kind": ONE_SOFTMAX}),
]


@pytest.mark.parametrize(
    "mesh, policy, accumulate, other",
    [pytest.param(*case, marks=[pytest.mark.slow] * bool(i)) for i, case in enumerate(SLICES)],
)
def test_gradients_of_slices_equal_those_of_one_device(mesh, policy, accumulate, other, alone):
    """Two slices sum their own, and each other's once; with experts in every micro-batch."""
    cfg = config(mesh, policy=policy | {"slices": 2}, accumulate=accumulate, **other)
    kind, experts = other.get("kind"), other.get("experts", False)
    one = fetch_to_host(found(config(kind=kind))) if kind else alone[experts]
    assert_equal(*found(cfg), one)


def assert_equal(grads, sums, expected):
    """To 2e-5 of the largest of an array: sums in another order differ by up to 1.1e-5 with jax
    0.12, by less than 1e-5 with 0.10.
    """
    grads, wanted = nnx.to_flat_state(fetch_to_host(grads)), dict(nnx.to_flat_state(expected[0]))
    assert {path for path, _ in grads} == wanted.keys()
    for path, leaf in grads:
        # The loss does not depend on a bias of keys: what is found there is rounding, and is
        # measured by the bias of queries.
        *above, module, name = path
        other = {"k": "q", "k_norm": "q_norm"}.get(module, module) if name == "bias" else module
        measure = wanted[(*above, other, name)]
        assert np.abs(leaf[...] - wanted[path][...]).max() <= 2e-5 * np.abs(measure[...]).max(), (
            path
        )
    for mine, other in zip(
        jax.tree.leaves(fetch_to_host(sums)), jax.tree.leaves(expected[1]), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


def assert_sharded(cfg, tree):
    """Every matrix is held in pieces: over fsdp and expert, and over tensor, as far as the mesh has
    them; but adapters (tests/parallel/test_mesh.py), whose rank here has no equal pieces.
    """
    parts, whole = cfg.mesh.fsdp * cfg.mesh.expert * cfg.mesh.tensor, 0
    for path, leaf in nnx.to_flat_state(tree):
        value, axes = jax.tree.leaves(leaf)[0], leaf.get_metadata()["axes"]
        if len(axes) < 2 or set(axes) <= {"whole", "norm"} or "rank" in axes:
            whole += 1
        else:
            assert value.size == parts * value.addressable_shards[0].data.size, (
                path,
                value.sharding,
            )
    assert whole < len(nnx.to_flat_state(tree))


@pytest.mark.parametrize("images", ["all", "rows"])
def test_holders_of_the_same_rows_agree_on_what_is_left_out(images, monkeypatch):
    """Two devices along `tensor` stand for two processes; the second one lacks an image, or has
    read another word.
    """
    cfg = config((1, 1, 1, 2), policy=POLICIES[0] | {"images": images})
    layout = layout_of(cfg)
    monkeypatch.setattr(Layout, "rows_are_shared", True)
    run = layout.jit(agreed)

    def held(change):
        """The batch as both hold it, after `change` of what the second one has read."""
        first, second = tiny_batch(cfg, 0), tiny_batch(cfg, 0)
        change(second)

        def put(one, other, sharding):
            pieces = [
                x[index]
                for x, index in zip((one, other), sharding.devices_indices_map(one.shape).values())
            ]
            on = [
                jax.device_put(piece, device)
                for piece, device in zip(pieces, layout.mesh.devices.flat)
            ]
            return jax.make_array_from_single_device_arrays(one.shape, sharding, on)

        return jax.tree.map(put, first, second, layout.batch(first))

    def lose(batch):
        batch.pixels[0], batch.targets[0] = 0, -1

    batch, same = run(held(lose))

    def copies(x):
        return [np.asarray(piece.data) for piece in x.addressable_shards]

    assert bool(same) and all(
        (piece[0] == -1).all() and (piece[1:] >= 0).any() for piece in copies(batch.targets)
    )
    if images == "rows":
        assert all(not piece[0].any() and piece[1].any() for piece in copies(batch.pixels))
    for change in (
        lambda batch: batch.tokens.__setitem__((0, 0), 99),
        lambda batch: batch.targets.__setitem__((0, 0), 99),
    ):
        assert not bool(run(held(change))[1])
    assert bool(run(held(lambda batch: None))[1])


def test_state_is_sharded_before_and_after_a_step():
    cfg = config((1, 2, 2, 2), experts=True)
    layout = layout_of(cfg)
    phase = TrainPhase(cfg, 0, layout)
    whole = put_sharded(jax.tree.map(np.asarray, nnx.state(random_model(cfg, 0))), phase.place)
    state = phase.enter(0, whole, {})
    frozen = nnx.split_state(whole, phase.plan.trains, ...)[1]
    assert all(map(operator.is_, jax.tree.leaves(phase.frozen), jax.tree.leaves(frozen)))
    for step in range(2):
        for tree in (state.params, state.groups[0].mu, state.groups[0].nu, phase.frozen):
            assert_sharded(cfg, tree)
        state, report = phase.update(state, layout.put_groups(tiny_batch(cfg, step), range(8), 8))
    assert report["good"] and state.step == 2
