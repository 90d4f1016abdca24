"""The mixture of experts against transformers' block and a loop over tokens; inside the model:
padding, gradients, training, resume.
"""

import json
import math
import os
import signal
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.checkpoint import store
from evlm_jax.config import MoEConfig
from evlm_jax.loss import loss_sums
from evlm_jax.models import moe
from evlm_jax.parallel.status import Stopped
from evlm_jax.train import train
from tests.helpers.parity import needs_transformers
from tests.helpers.random_model import random_model
from tests.helpers.tiny import TinyData, tiny_batch, tiny_config, tiny_towers
from tests.test_generate import PROMPTS, cached_logits, full_forward, made

DEFAULTS = dict(
    copies=4,
    slices=4,
    top_k=4,
    gates="renormalise",
    capacity=0.0,
    balance=0.01,
    z=0.001,
    expert_block=8,
    upcycle="preserve",
)
WIDTH, HIDDEN = 24, 32
EXPERTS = {"copies": 2, "slices": 2, "top_k": 2}


def config(**changes) -> MoEConfig:
    return MoEConfig(**DEFAULTS | changes)


def block(cfg: MoEConfig) -> moe.MoE:
    """Random weights; a router whose choices are uneven."""
    rng = np.random.default_rng(0)
    shapes = nnx.eval_shape(lambda: moe.MoE(WIDTH, HIDDEN, cfg, nnx.Rngs(0)))

    def fill(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) * leaf.shape[-2] ** -0.5, jnp.float32)

    model = jax.tree.map(fill, shapes)
    model.router.kernel[...] = 2 * model.router.kernel[...]
    return model


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@jax.jit
def run(model, x, kind, weight):
    """Output, statistics, and the gradients of (output * weight).sum() with respect to the model
    and to x.
    """

    def loss(model, x):
        y, routing = model(x, kind)
        return (y * weight).sum(), (y, routing)

    (_, (y, routing)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return y, routing, *gradients


def inputs(rows=3, length=11):
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal((rows, length, WIDTH)).astype(np.float32) for _ in range(2))
    return x, weight


def transformers_block(ours, gates, k):
    """Qwen2Moe's sparse block with the weights of `ours`."""
    import torch
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen

    settings = dict(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN // 4,
        shared_expert_intermediate_size=HIDDEN,
        hidden_act="gelu",
    )
    settings |= dict(
        num_experts=16,
        num_experts_per_tok=k,
        norm_topk_prob=gates == "renormalise",
        experts_implementation="eager",
    )
    theirs = qwen.Qwen2MoeSparseMoeBlock(qwen.Qwen2MoeConfig(**settings))

    def transposed(kernel):
        return torch.tensor(np.asarray(kernel[...])).mT.contiguous()

    def one(hidden):
        return torch.eye(WIDTH)[-1].expand(hidden, WIDTH)

    shared = theirs.shared_expert
    with torch.no_grad():
        theirs.gate.weight.copy_(transposed(ours.router.kernel))
        theirs.experts.gate_up_proj.copy_(
            torch.cat([transposed(ours.experts.fc1.kernel), one(HIDDEN // 4).expand(16, -1, -1)], 1)
        )
        theirs.experts.down_proj.copy_(transposed(ours.experts.fc2.kernel))
        theirs.shared_expert_gate.weight.copy_(50 * one(1))  # its sigmoid is 1
        for linear, values in (
            (shared.gate_proj, transposed(ours.world.fc1.kernel)),
            (shared.up_proj, one(HIDDEN)),
        ):
            linear.weight.copy_(values)
        shared.down_proj.weight.copy_(transposed(ours.world.fc2.kernel))
    return theirs


@needs_transformers
@pytest.mark.parametrize(
    "gates, k", [("renormalise", 4), ("renormalise", 16), ("softmax", 1), ("softmax", 6)]
)
def test_equals_transformers_block(gates, k):
    """Qwen2Moe's sparse block with the same weights.

    Its experts are gated: with an input that is always 1, a gate is made 1.
    """
    import torch
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen

    ours, (x, weight) = block(config(gates=gates, top_k=k)), inputs()
    x[..., -1] = 1
    theirs = transformers_block(ours, gates, k)
    shared = theirs.shared_expert
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor)
    (expected * torch.tensor(weight)).sum().backward()
    logits = theirs.gate(tensor)[0]
    balance = qwen.load_balancing_loss_func((logits,), 16, k)

    with jax.default_matmul_precision("highest"):
        y, routing, of_model, of_x = run(ours, x, None, weight)
    close(y, expected.detach().numpy())
    close(
        of_x[..., :-1], tensor.grad.numpy()[..., :-1]
    )  # the last input also carries the gates that we do not have

    def back(gradient):
        return gradient.mT.numpy()

    close(of_model.router.kernel[...], back(theirs.gate.weight.grad))
    close(
        of_model.experts.fc1.kernel[...], back(theirs.experts.gate_up_proj.grad[:, : HIDDEN // 4])
    )
    close(of_model.experts.fc2.kernel[...], back(theirs.experts.down_proj.grad))
    close(of_model.world.fc1.kernel[...], back(shared.gate_proj.weight.grad))
    close(of_model.world.fc2.kernel[...], back(shared.down_proj.weight.grad))
    close(
        routing.balance / routing.tokens, balance.detach().numpy() / k
    )  # theirs is k when balanced
    close(routing.z / routing.tokens, logits.logsumexp(-1).square().mean().detach().numpy())


def loop(model: moe.MoE, x: np.ndarray, kind: np.ndarray):
    """Token by token in float64: (output, load [2, E], mean entropy, chosen [N, E], those that were
    not dropped).
    """
    cfg, kernels = (
        model.cfg,
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(nnx.state(model))],
    )
    fc1, fc2, router, world1, world2 = kernels
    gelu = np.vectorize(lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2)
    logits = x.astype(np.float64) @ router
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-p, axis=-1, kind="stable")[:, : cfg.top_k]
    real = kind != moe.PADDING
    limit = (
        math.ceil(cfg.capacity * real.sum() * cfg.top_k / cfg.experts)
        if cfg.capacity
        else len(x) * cfg.top_k
    )
    out, load, taken = gelu(x @ world1) @ world2, np.zeros((2, cfg.experts)), np.zeros(cfg.experts)
    chosen, kept = np.zeros((2, len(x), cfg.experts), bool)
    for place in range(cfg.top_k):  # all first choices go before second ones
        for token in np.flatnonzero(real):
            e = best[token, place]
            load[kind[token], e] += 1
            taken[e] += 1
            chosen[token, e], kept[token, e] = True, taken[e] <= limit
            if taken[e] > limit:
                continue
            gate = p[token, e] / (p[token, best[token]].sum() if cfg.gates == "renormalise" else 1)
            out[token] += gate * gelu(x[token] @ fc1[e]) @ fc2[e]
    return out, load, -(p * np.log(p)).sum(-1)[real].mean(), chosen, kept


def every_expert(model: moe.MoE, x: jax.Array, chosen: np.ndarray, kept: np.ndarray) -> jax.Array:
    """The definition, with a product of every token and every expert, for JAX to differentiate."""
    gates = jnp.where(chosen, jax.nn.softmax(x @ model.router.kernel[...]), 0)
    if model.cfg.gates == "renormalise":
        gates = gates / jnp.where(chosen.any(-1), gates.sum(-1), 1)[:, None]

    def gelu(a):
        return jax.nn.gelu(a, approximate=False)

    hidden = gelu(jnp.einsum("nd,edf->nef", x, model.experts.fc1.kernel[...]))
    routed = jnp.einsum("ne,nef,efd->nd", gates * kept, hidden, model.experts.fc2.kernel[...])
    return gelu(x @ model.world.fc1.kernel[...]) @ model.world.fc2.kernel[...] + routed


@pytest.mark.parametrize(
    "k, gates, capacity",
    [
        pytest.param(
            k,
            *(("softmax", 0.7) if k % 2 else ("renormalise", 0.0)),
            marks=[] if k in (1, 4, 7, 16) else [pytest.mark.slow],
        )
        for k in range(1, 17)
    ],
)
def test_equals_a_loop_over_tokens(gates, k, capacity):
    model, (x, weight) = block(config(gates=gates, top_k=k, capacity=capacity)), inputs()
    kind = np.random.default_rng(2).choice(
        [moe.TEXT, moe.MEDIA, moe.PADDING], x.shape[:2], p=[0.5, 0.3, 0.2]
    )
    flat, of = x.reshape(-1, WIDTH), weight.reshape(-1, WIDTH)
    out, load, entropy, chosen, kept = loop(model, flat, kind.reshape(-1))
    with jax.default_matmul_precision("highest"):
        y, routing, *gradients = run(model, x, kind, weight)
        wanted = jax.grad(
            lambda model, x: (every_expert(model, x, chosen, kept) * of).sum(), argnums=(0, 1)
        )(model, flat)
    close(y.reshape(-1, WIDTH), out)
    for mine, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        close(mine.reshape(other.shape), other)
    np.testing.assert_array_equal(routing.load, load)
    dropped = (chosen & ~kept).sum()
    assert routing.dropped == dropped and (dropped > 0) == (capacity > 0)
    np.testing.assert_allclose(routing.entropy / routing.tokens, entropy, rtol=1e-5)
    assert routing.tokens == (kind != moe.PADDING).sum()


def test_the_router_is_float32():
    """In a bfloat16 model whose products are rounded as well, choices are those of the float32
    logits.
    """
    model, (x, _) = block(config()), inputs()
    x = jnp.asarray(x, jnp.bfloat16)
    with jax.default_matmul_precision("bfloat16"):
        y, routing = jax.jit(lambda model, x: model(x))(model, x)
    logits = np.asarray(x, np.float32).reshape(-1, WIDTH) @ np.asarray(model.router.kernel[...])
    np.testing.assert_allclose(
        routing.z, np.square(np.log(np.exp(logits).sum(-1))).sum(), rtol=1e-5
    )
    assert y.dtype == jnp.bfloat16


@cache
def tiny(**changes):
    return tiny_config(moe=EXPERTS | changes)


@cache
def gradients(remat: str):
    """Of the loss with its auxiliary part, with respect to the FFNs of all blocks."""
    cfg = tiny_config(moe=EXPERTS, train={"remat": remat})
    graphdef, state = nnx.split(random_model(cfg, 0))

    def loss(state):
        return loss_sums(nnx.merge(graphdef, state), tiny_batch(cfg, 1), 2)[0]

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))["xattn"]["ffn"]


@pytest.mark.ci
def test_every_matrix_has_a_gradient():
    found = gradients("none")
    assert found["experts"]["fc1"]["kernel"].shape == (4, 4, 64, 16)
    for gradient in jax.tree.leaves(found):  # of each layer, and of each expert
        assert (np.abs(gradient).max((-1, -2)) > 0).all()


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.ci
def test_rematerialisation_changes_no_gradient(remat):
    for mine, other in zip(
        jax.tree.leaves(gradients(remat)), jax.tree.leaves(gradients("none")), strict=True
    ):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


def test_padding_and_neighbours_change_nothing():
    """Dropless: a row has the same output beside any other one, and its statistics leave padding
    out.
    """
    cfg = tiny()
    model, batch = random_model(cfg, 0), tiny_batch(cfg, 1, rows=2, fill=0.6)
    both, routing = jax.jit(lambda model, batch: model.forward_with_aux(batch))(model, batch)
    one = jax.tree.map(lambda a: a[:1], batch)
    alone, _ = jax.jit(lambda model, batch: model.forward_with_aux(batch))(model, one)
    np.testing.assert_allclose(both[:1], alone, atol=1e-5 * np.abs(alone).max())
    used = (batch.visible_until > np.arange(cfg.data.length) + 1) | (batch.positions > 0)
    media = batch.media_slot >= 0
    assert 0 < used.sum() < used.size
    np.testing.assert_array_equal(routing.tokens, np.full(4, used.sum()))
    np.testing.assert_array_equal(
        routing.load.sum(-1), [[2 * (used & ~media).sum(), 2 * media.sum()]] * 4
    )


def test_caches_equal_the_full_forward():
    """Generation with experts, which reads the chosen ones only,
    against one pass over everything.
    """
    model, generator = made("moe", **EXPERTS)
    documents = [generator.prompt(*prompt) for prompt in PROMPTS]
    tokens = np.random.default_rng(0).integers(0, 256, (len(documents), 6)).astype(np.int32)
    found = cached_logits(generator, documents, tokens)
    for row, document in enumerate(documents):
        wanted = full_forward(model, document, tokens[row].tolist())
        assert np.abs(found[row] - wanted).max() <= 1e-5 * np.abs(wanted).max(), row


STEPS = 6
RUN = dict(
    optim={"lr": 1e-2},
    train={"steps": STEPS, "save_every": 3, "keep": 9, "accumulate": 2},
    data={"cache_features": True},
)


@pytest.mark.ci
def test_training_is_told_of_and_resumes_with_the_same_bits(tmp_path):
    cfg = tiny_config(moe=EXPERTS | {"capacity": 1.0}, **RUN)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(cfg, whole, TinyData(cfg), tiny_towers(cfg))

    def stop(step, _):
        return step == 2 and os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="at step 2"):
        train(cfg, cut, TinyData(cfg), tiny_towers(cfg), on_step=stop)
    assert train(cfg, cut, TinyData(cfg), {}) == STEPS
    a, b = store.read(whole), store.read(cut)
    assert a.params.keys() == b.params.keys() and all(
        a.params[n].tobytes() == b.params[n].tobytes() for n in a.params
    )
    assert all(a.groups[n].tobytes() == b.groups[n].tobytes() for n in a.groups)
    start = store.read(whole, 3)
    moved = [
        name
        for name in a.params
        if "/ffn/" in name and a.params[name].tobytes() != start.params[name].tobytes()
    ]
    assert len(moved) == 4 * 5
    assert a.params["xattn/0/ffn/experts/fc1/kernel"].shape == (4, 64, 16) and a.params[
        "xattn/3/ffn/router/kernel"
    ].shape == (64, 4)

    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    for layer in cfg.cross_layers:

        def told(name, layer=layer):
            return line[f"xattn/{layer}/ffn/{name}"]

        for name in ("load", "load_text", "load_media"):
            assert len(told(name)) == 4 and abs(sum(told(name)) - 1) < 1e-6
        assert 0 < told("entropy") <= math.log(4) + 1e-6 and told("balance") > 0 and told("z") > 0
    assert sum(line[f"xattn/{layer}/ffn/dropped"] for layer in cfg.cross_layers) > 0
    mean = [
        0.01 * line[f"xattn/{layer}/ffn/balance"] + 0.001 * line[f"xattn/{layer}/ffn/z"]
        for layer in cfg.cross_layers
    ]
    np.testing.assert_allclose(line["auxiliary_loss"], sum(mean), rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 5}, r"moe.top_k must lie in 1..moe.copies \* moe.slices = 4"),
        ({"slices": 3}, "moe.slices must divide xattn.ffn = 32"),
        ({"gates": "sigmoid"}, "moe.gates is 'sigmoid'; use one of renormalise, softmax"),
        ({"upcycle": "copy"}, "moe.upcycle is 'copy'; use one of preserve"),
        ({"capacity": -1.0}, "moe.capacity must be at least 0"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(moe=EXPERTS | changes)
