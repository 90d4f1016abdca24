"""EVLM: ViT taps, gated cross-attention before the layers of a language model, learnable media tokens. Composition only.

Its baselines are the same model with something between taps and layers (bridge.py), or without cross-attention.

Unusual: the language model and the cross-attention run as ONE scan over layers; all taps are stacked and each step of the
scan picks its own by number, so `blocked`, `cyclic` and any other schedule are the same program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.flops import real_tokens
from evlm_jax.models import bridge, moe, xattn
from evlm_jax.models.attention import attention, text_mask
from evlm_jax.models.layers import REMAT, param, rope_tables, stack
from evlm_jax.models.llm import LLM
from evlm_jax.models.vit import ViT
from evlm_jax.ops.grouped_attention import Plan, grouped_attention
from evlm_jax.ops.product import product
from evlm_jax.sharding import local, shard

TEXT, TEXT_KEYS, IMAGE_KEYS = ("rows", None, "heads"), ("rows", None, "kv_heads"), ("rows", None, None, "kv_heads")


def reads() -> Callable:
    """`attention` of a device's rows and heads: q [B, T, N, H], k and v [B, C, K, H], mask [B, T, C]."""
    return local(attention, (TEXT, TEXT_KEYS, TEXT_KEYS, ("rows",)), TEXT)


def looks(cfg: EVLMConfig) -> Callable:
    """`grouped_attention` of a device's pools and heads: q [B, T, N, H], k and v [C, I, S', K, H], plan."""
    sight = functools.partial(grouped_attention, sinks=cfg.xattn.sinks)
    return local(sight, (TEXT, IMAGE_KEYS, IMAGE_KEYS, ("rows",)), TEXT)


class Media(nnx.Module):
    """What an image is in the text stream."""

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.embedding = param(rngs, (cfg.media.tokens, cfg.llm.hidden), ("whole", "whole"), std=0.02)


def _precisely(method: Callable) -> Callable:
    """The method under train.matmul_precision."""

    @functools.wraps(method)
    def call(self, *args):
        with jax.default_matmul_precision(self.cfg.train.matmul_precision):
            return method(self, *args)

    return call


class EVLM(nnx.Module):
    """The whole model. Parameters are float32 at initialisation; compute is in `cfg.train.dtype`."""

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.vit = ViT(cfg.vit, rngs, cfg.train.remat)
        self.llm = LLM(cfg.llm, rngs)
        self.xattn = stack(lambda r: xattn.Block(cfg, r), len(cfg.cross_layers), rngs) if cfg.cross_layers else None
        self.media = Media(cfg, rngs) if cfg.bridge.kind != "llava" else None  # there patches stand in their place
        self.bridge = bridge.make(cfg, rngs)
        self.cfg = cfg

    @property
    def dtype(self) -> jnp.dtype:
        """Of all activations."""
        return jnp.dtype(self.cfg.train.dtype)

    @_precisely
    def encode(self, pixels: jax.Array) -> jax.Array:
        """uint8 [..., h, w, 3] -> taps [..., G, S, V]."""
        mean, std = jnp.array(self.cfg.vit.mean), jnp.array(self.cfg.vit.std)
        x = ((pixels / 255.0 - mean) / std).astype(self.dtype)
        taps = self.vit(x.reshape(-1, *x.shape[-3:]))
        return taps.reshape(*pixels.shape[:-3], *taps.shape[1:])

    def embed(self, tokens: jax.Array, media_slot: jax.Array, patches: jax.Array | None = None) -> jax.Array:
        """Word embeddings, and at media positions the learnable rows, or `patches` [B, T, D] where given: [B, T] -> [B, T, D]."""
        media = self.media.embedding[...][jnp.maximum(media_slot, 0)] if patches is None else patches
        return jnp.where(media_slot[..., None] >= 0, media.astype(self.dtype), self.llm.words(tokens).astype(self.dtype))

    def hidden(self, batch: Batch) -> jax.Array:
        """[B, T, D] after the final norm."""
        return self.routed(batch)[0]

    def routed(self, batch: Batch) -> tuple[jax.Array, moe.Routing | None]:
        """`hidden`, and what the routing of each block tells, stacked; None where the FFNs are dense."""
        hidden, _, routing = self.observed(batch, self.views(batch), lambda block, view, x: None)
        return hidden, routing

    def taps(self, batch: Batch) -> jax.Array:
        """[G, C, I, S, V], from pixels or as they are given."""
        taps = self.encode(batch.pixels) if batch.taps is None else batch.taps.astype(self.dtype)
        return shard(jnp.moveaxis(shard(taps, "rows", "images"), 2, 0), None, "rows", "images")

    def views(self, batch: Batch) -> jax.Array | None:
        """What the language model sees of images, [G', C, I, S', V or D] as bridge.py has it; None where it sees nothing."""
        return self.bridged(self.taps(batch)) if self.cfg.sees else None

    @_precisely
    def bridged(self, taps: jax.Array) -> jax.Array:
        """[G, C, I, S, V] -> `views`."""
        if self.bridge is None:
            return taps
        with jax.named_scope("bridge"):
            return shard(self.bridge(taps), None, "rows", "images")

    @_precisely
    def observed(self, batch: Batch, views: jax.Array | None, observe: Callable) -> tuple[jax.Array, Any, moe.Routing | None]:
        """`hidden`; what `observe(block, its view [C, I, S', V], its input x [B, T, D])` returns for each block, stacked; `routed`'s rest.

        Both are None where there is no block.
        """
        patches = None
        if self.cfg.bridge.kind == "llava":
            patches = local(bridge.write, ((None, "rows"), ("rows",), ("rows",)), ("rows",))(views, batch.visible_start, batch.media_slot)
        x = self.embed(batch.tokens, batch.media_slot, patches)
        rope = rope_tables(batch.positions, self.cfg.llm.head_dim, self.cfg.llm.rope_theta)
        mask = text_mask(batch.seen_until)
        kind = jnp.where(batch.media_slot >= 0, moe.MEDIA, jnp.where(real_tokens(batch), moe.TEXT, moe.PADDING))

        attend = reads()

        def decoder(x, block):
            return shard(block(x, rope, lambda q, k, v: attend(q, k, v, mask)), "rows"), None

        if not self.cfg.cross_layers:
            x, _ = jax.lax.scan(REMAT[self.cfg.train.remat](decoder), x, self.llm.layers)
            return self.llm.ln_f(x), None, None

        plan = Plan(batch.tile_tokens, batch.token_tile, batch.pair_tile, batch.pair_image)
        look = looks(self.cfg)

        def group(decoder, x, inputs):
            """One cross-attention block and the decoder layers behind it."""
            cross, tap, blocks = inputs
            seen = observe(cross, views[tap], x)
            k, v = (shard(a, "rows", "images", None, "image_heads") for a in cross.keys_values(views[tap]))
            x, routing = cross.routed(x, lambda q: look(q, k, v, plan), kind)
            return jax.lax.scan(decoder, x, blocks)[0], (seen, routing)

        x, (seen, routing) = self._run(group, x, decoder)
        return self.llm.ln_f(x), seen, routing

    def _run(self, group, x: jax.Array, decoder) -> tuple[jax.Array, Any]:
        """Scan `group` over all cross-attention blocks, each with the `every` layers behind it; where `every` does not divide the layers,
        the last one has fewer. Then layers are read by number, where they lie: a part of their stack would be a copy of it."""
        every, layers, tap = self.cfg.xattn.every, self.cfg.llm.layers, jnp.array(self.cfg.tap_of_cross_layer)
        blocks = jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), self.llm.layers) if layers % every == 0 else None

        def numbered(x, number):
            pick = lambda a: checkpoint_name(jax.lax.dynamic_index_in_dim(a, number, keepdims=False), "weight")
            there = lambda x: decoder(x, jax.tree.map(pick, self.llm.layers))[0]
            return jax.lax.cond(number < layers, there, lambda x: x, x), None

        run, blocks = (decoder, blocks) if blocks is not None else (numbered, jnp.arange(len(tap) * every).reshape(-1, every))
        return jax.lax.scan(REMAT[self.cfg.train.remat](functools.partial(group, run)), x, (self.xattn, tap, blocks))

    def readout(self) -> Callable[[jax.Array], jax.Array]:
        """A function [..., D] -> float32 [..., vocab]. On a mesh the head is gathered once, for all its calls."""
        spec, head = self.llm.head_matrix(self.cfg.train.operands)

        def logits(hidden: jax.Array) -> jax.Array:
            with jax.default_matmul_precision(self.cfg.train.matmul_precision), jax.named_scope("head"):
                return product(spec, hidden, head)

        return logits

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., vocab]."""
        return self.readout()(hidden)
