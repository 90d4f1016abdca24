"""A ViT that returns the outputs of chosen blocks and computes nothing above the highest of them.

Families are the same code by choices, those of ViTConfig: which norms and where, which biases, the
activation, positions. Blocks live in a list of stacks cut at the taps and at the freeze boundaries,
one scan each, so that a tap is the carry between two scans and a frozen stack costs no backward
pass. No final norm: taps are raw residual streams."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.config import ViTConfig
from evlm_jax.models.attention import attention
from evlm_jax.models.gate import Gate
from evlm_jax.models.layers import (
    MLP,
    REMAT,
    Fill,
    LayerNorm,
    Linear,
    RMSNorm,
    heads,
    param,
    stack,
)
from evlm_jax.models.rotary import Rope, rotate
from evlm_jax.models.tiles import Tiles
from evlm_jax.ops.fused_attention import fused_attention
from evlm_jax.ops.grouped_attention import attention_form
from evlm_jax.ops.matmul import operand_dtype, product
from evlm_jax.ops.platform import LANES
from evlm_jax.parallel.sharding import gathered_weight, shard, shard_map_local


def patch_rope(cfg: ViTConfig) -> Rope:
    """cos and sin [1, S, 1, H/2] of the patches' centres, which lie in -1..1 down and across: as
    DINOv3 has it, each takes half of a head's frequencies. Class token and registers do not turn.
    """
    width = cfg.width // cfg.heads
    centres = [(2 * np.arange(count) + 1) / count - 1 for count in cfg.grid]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 2, 1)
    angle = 2 * math.pi * places / cfg.rotary ** np.arange(0, 1, 4 / width)
    angle = np.pad(angle.reshape(len(places), -1), ((cfg.prefix_tokens, 0), (0, 0)))
    angle = jnp.asarray(angle, jnp.float32)[None, :, None]
    return Rope(jnp.cos(angle), jnp.sin(angle))


def make_norm(cfg: ViTConfig, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    """A norm of the residual stream."""
    return {"layer": LayerNorm, "rms": RMSNorm}[cfg.norm_kind](cfg.width, cfg.eps, rngs)


def image_attention_op(form: str, mask: jax.Array | None, fill: Fill | None) -> Callable:
    """Attention of q, k and v [B, S, N, H] of a device's pictures by a form of attention_form,
    "xla" where there is a mask [B or 1, S, S]. `fill`: of the heads, which "pallas" alone takes.
    """
    if form == "xla":
        return partial(attention, mask=mask)
    axes, attend = ("pictures", None, "vision_heads"), fused_attention
    if form == "pallas":
        from evlm_jax.ops.image_attention import image_attention  # Pallas is slow to import

        attend = partial(image_attention, width=fill.width if fill else 0)
    return shard_map_local(attend, (axes,) * 3, axes)


class SelfAttention(nnx.Module):
    """Bidirectional attention within one image."""

    def __init__(self, cfg: ViTConfig, rngs: nnx.Rngs):
        square, axes = (cfg.width, cfg.width), ("vision", "vision_heads")
        self.q = Linear(square, axes, rngs, bias=cfg.bias in ("all", "qv"))
        self.k = Linear(square, axes, rngs, bias=cfg.bias == "all")
        self.v = Linear(square, axes, rngs, bias=cfg.bias in ("all", "qv"))
        self.o = Linear(square, axes[::-1], rngs, bias=cfg.bias not in ("mlp", "none"))
        self.q_norm, self.k_norm = (
            RMSNorm(cfg.width, cfg.eps, rngs) if cfg.qk_norm == "all" else None for _ in "qk"
        )
        self.head_dim, self.cfg = cfg.width // cfg.heads, cfg

    @property
    def fill(self) -> Fill | None:
        """How the projections fill heads up for kernels; None where they do not: they are not
        plain, heads are turned or normalised, or a quarter of the lanes and more would be zeros.
        """
        lanes = -(-self.head_dim // LANES) * LANES
        plain = all(linear.plain for linear in (self.q, self.k, self.v, self.o))
        own = self.q_norm is None and not self.cfg.rotary and plain
        return Fill(self.head_dim, lanes) if own and 1 < lanes / self.head_dim < 4 / 3 else None

    def __call__(
        self, x: jax.Array, attend: Callable = attention, fill: Fill | None = None
    ) -> jax.Array:
        """x [B, S, V] -> x; `attend` as `image_attention_op` makes it of `fill`."""
        q, k, v = (linear(x, written=fill) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads(a, fill.lanes if fill else self.head_dim) for a in (q, k, v))
        if self.cfg.rotary:
            q, k = (rotate(a, patch_rope(self.cfg)) for a in (q, k))
        return self.o(attend(q, k, v).reshape(*x.shape[:-1], -1), read=fill)


class Block(nnx.Module):
    """One transformer block; `norm` and `layer_scale` choose its form, `gated` says whether what
    it adds passes gates.
    """

    def __init__(self, cfg: ViTConfig, rngs: nnx.Rngs, gated: bool = False):
        self.norm1 = make_norm(cfg, rngs)
        self.attn = SelfAttention(cfg, rngs)
        self.norm2 = make_norm(cfg, rngs)
        axes = ("whole", "vision_mlp")
        bias = cfg.bias != "none"
        self.mlp = MLP(cfg.width, cfg.mlp, cfg.activation, bias, rngs, axes, cfg.gated)
        self.scale1 = param(rngs, (cfg.width,), ("norm",), value=1.0) if cfg.layer_scale else None
        self.scale2 = param(rngs, (cfg.width,), ("norm",), value=1.0) if cfg.layer_scale else None
        self.attn_gate, self.ffn_gate = (Gate(rngs) if gated else None for _ in range(2))
        self.pre = cfg.norm == "pre"

    def __call__(
        self, x: jax.Array, attend: Callable = attention, fill: Fill | None = None
    ) -> jax.Array:
        """x [B, S, V] -> x; `attend` and `fill` as of SelfAttention."""
        attn = partial(self.attn, attend=attend, fill=fill)
        for norm, f, scale, gate in (
            (self.norm1, attn, self.scale1, self.attn_gate),
            (self.norm2, self.mlp, self.scale2, self.ffn_gate),
        ):
            y = f(norm(x)) if self.pre else norm(f(x))
            y = y if scale is None else y * scale[...].astype(y.dtype)
            x = x + (y if gate is None else gate(y) * y)
        return x


class Patch(nnx.Module):
    """The patch convolution as a product: its stride is its size. Kernel [patch, patch, 3, V]."""

    def __init__(self, cfg: ViTConfig, rngs: nnx.Rngs):
        p, v = cfg.patch, cfg.width
        self.kernel = param(
            rngs, (p, p, 3, v), ("whole", "whole", "whole", "vision"), std=(3 * p * p) ** -0.5
        )
        self.bias = param(rngs, (v,), ("vision",)) if cfg.patch_bias else None

    @jax.named_scope("patch")
    def __call__(self, patches: jax.Array) -> jax.Array:
        kernel = gathered_weight(self.kernel, operand_dtype(patches)).reshape(patches.shape[-1], -1)
        x = product("...p,pv->...v", patches, kernel).astype(patches.dtype)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


def cut_into_patches(pixels: jax.Array, cfg: ViTConfig) -> jax.Array:
    """Pictures [B, h, w, 3] as patches in row-major order, [B, P, patch * patch * 3]; of tiles
    [B, tiles, P, ..], zeros where a picture has none.
    """
    b, p, (down, across), (rows, columns) = len(pixels), cfg.patch, cfg.laid, cfg.table_grid
    patches = (
        pixels.reshape(b, down, rows, p, across, columns, p, 3)
        .transpose(0, 1, 4, 2, 5, 3, 6, 7)
        .reshape(b, down * across, rows * columns, p * p * 3)
    )
    if not cfg.tiles:
        return patches[:, 0]
    return jnp.pad(patches, ((0, 0), (0, cfg.tiles - down * across), (0, 0), (0, 0)))


def stack_bounds(cfg: ViTConfig) -> list[tuple[int, int]]:
    """0-based [first, last) block ranges of the stacks, up to the highest tap."""
    top = max(cfg.taps)
    stops = {*cfg.taps, *(c for c in cfg.cuts if c < top)}
    stops = sorted(stops | {cfg.depth - cfg.global_blocks} if cfg.global_blocks else stops)
    return list(zip([0, *stops[:-1]], stops, strict=True))


class ViT(nnx.Module):
    """pixels [B, h, w, 3], normalised -> taps [B, G, S, V]."""

    def __init__(self, cfg: ViTConfig, rngs: nnx.Rngs, remat: str = "none", form: str = "xla"):
        v = cfg.width
        self.cls = param(rngs, (v,), ("norm",), std=0.02) if cfg.class_token else None
        self.registers = (
            param(rngs, (cfg.registers, v), ("whole", "norm"), std=0.02) if cfg.registers else None
        )
        table = (math.prod(cfg.table_grid) + cfg.class_token, v)
        self.pos = None if cfg.rotary else param(rngs, table, ("whole", "norm"), std=0.02)
        self.patch = Patch(cfg, rngs)
        self.patch_norm = make_norm(cfg, rngs) if cfg.patch_norm else None
        self.embed_norm = make_norm(cfg, rngs) if cfg.embed_norm else None
        self.tiles = Tiles(cfg, table[0], make_norm(cfg, rngs), rngs) if cfg.tiles else None
        self.first_global = cfg.depth - cfg.global_blocks
        self.stacks = nnx.List(
            [
                stack(partial(Block, cfg, gated=start >= self.first_global), stop - start, rngs)
                for start, stop in stack_bounds(cfg)
            ]
        )
        self.cfg, self.remat, self.form = cfg, remat, form

    def __call__(self, pixels: jax.Array, grids: jax.Array | None = None) -> jax.Array:
        """pixels [B, h, w, 3], normalised -> taps [B, G, S, V]; `grids` [B] numbers the grid of
        each picture, None: they have that of the config.
        """
        x, taps = shard(self.embed(shard(pixels, "pictures"), grids), "pictures"), []
        mask = None if self.tiles is None else self.tiles.mask(grids)
        form = attention_form(self.form, x.dtype) if mask is None else "xla"
        for (start, stop), blocks in zip(stack_bounds(self.cfg), self.stacks, strict=True):
            x = self.tiles.between(x, grids) if start == self.first_global else x
            fill = blocks.attn.fill if form == "pallas" else None
            attend = image_attention_op(form, mask, fill)

            def body(x, block, attend=attend, fill=fill):
                return shard(block(x, attend, fill), "pictures"), None

            with jax.named_scope(f"vit_{start}"):
                x, _ = jax.lax.scan(REMAT[self.remat](body), x, blocks)
            if stop in self.cfg.taps:
                taps.append(x if self.tiles is None else self.tiles.without_filling(x, grids))
        return jnp.stack(taps, 1)

    def embed(self, pixels: jax.Array, grids: jax.Array | None = None) -> jax.Array:
        """Patches in row-major order with positions, class token first, registers after it:
        [B, S, V]; of tiles one behind the other, filled up as tiles.py has it.
        """
        patches = cut_into_patches(pixels, self.cfg)
        if self.tiles is not None:
            patches = self.tiles.without_others(patches, grids)
        x = self.patch(patches)
        x = x if self.patch_norm is None else self.patch_norm(x)
        pos = None if self.pos is None else self.pos[...].astype(x.dtype)
        if self.tiles is not None:
            x, pos = x + self.tiles.before(x, grids), pos * (1 - self.tiles.places.gate(x))

        def repeat(tokens):
            return jnp.broadcast_to(tokens.astype(x.dtype), (*x.shape[:-2], *tokens.shape))

        parts = [x if pos is None else x + pos[-x.shape[-2] :]]
        if self.registers is not None:
            parts.insert(0, repeat(self.registers[...]))
        if self.cls is not None:
            cls = repeat(self.cls[...][None])
            parts.insert(0, cls if pos is None else cls + pos[:1])
        x = jnp.concatenate(parts, -2)
        x = x if self.tiles is None else x + self.tiles.places(x, grids)
        x = x if self.embed_norm is None else self.embed_norm(x)
        return x if self.tiles is None else self.tiles.filled(x)
