"""A dense FFN and what upcycling makes of it: the same function at step 0, and nothing that cannot
learn.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax import cli
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.lazy_tensors import Tensor, read_all
from evlm_jax.config import MoEConfig
from evlm_jax.config.load import load_config
from evlm_jax.convert.upcycle import _filled, receipt, upcycle, upcycle_layer
from evlm_jax.flops import real_tokens
from evlm_jax.launch import next_stage
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.moe import MoE
from evlm_jax.models.param_names import flatten, unflatten
from evlm_jax.train import train
from tests.helpers.random_model import random_model
from tests.helpers.tiny import TinyData, tiny_batch, tiny_config, tiny_towers

WIDTH, HIDDEN = 24, 32
PRESERVE = dict(
    copies=4,
    slices=4,
    top_k=4,
    gates="renormalise",
    capacity=0.0,
    balance=0.01,
    z=0.001,
    expert_block=64,
    upcycle="preserve",
)
OTHERS = [
    {},
    {"top_k": 1},
    {"top_k": 7, "gates": "softmax"},
    {"top_k": 16, "capacity": 0.5},
    {"copies": 1, "top_k": 2},
]
EXACT = [
    PRESERVE,
    PRESERVE | {"slices": 2, "top_k": 2},
    *(PRESERVE | {"upcycle": "preserve_zero"} | other for other in OTHERS),
]


def layer(seed=0):
    """The arrays of one dense block, as far as its FFN goes."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

    norm = {"ffn_norm/scale": 1 + normal(WIDTH), "ffn_norm/bias": normal(WIDTH)}
    return {
        "ffn/fc1/kernel": normal(WIDTH, HIDDEN),
        "ffn/fc2/kernel": normal(HIDDEN, WIDTH),
        "attn_gate": normal(1),
    } | norm


@pytest.mark.parametrize("fields", EXACT)
def test_the_function_is_preserved(fields):
    moe, dense = MoEConfig(**fields), layer()
    made = upcycle_layer(dense, moe, np.random.default_rng(0))
    assert made["attn_gate"] is dense["attn_gate"] and "ffn/fc1/kernel" not in made
    difference, largest, load = receipt(dense, made, moe)
    assert difference <= 1e-5 * largest and (load > 0).all()
    if moe.upcycle == "preserve":  # a token's experts are one whole copy
        assert (load.reshape(moe.copies, moe.slices) == load[:: moe.slices, None]).all()


@pytest.mark.parametrize("gates", ["renormalise", "softmax"])
def test_plain_copies_are_another_function(gates):
    """The policy of the paper: literal slices and copies. The receipt says by how much."""
    moe = MoEConfig(**PRESERVE | {"upcycle": "paper", "gates": gates})
    dense = layer()
    made = upcycle_layer(dense, moe, np.random.default_rng(0))
    fc1, fc2 = (made[f"ffn/experts/{fc}/kernel"] for fc in ("fc1", "fc2"))
    for copy in (slice(i, i + 4) for i in range(0, 16, 4)):
        np.testing.assert_array_equal(np.concatenate(list(fc1[copy]), 1), dense["ffn/fc1/kernel"])
        np.testing.assert_array_equal(np.concatenate(list(fc2[copy]), 0), dense["ffn/fc2/kernel"])
    assert all(
        (made[f"ffn/world/{fc}/kernel"] == dense[f"ffn/{fc}/kernel"]).all() for fc in ("fc1", "fc2")
    )
    assert len(np.unique(made["ffn/router/kernel"][0])) == 16
    difference, largest, _ = receipt(dense, made, moe)
    assert difference > 0.02 * largest


@pytest.mark.parametrize(
    "change", [{"top_k": 3}, {"gates": "softmax"}, {"slices": 2}, {"capacity": 1.5}]
)
def test_what_cannot_be_preserved_is_refused(change):
    with pytest.raises(ValueError, match="use moe.upcycle=preserve_zero"):
        upcycle_layer(layer(), MoEConfig(**PRESERVE | change), np.random.default_rng(0))


@pytest.mark.parametrize("policy", ["preserve", "preserve_zero"])
@pytest.mark.pinned
def test_everything_learns_within_two_steps(policy):
    moe = MoEConfig(**PRESERVE | {"upcycle": policy})
    dense = layer()
    model = _filled(
        lambda: MoE(WIDTH, HIDDEN, moe, nnx.Rngs(0)),
        upcycle_layer(dense, moe, np.random.default_rng(0)),
    )
    rng = np.random.default_rng(1)
    x, target = (jnp.asarray(rng.standard_normal((1, 256, WIDTH)), jnp.float32) for _ in range(2))

    @jax.jit
    def step(model):
        gradient = jax.grad(lambda model: jnp.square(model(x)[0] - target).mean())(model)
        return jax.tree.map(lambda p, g: p - 0.1 * g, model, gradient), gradient

    moved, first = step(model)
    _, second = step(moved)

    def size(g):
        return np.abs(np.asarray(g)).max(
            tuple(range(1, g.ndim)) if g.ndim == 3 else None
        )  # of each expert

    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (np.maximum(size(a), size(b)) > 0).all()
    if policy == "preserve":
        assert all((size(a) > 0).all() for a in jax.tree.leaves(first))


@pytest.mark.pinned
def test_a_whole_model_is_preserved():
    """Outputs of the dense model and of the one with experts, gates open; padding, which nobody
    sees, is not routed.
    """
    dense_cfg = tiny_config()
    cfg = tiny_config(moe={"copies": 4})
    dense, batch = random_model(dense_cfg, 0), tiny_batch(dense_cfg, 0)
    arrays = {
        name: np.asarray(array) for name, array in flatten(dense_cfg, nnx.state(dense)).items()
    }
    made = read_all(upcycle({name: Tensor.of(array) for name, array in arrays.items()}, cfg))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    experts = nnx.merge(graphdef, jax.tree.map(jnp.asarray, unflatten(cfg, made, shapes)))
    hidden = jax.jit(lambda model, batch: model.hidden(batch))
    before, after = (
        np.asarray(hidden(model, batch))[real_tokens(batch)] for model in (dense, experts)
    )
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


EXPERIMENT = """
from ml_collections import ConfigDict
from tests.helpers import tiny

def get_config(form="dense"):
    config = ConfigDict(tiny._TINY)
    config.train.update(steps=2, save_every=2)
    config.moe.copies = 2 if form == "moe" else 0
    return config
"""


@pytest.mark.pinned
def test_command_line(tmp_path, capsys):
    """A dense run, upcycled, trained on; each step refuses what does not fit."""
    (tmp_path / "tiny_experiment.py").write_text(EXPERIMENT)
    spec = str(tmp_path / "tiny_experiment.py")
    dense, cfg = load_config(spec), load_config(f"{spec}:moe")
    train(dense, tmp_path / "dense", TinyData(dense), tiny_towers(dense))
    with pytest.raises(
        ValueError, match="is dense and the config has moe.copies = 2: .*evlm upcycle"
    ):
        next_stage(cfg, tmp_path / "dense")
    command = [
        "upcycle",
        "--checkpoint",
        str(tmp_path / "dense"),
        "--out",
        str(tmp_path / "moe"),
        "--config",
    ]
    assert cli.main([*command, spec]) == 1
    assert "moe.copies is 0" in capsys.readouterr().err
    assert cli.main([*command, f"{spec}:moe"]) == 0
    said = "".join(capsys.readouterr())
    assert (
        all(f"layer {number}: |dense - moe| <= " in said for number in cfg.cross_layers)
        and "4 of 4 experts chosen" in said
    )
    assert cli.main([*command, f"{spec}:moe"]) == 1

    params, trained = next_stage(cfg, tmp_path / "moe")
    before = store.load_params(tmp_path / "dense")[0]
    kept = [name for name in before if "/ffn/" not in name]
    assert (
        all(params[name].read().tobytes() == before[name].tobytes() for name in kept)
        and len(params) == len(kept) + 4 * 5
    )
    assert {"xattn/3/ffn/router/kernel", "media/embedding"} <= trained
    assert train(cfg, tmp_path / "next", TinyData(cfg), params, trained) == 2
