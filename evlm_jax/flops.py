"""Floating-point operations that a step needs, counted from the config (2 per multiply-add).
Letters: see config/__init__.py.

Needed, not executed: 2ND forward, +2ND where a gradient passes to the input of a product, +2ND only
where its weights train. So a frozen ViT costs 2ND, a frozen LLM under trained cross-attention 4ND,
trained layers 6ND, a frozen matrix beside a trained adapter 4ND and
the adapter 6ND, and below the lowest trained block of the ViT there is no backward. Causal
attention counts half, cross-attention the images that a token sees, the head supervised positions
only; padding counts nothing, and neither does rematerialisation.

Not counted as needed: the product that would give a norm in front of a trained kernel its gradient,
where nothing else lies below, because that follows from the kernel's gradient. So keys and values
of a frozen tower's images cost 4ND (a program that asks for the norm's gradient the plain way
executes 6ND). What is not a product (norms, softmax, optimizer) is left out."""

import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Self

import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig, LLMConfig, LoRAConfig
from evlm_jax.config.xattn import gate_products

FROZEN_VIT, TRAINED_VIT = "vision tower, frozen", "vision tower, trained"
BRIDGE = "bridge of a baseline"
KEYS, CROSS, CROSS_SCORES = (
    "keys and values of images",
    "cross-attention projections",
    "cross-attention scores",
)
FFN, ROUTER, ROUTED, WORLD = "cross-attention FFN", "router", "routed experts", "world expert"
LLM, LLM_SCORES, HEAD = "language model, linear", "language model, scores", "head"
PARTS = (
    FROZEN_VIT,
    TRAINED_VIT,
    BRIDGE,
    KEYS,
    CROSS,
    CROSS_SCORES,
    FFN,
    ROUTER,
    ROUTED,
    WORLD,
    LLM,
    LLM_SCORES,
    HEAD,
)


class Work(NamedTuple):
    """What a step processes, summed over its rows."""

    tokens: float  # text positions that are not padding
    attended: float  # (query, key) pairs of self-attention
    images: float  # images whose keys and values are projected
    encoded: float  # images that go through the ViT
    visible: float  # (token, image) pairs of cross-attention
    targets: float  # positions that the head sees
    near: Mapping[int, float] = MappingProxyType({})  # as `attended`, in layers with each window

    @classmethod
    def of(cls, cfg: EVLMConfig, batch: Batch) -> Self:
        """The work of a batch of NumPy arrays, without padding."""
        real, images = real_tokens(batch), seen_images(batch)
        return cls(
            tokens=real.sum(),
            attended=(batch.positions + 1)[real].sum(),
            images=images,
            encoded=0 if batch.pixels is None else images,
            visible=(batch.visible_stop - batch.visible_start).sum(),
            targets=(batch.targets >= 0).sum(),
            near=near_pairs(cfg.llm, batch.positions[real]),
        )

    @classmethod
    def full(cls, cfg: EVLMConfig, rows: int) -> Self:
        """The work of `rows` rows without padding: each one document of T tokens, all I images of a
        group seen, one image a token, or all of its row up to there, M targets.
        """
        t, images = cfg.data.length, rows // cfg.data.image_group * cfg.data.slots
        encoded = 0 if cfg.data.cache_features else images
        near = near_pairs(cfg.llm, np.arange(t))
        sight = 1 if cfg.media.sight != "all" else (images / rows + 1) / 2
        return cls(
            rows * t,
            rows * t * (t + 1) / 2,
            images,
            encoded,
            rows * t * sight,
            rows * cfg.data.targets,
            {window: rows * pairs for window, pairs in near.items()},
        )

    @classmethod
    def video(cls, cfg: EVLMConfig, rows: int) -> Self:
        """As `full`, but a row is one video of I frames followed by text, which sees them all;
        media tokens see their own frame.
        """
        media = cfg.data.images * cfg.media.tokens
        return cls.full(cfg, rows)._replace(
            visible=rows * (media + (cfg.data.length - media) * cfg.data.images)
        )


class Cost(NamedTuple):
    """FLOPs of a part."""

    forward: float = 0.0
    inputs: float = 0.0  # gradients of activations
    weights: float = 0.0  # gradients of kernels

    @property
    def total(self) -> float:
        """FLOPs of forward and backward."""
        return sum(self)


class Product(NamedTuple):
    """A product of a layer, or the two of an attention's scores."""

    part: str
    # canonical name of its parameters without the last piece; "" where both operands are
    # activations
    name: str
    rows: float
    shape: tuple[float, float]  # of the matrix that a row is multiplied by

    @property
    def flops(self) -> float:
        """Of the forward product."""
        return 2.0 * self.rows * self.shape[0] * self.shape[1]

    def adapters(self, lora: LoRAConfig) -> tuple["Product", ...]:
        """The two products of its adapter, the second behind the first; () where it has none."""
        if not any(re.search(pattern, f"{self.name}/kernel") for pattern in lora.patterns):
            return ()
        before, behind = self.shape
        return (
            Product(self.part, f"{self.name}/lora_a", self.rows, (before, lora.rank)),
            Product(self.part, f"{self.name}/lora_b", self.rows, (lora.rank, behind)),
        )


Stage = tuple[Product, ...]  # products that stand side by side


def near_pairs(llm: LLMConfig, positions: np.ndarray) -> dict[int, float]:
    """{window: (query, key) pairs} of queries at `positions` of their documents, for every window
    that layers have.
    """
    windows = filter(None, llm.layers_of_window)
    return {window: float(np.minimum(positions + 1, window).sum()) for window in windows}


def visible_scores(cfg: EVLMConfig, work: Work) -> dict[str, float]:
    """{part: (query, key) pairs of all layers that see one another}, of one pass; of the language
    model and of its cross-attention.
    """
    windows = cfg.llm.layer_windows
    own = sum(work.near[w] if w and work.attended else work.attended for w in windows)
    cross = work.visible * cfg.view_tokens * len(cfg.cross_layers)
    return {LLM_SCORES: float(own), CROSS_SCORES: float(cross)}


def real_tokens(batch: Batch) -> np.ndarray:
    """bool [B, T]: positions that are not padding."""
    return (batch.positions > 0) | (batch.visible_until > np.arange(batch.tokens.shape[1]) + 1)


def seen_images(batch: Batch) -> int:
    """Image slots that some token sees."""
    rows, length = batch.tokens.shape
    edges, row = (
        np.zeros((rows, batch.visible_stop.max(initial=0) + 1), np.int64),
        np.arange(rows).repeat(length),
    )
    np.add.at(edges, (row, batch.visible_start.ravel()), 1)
    np.add.at(edges, (row, batch.visible_stop.ravel()), -1)
    return int((edges.cumsum(1) > 0).sum())


def needed(cfg: EVLMConfig, trained: Collection[str], work: Work) -> dict[str, Cost]:
    """{part: its cost}, in the order of PARTS, without parts that the model lacks.

    Args:
      trained: canonical names of the parameters that train; none of them is inference.
    """
    kernels = {name.removesuffix("/kernel") for name in trained}
    costs = {part: np.zeros(3) for part in PARTS}

    def count(product: Product, passes: bool) -> bool:
        """Adds a product, and its adapter's, to which a gradient's way down leads only if `passes`;
        whether any gradient reaches their output.
        """
        inner = passes
        for adapter in product.adapters(cfg.lora):
            inner = add(adapter, inner)
        return add(product, passes) or inner

    def add(product: Product, passes: bool) -> bool:
        trains = product.name in kernels
        part = TRAINED_VIT if product.part == FROZEN_VIT and (passes or trains) else product.part
        costs[part] += np.array([1, (1 if product.name else 2) * passes, trains]) * product.flops
        return passes or trains

    reached = []  # for each tap, whether its gradient is needed
    passes = any(
        name.startswith(("vit/cls", "vit/registers", "vit/pos", "vit/tiles")) for name in trained
    )
    for number, stage in enumerate(_vision(cfg, work) if cfg.uses_images else ()):
        passes = any([count(product, passes) for product in stage])
        reached += [passes] if number in [STAGES * block for block in cfg.vit.taps] else []
    if cfg.bridge.kind != "routed":
        passes = "bridge/latents" in trained
        for stage in _bridge(cfg, work):
            passes = any(
                [count(product, passes if tap is None else reached[tap]) for product, tap in stage]
            )
        reached = [passes]
    passes = (
        any(name.startswith(("media/", "llm/embed")) for name in trained)
        or cfg.bridge.kind == "llava"
        and passes
    )
    for stage in _text(cfg, work):

        def below(product, passes=passes):
            return reached[_tap(cfg, product.name)] if product.part == KEYS else passes

        passes = any([count(product, below(product)) for product in stage])
    return {part: Cost(*map(float, cost)) for part, cost in costs.items() if cost.any()}


def train_flops(cfg: EVLMConfig, trained: Collection[str], batch: Batch) -> float:
    """FLOPs needed by forward and backward of a batch of NumPy arrays."""
    return sum(cost.total for cost in needed(cfg, trained, Work.of(cfg, batch)).values())


def lowest_trained_block(cfg: EVLMConfig, trained: Collection[str]) -> int:
    """0-based number of the ViT block below which there is no backward; the number of blocks where
    the tower is frozen.
    """
    if any(name.startswith("vit/") and not name.startswith("vit/blocks/") for name in trained):
        return 0
    return min(
        (int(name.split("/")[2]) for name in trained if name.startswith("vit/blocks/")),
        default=cfg.vit.depth,
    )


STAGES = 5  # of a block of the ViT


def _vision(cfg: EVLMConfig, work: Work) -> Iterator[Stage]:
    """From the pixels to the highest tap: the patches, then STAGES of each block."""
    vit, tokens = cfg.vit, work.encoded * cfg.vit.sequence

    def one(name, shape, rows=tokens):
        return Product(FROZEN_VIT, name, rows, shape)

    yield (one("vit/patch", (vit.patch**2 * 3, vit.width), work.encoded * vit.patches),)
    for block in range(max(vit.taps)):
        name = f"vit/blocks/{block}"
        yield tuple(one(f"{name}/attn/{p}", (vit.width, vit.width)) for p in "qkv")
        yield (one("", (2 * vit.sequence, vit.width)),)
        yield (one(f"{name}/attn/o", (vit.width, vit.width)),)
        into = ("fc1", "up") if vit.gated else ("fc1",)
        yield tuple(one(f"{name}/mlp/{matrix}", (vit.width, vit.mlp)) for matrix in into)
        yield (one(f"{name}/mlp/fc2", (vit.mlp, vit.width)),)


def _bridge(cfg: EVLMConfig, work: Work) -> Iterator[tuple[tuple[Product, int | None], ...]]:
    """From the taps to what the language model sees: products, and the tap that one reads; None
    where it reads the stage before.
    """
    vit, b, v = cfg.vit, cfg.bridge, cfg.vit.width

    def one(name, shape, tokens, tap=None):
        return Product(BRIDGE, name and f"bridge/{name}", work.images * tokens, shape), tap

    if b.kind in ("fused", "joined"):
        shape = v, cfg.view_width
        yield tuple(one("proj", shape, vit.tokens, tap) for tap in range(len(vit.taps)))
    elif b.kind == "linear":
        yield (one("proj", (v, cfg.llm.hidden), vit.tokens, -1),)
    elif b.kind == "llava":
        yield (one("fc1", (v, cfg.llm.hidden), vit.patches, -1),)
        yield (one("fc2", (cfg.llm.hidden, cfg.llm.hidden), vit.patches),)
    else:
        inner, seen = b.heads * b.head_dim, vit.tokens if b.prefix else vit.patches
        for name in (f"layers/{i}" for i in range(b.depth)):
            pictures = (one(f"{name}/{p}", (v, inner), seen, -1) for p in "kv")
            yield (*pictures, *(one(f"{name}/{p}", (v, inner), b.latents) for p in "qkv"))
            yield (one("", (2 * inner, seen + b.latents), b.latents),)
            yield (one(f"{name}/o", (inner, v), b.latents),)
            yield (one(f"{name}/ffn/fc1", (v, v * b.ffn), b.latents),)
            yield (one(f"{name}/ffn/fc2", (v * b.ffn, v), b.latents),)


def _text(cfg: EVLMConfig, work: Work) -> Iterator[Stage]:
    """From the embeddings to the logits."""
    llm, d = cfg.llm, cfg.llm.hidden

    def one(part, name, shape, rows=work.tokens):
        return Product(part, name, rows, shape)

    for layer, window in enumerate(llm.layer_windows):
        crossed = layer in cfg.cross_layers
        read, scores, gate = _images(cfg, work, layer) if crossed else ((), (), ())
        if crossed and cfg.xattn.placement == "before":
            yield from ((*read, *gate), scores, *_behind(cfg, work, layer))
            read, scores, gate = (), (), ()
        name = f"llm/layers/{layer}"
        sizes = {"q": llm.heads, "k": llm.kv_heads, "v": llm.kv_heads}
        own = (one(LLM, f"{name}/attn/{p}", (d, n * llm.head_dim)) for p, n in sizes.items())
        yield (*own, *read)
        pairs = work.near[window] if window and work.attended else work.attended
        yield one(LLM_SCORES, "", (2 * llm.heads, llm.head_dim), pairs), *scores
        if gate:
            yield gate
        yield (one(LLM, f"{name}/attn/o", (llm.heads * llm.head_dim, d)),)
        yield tuple(one(LLM, f"{name}/mlp/{p}", (d, llm.mlp)) for p in ("gate", "up"))
        yield (one(LLM, f"{name}/mlp/down", (llm.mlp, d)),)
    yield (one(HEAD, "llm/embed" if llm.tied else "llm/head", (d, llm.vocab), work.targets),)


def _images(cfg: EVLMConfig, work: Work, layer: int) -> tuple[Stage, Stage, Stage]:
    """Cross-attention of an LLM layer: queries, keys and values; scores; its gate."""
    x, s, name = cfg.xattn, cfg.view_tokens, f"xattn/{layer}"
    width, shared = x.heads * x.head_dim, x.kv_heads * x.head_dim
    queries = Product(CROSS, f"{name}/q", work.tokens, (cfg.llm.hidden, width))
    keys = (
        Product(KEYS, f"{name}/{leaf}", work.images * s, (cfg.view_width, shared)) for leaf in "kv"
    )
    scores = Product(CROSS_SCORES, "", work.visible, (2 * width, s))
    gate = tuple(
        Product(CROSS, f"{name}/attn_gate/{matrix}", work.tokens * times, shape)
        for matrix, (times, shape) in gate_products(cfg).items()
    )
    return (*[queries] * (x.query == "own"), *keys), (scores,), gate


def _behind(cfg: EVLMConfig, work: Work, layer: int) -> Iterator[Stage]:
    """What a cross-attention block in front of an LLM layer has besides `_images`."""
    x, moe, d, name = cfg.xattn, cfg.moe, cfg.llm.hidden, f"xattn/{layer}"

    def one(part, leaf, shape):
        return Product(part, f"{name}/{leaf}", work.tokens, shape)

    yield (one(CROSS, "o", (x.heads * x.head_dim, d)),)
    if not moe.copies:
        yield tuple(one(FFN, f"ffn/{fc}", (d, x.ffn)) for fc in ("fc1", "up")[: 1 + x.gated])
        yield (one(FFN, "ffn/fc2", (x.ffn, d)),)
        return
    routed = x.ffn // moe.slices * moe.top_k
    yield (
        one(ROUTER, "ffn/router", (d, moe.experts)),
        one(ROUTED, "ffn/experts/fc1", (d, routed)),
        one(WORLD, "ffn/world/fc1", (d, x.ffn)),
    )
    yield one(ROUTED, "ffn/experts/fc2", (routed, d)), one(WORLD, "ffn/world/fc2", (x.ffn, d))


def _tap(cfg: EVLMConfig, name: str) -> int:
    """Number of the tap that the cross-attention parameter `name` reads."""
    return cfg.tap_of_cross_layer[int(name.split("/")[1]) // cfg.xattn.every]
