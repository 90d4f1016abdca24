"""Fine-grained mixture of experts (paper section 2): a router picks k of E slices of an FFN for a
token, a world expert sees all.

    y = world(x) + sum over the k chosen experts e of gate_e * fc2_e(gelu(fc1_e(x)))

    gates = softmax(x @ router) over all E, the k largest; "renormalise" divides them by their sum

Unusual: the router is float32 whatever the rest is. A gate multiplies the hidden layer instead of
the output, which is the same and narrower, so no output of an expert is kept for the backward pass
(docs/decisions.md, D-MODEL-3). Padding is not routed, and counts in no statistic."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evlm_jax.config import MoEConfig
from evlm_jax.models.layers import ACTIVATIONS, MLP, param
from evlm_jax.ops import expert_all_to_all
from evlm_jax.ops.decode_matmul import Packed, pack
from evlm_jax.ops.expert_all_to_all import Exchange, Routes, over_rounds
from evlm_jax.ops.grouped_attention import permute
from evlm_jax.ops.grouped_matmul import (
    blocks_matmul,
    combine,
    combine_matmul,
    dispatch,
    dispatch_matmul,
    group,
    map_blocks,
)
from evlm_jax.ops.matmul import operand_dtype
from evlm_jax.ops.platform import platform
from evlm_jax.parallel.sharding import gathered_weight, mesh_axes, shard_map_local

TEXT, MEDIA, PADDING = 0, 1, -1  # kinds of tokens


class Routing(NamedTuple):
    """Statistics of one layer's routing: float32 sums over tokens, so that micro-batches add up."""

    tokens: jax.Array  # [], how many were routed
    load: (
        jax.Array
    )  # [2, E] choices of each expert, by text and by media tokens; dropped ones count
    dropped: jax.Array  # [] choices over the capacity
    entropy: jax.Array  # [] of the probabilities over all E, in nats
    # [] tokens * load-balance loss: E * sum of (share of the choices * mean probability), 1 when
    # balanced
    balance: jax.Array
    z: jax.Array  # [] squared logsumexp of the logits


def auxiliary_loss(cfg: MoEConfig, routing: Routing) -> jax.Array:
    """Load-balance loss (arXiv 2101.03961; 2401.06066) and z-loss (2202.08906), weighted, summed
    over layers: the mean over tokens.
    """
    return (
        (cfg.balance * routing.balance + cfg.z * routing.z) / jnp.maximum(routing.tokens, 1)
    ).sum()


class Router(nnx.Module):
    """x [N, D] -> logits [N, E], float32."""

    def __init__(self, width: int, experts: int, rngs: nnx.Rngs):
        self.kernel = param(rngs, (width, experts), ("whole", "whole"), std=width**-0.5)

    @jax.named_scope("router")
    def __call__(self, x: jax.Array) -> jax.Array:
        logits = jnp.dot(
            x.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision="highest"
        )
        return checkpoint_name(logits, "linear")


class GroupedLinear(nnx.Module):
    """One matrix an expert [E, in, out]."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str, str], rngs: nnx.Rngs):
        self.kernel, self.axes = param(rngs, shape, axes, std=shape[1] ** -0.5), axes


class Experts(nnx.Module):
    """The routed part: two matrices an expert around GELU, without biases."""

    def __init__(self, width: int, hidden: int, cfg: MoEConfig, rngs: nnx.Rngs):
        self.fc1 = GroupedLinear((cfg.experts, width, hidden), ("expert", "embed", "mlp"), rngs)
        self.fc2 = GroupedLinear((cfg.experts, hidden, width), ("expert", "mlp", "embed"), rngs)
        self.cfg = cfg

    @jax.named_scope("experts")
    def __call__(
        self, x: jax.Array, gates: jax.Array, chosen: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [N, D], gates [N, k], chosen [N, k] (E: nobody) -> ([N, D], number of dropped choices).

        On a mesh, a capacity is a device's.
        """
        rows, kernels = (
            ("rows",),
            [gathered_weight(linear.kernel, operand_dtype(x)) for linear in (self.fc1, self.fc2)],
        )
        run = shard_map_local(
            functools.partial(_experts, self.cfg),
            (rows, rows, rows, self.fc1.axes, self.fc2.axes),
            (rows, rows),
        )
        out, dropped = run(x, gates, chosen, *kernels)
        return checkpoint_name(out, "linear"), dropped.sum()


def _experts(
    cfg: MoEConfig,
    x: jax.Array,
    gates: jax.Array,
    chosen: jax.Array,
    fc1: jax.Array,
    fc2: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Experts.__call__ on the tokens of one device, which holds [E / P, ...] experts and a part of
    their hidden layers; dropped [1].
    """
    k, tokens = chosen.shape[1], (chosen[:, 0] < cfg.experts).sum()
    limit = (
        jnp.ceil(cfg.capacity * tokens * k / cfg.experts).astype(jnp.int32)
        if cfg.capacity
        else None
    )
    block, axis = block_rows(chosen.size, cfg), mesh_axes("expert")
    groups = group(chosen.T.reshape(-1), cfg.experts, 1 if axis else block, limit)
    gate, parts = permute(gates.T.reshape(-1), groups.choice, groups.row)[:, None], mesh_axes("mlp")
    if axis:
        rows = dispatch(x, groups, len(x))
        others = tuple(name for name in mesh_axes("rows") if name not in axis)
        exchange = Exchange(*axis, others, platform() != "cpu", block, len(rows))
        routes = expert_all_to_all.routes(groups.first, exchange)
        one = functools.partial(_round, exchange)
        out = over_rounds(one, routes, exchange, rows, gate, fc1, fc2)
        out = combine(out, groups, len(x))
    else:
        hidden = checkpoint_name(dispatch_matmul(x, fc1, groups, block), "linear")
        out = combine_matmul(_gated(hidden, gate), fc2, groups, len(x), block)
    return jax.lax.psum(out, parts) if parts else out, (
        tokens * k - (groups.row < len(groups.choice)).sum()
    )[None]


def _round(
    exchange: Exchange,
    routes: Routes,
    number: jax.Array,
    rows: jax.Array,
    gate: jax.Array,
    fc1: jax.Array,
    fc2: jax.Array,
) -> jax.Array:
    """Rows [R, D] of one device, gate [R, 1] -> [R, D]: fc2(gate * gelu(fc1(row))) of those that
    travel in this round, 0 of others.
    """
    rows, gate = (expert_all_to_all.dispatch(a, routes, number, exchange) for a in (rows, gate))
    first = expert_all_to_all.own_blocks(routes, number, exchange)
    hidden = checkpoint_name(blocks_matmul(rows, fc1, first, exchange.block), "linear")
    out = blocks_matmul(_gated(hidden, gate), fc2, first, exchange.block)
    return expert_all_to_all.combine(out, routes, number, exchange)


def block_rows(choices: int, cfg: MoEConfig) -> int:
    """Rows of a block: no more than an expert's share of the choices."""
    return max(1, min(cfg.expert_block, choices // cfg.experts))


def _gated(hidden: jax.Array, gate: jax.Array) -> jax.Array:
    """gate * gelu(hidden)."""
    return (ACTIVATIONS["gelu"](hidden) * gate).astype(hidden.dtype)


class MoE(nnx.Module):
    """The FFN of a gated cross-attention block with experts: x [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, hidden: int, cfg: MoEConfig, rngs: nnx.Rngs):
        self.router = Router(width, cfg.experts, rngs)
        self.experts = Experts(width, hidden // cfg.slices, cfg, rngs)
        self.world = MLP(width, hidden, "gelu", False, rngs)
        self.cfg = cfg

    @jax.named_scope("moe")
    def __call__(self, x: jax.Array, kind: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """x [B, T, D], kind [B, T] -> [B, T, D], and the routing. `kind`: TEXT, MEDIA or PADDING;
        by default all text.
        """
        flat = x.reshape(-1, x.shape[-1])
        kind = jnp.full(len(flat), TEXT) if kind is None else kind.reshape(-1)
        logits = self.router(flat)
        probabilities = jax.nn.softmax(logits)
        gates, chosen = jax.lax.top_k(probabilities, self.cfg.top_k)
        if self.cfg.gates == "renormalise":
            gates = gates / gates.sum(-1, keepdims=True)
        chosen = jnp.where((kind == PADDING)[:, None], self.cfg.experts, chosen)
        routed, dropped = self.experts(flat, gates, chosen)
        return (self.world(flat) + routed).reshape(x.shape), _statistics(
            logits, probabilities, chosen, kind, dropped
        )


def _statistics(
    logits: jax.Array,
    probabilities: jax.Array,
    chosen: jax.Array,
    kind: jax.Array,
    dropped: jax.Array,
) -> Routing:
    """logits and probabilities [N, E], chosen [N, k], kind [N]."""
    experts, real = logits.shape[1], (kind != PADDING).astype(jnp.float32)
    tokens = real.sum()
    at = jnp.where((kind == PADDING)[:, None], 2 * experts, kind[:, None] * experts + chosen)
    load = jnp.zeros(2 * experts).at[at].add(1.0, mode="drop").reshape(2, experts)
    share = load.sum(0) / jnp.maximum(load.sum(), 1)
    total = jax.nn.logsumexp(logits, axis=-1)
    entropy = total - (probabilities * logits).sum(-1)
    return Routing(
        tokens=tokens,
        load=load,
        dropped=dropped.astype(jnp.float32),
        entropy=(entropy * real).sum(),
        balance=experts * (share * (probabilities * real[:, None]).sum(0)).sum(),
        z=(jnp.square(total) * real).sum(),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Experts of one `layer` of a stack, in the layout of decoding; called as `Experts` is."""

    fc1: Packed  # of the stack's layers * E matrices
    fc2: Packed
    cfg: MoEConfig = dataclasses.field(metadata={"static": True})
    layer: jax.Array | int = 0

    @classmethod
    def of(cls, experts: Experts, dtype: str) -> "PackedExperts":
        """Packs the experts of a stack [L, E, ...], with matrices of `dtype`."""

        def flat(linear):
            return linear.kernel[...].reshape(-1, *linear.kernel.shape[2:])

        return cls(
            *(Packed(pack(flat(linear), dtype), None) for linear in (experts.fc1, experts.fc2)),
            experts.cfg,
        )

    @jax.named_scope("experts")
    def __call__(
        self, x: jax.Array, gates: jax.Array, chosen: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As `Experts`; of the matrices only those of chosen experts are read."""
        block, matrix = (
            block_rows(chosen.size, self.cfg),
            self.layer * self.cfg.experts + jnp.arange(self.cfg.experts),
        )
        groups = group(chosen.T.reshape(-1), self.cfg.experts, block)

        def one(linear):
            return lambda rows, number: dataclasses.replace(linear, layer=number)(rows)

        def product(rows, linear):
            return map_blocks(one(linear), rows, matrix, groups.first, block)

        gate = permute(gates.T.reshape(-1), groups.choice, groups.row)[:, None]
        hidden = _gated(product(dispatch(x, groups, len(x)), self.fc1), gate)
        return combine(product(hidden, self.fc2), groups, len(x)), jnp.zeros(())
