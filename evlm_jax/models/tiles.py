"""Pictures that are cut into a grid of tiles, which see each other: what the vision tower of
Llama 3.2 Vision has beside its blocks.

    patches ─ + which tile ─ + positions, of the tile and in the grid ─► blocks ─► norm
        ─ + which tile ─► blocks with gates

Unusual: every picture has all `vit.tiles` tiles. Those that its grid lacks are zeros in place of
pixels, and behind each tile's tokens stand zeros up to a multiple of 8. What is real sees all
of that, as it did when the published weights were trained; the filling does not see itself."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.config import ViTConfig
from evlm_jax.models.gate import Gate
from evlm_jax.models.layers import LayerNorm, RMSNorm, param


class Place(nnx.Module):
    """What the tokens of tiles are told of where they are: a row of a table for each grid (the
    first is that of no picture), times the tanh of a gate.
    """

    def __init__(self, cfg: ViTConfig, tokens: int, rngs: nnx.Rngs):
        shape = (len(cfg.grids) + 1, cfg.tiles * tokens * cfg.width)
        self.table = param(rngs, shape, ("whole", "norm"), std=0.02)
        self.gate = Gate(rngs)
        self.number = 1 + cfg.grids.index(cfg.laid)
        self.shape = (cfg.tiles, tokens, cfg.width)

    def __call__(self, x: jax.Array, grids: jax.Array | None) -> jax.Array:
        """[tiles, tokens, V] in the dtype of x; [B, tiles, tokens, V] for `grids` [B]."""
        rows = self.table[self.number if grids is None else grids]
        return self.gate(x) * rows.reshape(*rows.shape[:-1], *self.shape).astype(x.dtype)


class Tiles(nnx.Module):
    """Places of tiles, and the norm in front of the blocks with gates. `grids` [B] numbers the grid
    of each picture; None: they have that of the config.

    Args:
      tokens: of a tile, without filling.
    """

    def __init__(self, cfg: ViTConfig, tokens: int, norm: LayerNorm | RMSNorm, rngs: nnx.Rngs):
        self.before, self.after = Place(cfg, 1, rngs), Place(cfg, 1, rngs)
        self.places, self.norm = Place(cfg, tokens, rngs), norm
        self.tiles, self.count, self.tokens = cfg.tiles, math.prod(cfg.laid), tokens
        self.filling = cfg.sequence // cfg.tiles - tokens
        self.counts = (1, *map(math.prod, cfg.grids))  # no picture counts as one of a tile

    def real(self, grids: jax.Array | None) -> jax.Array:
        """bool [B or 1, tiles]: which tiles a picture has."""
        count = self.count if grids is None else jnp.array(self.counts)[grids][:, None]
        return jnp.atleast_2d(jnp.arange(self.tiles) < count)

    def without_others(self, patches: jax.Array, grids: jax.Array | None) -> jax.Array:
        """Patches [B, tiles, P, ..] with zeros for tiles that a picture has not."""
        return jnp.where(self.real(grids)[..., None, None], patches, 0)

    def filled(self, x: jax.Array) -> jax.Array:
        """Tokens of tiles [B, tiles, S, V] in one row of all, filled up: [B, tiles * S', V]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.filling), (0, 0)))
        return x.reshape(len(x), -1, x.shape[-1])

    def mask(self, grids: jax.Array | None) -> jax.Array:
        """bool [B or 1, tiles * S', tiles * S']: which of two tokens see each other, all but
        filling.
        """
        real = self.real(grids)[..., None] & (jnp.arange(self.tokens + self.filling) < self.tokens)
        real = real.reshape(len(real), -1)
        return real[:, :, None] | real[:, None]

    def between(self, x: jax.Array, grids: jax.Array | None) -> jax.Array:
        """What the blocks with gates read of the others' output x [B, tiles * S', V]."""
        x = self.norm(x)
        return (self._by_tile(x) + self.after(x, grids)).reshape(x.shape)

    def without_filling(self, x: jax.Array, grids: jax.Array | None) -> jax.Array:
        """x [B, tiles * S', V] -> tokens of the grid, [B, S, V]; of `grids` those of all tiles,
        zeros for tiles that a picture has not.
        """
        x = self._by_tile(x)[:, : self.count, : self.tokens]
        x = x if grids is None else self.without_others(x, grids)
        return x.reshape(len(x), -1, x.shape[-1])

    def _by_tile(self, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), self.tiles, -1, x.shape[-1])
