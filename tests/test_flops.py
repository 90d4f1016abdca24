"""FLOPs needed, against the products of a program unrolled by hand: two decoder layers, a ViT of
four blocks, no scan, no remat.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from evlm_jax import flops
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.models.lora import is_adapter
from tests.helpers.tiny import BASELINES, tiny_batch, tiny_config

ROWS = 3


def config(**sections) -> EVLMConfig:
    """Every image is seen by T / I tokens."""
    sections = {
        "data": {"length": 48, "images": 4, "targets": 48},
        "vit": {"taps": (1, 3)},
        "llm": {"layers": 2, "tied": False},
    } | sections
    return tiny_config(**sections)


part = jax.named_scope


def norm(x, scale=1.0):
    return scale * x / jnp.sqrt(1e-6 + jnp.square(x).mean(-1, keepdims=True))


def split(x, rows, heads):
    return x.reshape(rows, -1, heads, x.shape[-1] // heads)


def attend(q, k, v, mask=0.0):
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) + mask)
    return jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(-1, q.shape[2] * q.shape[3])


def taps_of(cfg: EVLMConfig, p: dict, pixels: jax.Array) -> list[jax.Array]:
    """The ViT's part of `program`."""
    with part(flops.FROZEN_VIT):
        x = pixels @ p["vit/patch/kernel"].reshape(-1, cfg.vit.width)
    x = jnp.concatenate([jnp.ones_like(x[:, :1]), x], 1)
    images, taps = len(x), []
    for i in range(max(cfg.vit.taps)):

        def block(name, i=i):
            return p[f"vit/blocks/{i}/{name}/kernel"]

        with part(
            flops.TRAINED_VIT
            if i >= 2 and "vit/blocks/2/attn/q/kernel" in p["trained"]
            else flops.FROZEN_VIT
        ):
            q, k, v = (split(norm(x) @ block(f"attn/{c}"), images, cfg.vit.heads) for c in "qkv")
            x = x + (attend(q, k, v) @ block("attn/o")).reshape(x.shape)
            x = x + jnp.tanh(norm(x) @ block("mlp/fc1")) @ block("mlp/fc2")
        taps += [x] if i + 1 in cfg.vit.taps else []
    return taps


def cross_layer(cfg: EVLMConfig, p: dict, i: int, x, tap, chosen) -> jax.Array:
    """The part of `program` before its decoder layer `i`."""

    def cross(name):
        return p[f"xattn/{i}/{name}/kernel"]

    with part(flops.CROSS):
        q = norm(x) @ cross("q")
    with part(flops.KEYS):
        tap = norm(tap, p[f"xattn/{i}/kv_norm/scale"])
        k, v = tap @ cross("k"), tap @ cross("v")
    with part(flops.CROSS_SCORES):  # images = rows * I groups of neighbouring tokens
        images, x_heads, shared = len(tap), cfg.xattn.heads, cfg.xattn.heads // cfg.xattn.kv_heads
        q, k, v = (
            split(q, images, x_heads),
            *(split(y, images, cfg.xattn.kv_heads).repeat(shared, 2) for y in (k, v)),
        )
        out = attend(q, k, v)
    with part(flops.CROSS):
        x = x + out @ cross("o")
    if cfg.moe.copies:
        with part(flops.ROUTER):
            gates = jnp.take_along_axis(jax.nn.softmax(norm(x) @ cross("ffn/router")), chosen, 1)
        with part(flops.ROUTED):
            hidden = (
                jnp.tanh(jnp.einsum("td,tkdf->tkf", norm(x), cross("ffn/experts/fc1")[chosen]))
                * gates[..., None]
            )
            routed = jnp.einsum("tkf,tkfd->tkd", hidden, cross("ffn/experts/fc2")[chosen]).sum(1)
        with part(flops.WORLD):
            x = x + routed + jnp.tanh(norm(x) @ cross("ffn/world/fc1")) @ cross("ffn/world/fc2")
    else:
        with part(flops.FFN):
            inner = jnp.tanh(norm(x) @ cross("ffn/fc1"))
            inner = inner * (norm(x) @ cross("ffn/up")) if cfg.xattn.gated else inner
            x = x + inner @ cross("ffn/fc2")
    return x


def program(cfg: EVLMConfig, p: dict, pixels: jax.Array, chosen: jax.Array) -> jax.Array:
    """A number that depends on every product of the model: pixels [B * I, g * g, 3 * patch**2],
    chosen [B * T, k] experts.
    """
    t, d, n = ROWS * cfg.data.length, cfg.llm.hidden, cfg.llm.heads
    taps = taps_of(cfg, p, pixels)
    x = jnp.tile(p["media/embedding"].mean(0), (t, 1)) + jnp.sin(jnp.arange(t * d)).reshape(t, d)
    for i in range(2):
        x = cross_layer(cfg, p, i, x, taps[cfg.tap_of_cross_layer[i]], chosen)

        def layer(name, i=i):
            return p[f"llm/layers/{i}/{name}/kernel"]

        with part(flops.LLM):
            q, k, v = (norm(x) @ layer(f"attn/{c}") for c in "qkv")
        with part(flops.LLM_SCORES):
            q, k, v = (
                split(q, ROWS, n),
                *(
                    split(y, ROWS, cfg.llm.kv_heads).repeat(n // cfg.llm.kv_heads, 2)
                    for y in (k, v)
                ),
            )
            out = attend(q, k, v, jnp.where(jnp.tri(cfg.data.length, dtype=bool), 0, -1e9))
        with part(flops.LLM):
            x = x + out @ layer("attn/o")
            x = x + (
                jax.nn.silu(norm(x) @ layer("mlp/gate")) * (norm(x) @ layer("mlp/up"))
            ) @ layer("mlp/down")
    with part(flops.HEAD):
        return jax.nn.logsumexp(norm(x) @ p["llm/head/kernel"], -1).sum()


class Adapted:
    """What a row is multiplied by where a kernel has an adapter."""

    def __init__(self, *parts: jax.Array):
        self.parts = parts

    def __rmatmul__(self, x):
        kernel, a, b = self.parts
        return x @ kernel + (x @ a) @ b


def with_adapters(p: dict) -> dict:
    places = [name.removesuffix("/lora_a") for name in p if name.endswith("/lora_a")]
    parts = ("kernel", "lora_a", "lora_b")
    return p | {f"{at}/kernel": Adapted(*(p[f"{at}/{part}"] for part in parts)) for at in places}


def executed(cfg: EVLMConfig, trained: set[str]) -> Counter:
    """{part: FLOPs of products} of the program's value and gradient, dead code left out."""
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in parameter_shapes(cfg).items()
    }
    images, patches, chosen = (
        ROWS * cfg.data.images,
        cfg.vit.patches,
        (ROWS * cfg.data.length, cfg.moe.top_k),
    )
    pixels = jax.ShapeDtypeStruct((images, patches, 3 * cfg.vit.patch**2), jnp.float32)

    def step(train, frozen, pixels, chosen):
        return jax.value_and_grad(
            lambda p: program(cfg, with_adapters(frozen | p) | {"trained": trained}, pixels, chosen)
        )(train)

    frozen = {name: shape for name, shape in shapes.items() if name not in trained}
    train = {name: shapes[name] for name in trained}
    jaxpr = jax.make_jaxpr(step)(train, frozen, pixels, jax.ShapeDtypeStruct(chosen, jnp.int32))
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _products(jaxpr)


def _products(jaxpr: Jaxpr) -> Counter:
    count = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = (
                2
                * np.prod(eqn.outvars[0].aval.shape)
                * np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
            )
            (part,) = (part for part in flops.PARTS if part in str(eqn.source_info.name_stack))
            count[part] += int(size)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                count += _products(getattr(inner, "jaxpr", inner))
    return count


def trained_names(cfg: EVLMConfig, vit_from: int | None, norms: bool = False) -> set[str]:
    """Kernels and media embeddings; `norms`: those of the keys and values as well."""
    above = tuple(f"vit/blocks/{i}/" for i in range(vit_from if vit_from is not None else 4, 3))
    kernels = {
        name
        for name in parameter_shapes(cfg)
        if name.endswith("/kernel") and name.startswith(("xattn/", *above))
    }
    scales = {f"xattn/{layer}/kv_norm/scale" for layer in cfg.cross_layers}
    return kernels | {"media/embedding"} | (scales if norms else set())


@pytest.mark.parametrize("copies, kv_heads", [(0, 2), (0, 1), (2, 2)])
@pytest.mark.parametrize("vit_from", [None, 2])
def test_needed_is_what_an_unrolled_program_executes(copies, kv_heads, vit_from):
    cfg = config(moe={"copies": copies}, xattn={"kv_heads": kv_heads, "gated": kv_heads == 1})
    trained = trained_names(cfg, vit_from)
    work = flops.Work.full(cfg, ROWS)
    count = {part: cost.total for part, cost in flops.needed(cfg, trained, work).items()}
    t = cfg.data.length
    count[flops.LLM_SCORES] *= (
        2 * t / (t + 1)
    )  # the program multiplies all pairs, half of which are masked
    assert count == dict(executed(cfg, trained))
    assert (flops.TRAINED_VIT in count) == (vit_from is not None)


@pytest.mark.parametrize("alone", [False, True])
def test_needed_of_adapters_is_what_an_unrolled_program_executes(alone):
    """`alone`: nothing but adapters trains, and what lies below the lowest needs no gradient."""
    patterns = (
        "^llm/layers/.*/(attn/[qv]|mlp/down)/",
        "^xattn/.*/([qkvo]|fc2)/",
        "^vit/.*/attn/o/",
    )
    cfg = config(lora={"patterns": patterns, "rank": 3})
    trained = {name for name in parameter_shapes(cfg) if is_adapter(name)}
    trained = {name for name in trained if not name.startswith("vit/")}
    trained |= set() if alone else trained_names(cfg, None)
    count = flops.needed(cfg, trained, flops.Work.full(cfg, ROWS))
    count = {part: cost.total for part, cost in count.items()}
    count[flops.LLM_SCORES] *= 2 * cfg.data.length / (cfg.data.length + 1)
    assert count == dict(executed(cfg, trained))


def test_a_norm_in_front_of_a_trained_kernel_is_not_counted():
    """Its gradient follows from the kernel's; the plain program runs one product more for it."""
    cfg = config()
    keys = flops.needed(cfg, trained_names(cfg, None, norms=True), flops.Work.full(cfg, ROWS))[
        flops.KEYS
    ]
    assert (
        keys == flops.needed(cfg, trained_names(cfg, None), flops.Work.full(cfg, ROWS))[flops.KEYS]
    )
    assert keys.inputs == 0
    assert (
        executed(cfg, trained_names(cfg, None, norms=True))[flops.KEYS] == keys.total + keys.forward
    )


def test_inference_is_forward_alone():
    cfg = config()
    costs = flops.needed(cfg, (), flops.Work.full(cfg, ROWS))
    assert all(cost.inputs == cost.weights == 0 < cost.forward for cost in costs.values())


def test_work_of_a_batch_leaves_padding_out():
    """Counted token by token: what it attends to is what `visible_until` lets it see of its own
    branch.
    """
    cfg = tiny_config(llm={"window": (0, 5)})
    batch = tiny_batch(cfg, seed=0, fill=0.6)
    q, k = np.arange(cfg.data.length)[:, None], np.arange(cfg.data.length)
    sees = (k <= q) & (q < batch.visible_until[:, None, :])
    near = batch.positions[:, :, None] - batch.positions[:, None, :] < 5
    real = flops.real_tokens(batch)
    visible = [range(a, b) for a, b in zip(batch.visible_start.ravel(), batch.visible_stop.ravel())]
    slots = {
        (row, i)
        for row in range(len(batch.tokens))
        for t in range(cfg.data.length)
        for i in visible[row * cfg.data.length + t]
    }
    want = flops.Work(
        real.sum(),
        sees.sum(-1)[real].sum(),
        len(slots),
        len(slots),
        sum(map(len, visible)),
        (batch.targets >= 0).sum(),
        {5: (sees & near)[real].sum()},
    )
    assert flops.Work.of(cfg, batch) == want
    assert flops.Work.of(cfg, batch._replace(pixels=None)) == want._replace(encoded=0)


def bridge_program(cfg: EVLMConfig, p: dict, tap: list[jax.Array]) -> jax.Array:
    """A number that depends on every product of a bridge: `tap` [images, S, V] of each."""
    b, v = cfg.bridge, cfg.vit.width
    with jax.named_scope(flops.BRIDGE):
        if b.kind in ("fused", "joined"):
            kernels = jnp.split(p["bridge/proj/kernel"], len(tap))
            return jnp.sin(sum(norm(x) @ kernel for x, kernel in zip(tap, kernels))).sum()
        patches = tap[-1][:, cfg.vit.prefix_tokens :]
        if b.kind == "llava":
            return jnp.sin(
                jnp.tanh(patches @ p["bridge/fc1/kernel"]) @ p["bridge/fc2/kernel"]
            ).sum()
        seen = tap[-1] if b.prefix else patches
        x = jnp.tile(p["bridge/latents"], (len(seen), 1, 1))
        for i in range(b.depth):

            def kernel(name, i=i):
                return p[f"bridge/layers/{i}/{name}/kernel"]

            def split(y):
                return y.reshape(*y.shape[:2], b.heads, b.head_dim)

            q = split(norm(x) @ kernel("q"))
            k, v = (
                split(jnp.concatenate([norm(seen) @ kernel(c), norm(x) @ kernel(c)], 1))
                for c in "kv"
            )
            out = jnp.einsum(
                "bnts,bsnh->btnh", jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k)), v
            )
            x = x + out.reshape(*x.shape[:2], -1) @ kernel("o")
            x = x + jnp.tanh(norm(x) @ kernel("ffn/fc1")) @ kernel("ffn/fc2")
        return jnp.sin(x).sum()


@pytest.mark.parametrize("reached", [False, True])
@pytest.mark.parametrize("kind", ["fused", "joined", "open_flamingo", "llava"])
def test_needed_of_a_bridge_is_what_a_program_executes(kind, reached):
    """`reached`: the ViT trains from behind the first tap on, so of two taps the second needs a
    gradient.
    """
    cfg = config(**BASELINES.get(kind, {"bridge": {"kind": kind}}))
    trained = {
        name
        for name in parameter_shapes(cfg)
        if name.startswith(("bridge/", "vit/blocks/2/" if reached else "bridge/"))
    }
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in parameter_shapes(cfg).items()
        if name.startswith("bridge/")
    }
    tap = jax.ShapeDtypeStruct((ROWS * cfg.data.images, cfg.vit.tokens, cfg.vit.width), jnp.float32)

    def step(train):
        fixed = jnp.ones(tap.shape)
        return jax.value_and_grad(
            lambda p, moved: bridge_program(cfg, p, [fixed, *(moved or [fixed])]), argnums=(0, 1)
        )(*train)

    jaxpr = jax.make_jaxpr(step)((shapes, [tap] if reached else []))
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    costs = flops.needed(cfg, trained, flops.Work.full(cfg, ROWS))
    assert costs[flops.BRIDGE].total == _products(jaxpr)[flops.BRIDGE]
    # what is in the text, or what the first block looks at, is trained
    behind = (cfg.llm.layers - cfg.xattn.first) / cfg.llm.layers
    assert costs[flops.LLM].inputs == behind * costs[flops.LLM].forward


def test_a_model_that_sees_nothing_needs_no_vision():
    costs = flops.needed(
        config(**BASELINES["text only"]), {"media/embedding"}, flops.Work.full(config(), ROWS)
    )
    assert costs.keys() == {flops.LLM, flops.LLM_SCORES, flops.HEAD}
