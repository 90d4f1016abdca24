"""What text sees of images while a prompt is read and its answer grows: keys and values of
cross-attention, which depend on the images alone, or patches that stand in the text.

Images come a chunk of slots at a time, each written into its place: of a thousand frames no more
than the taps of one chunk are held. The answer goes on with the arrays of its prompt."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models import text_cache
from evlm_jax.models.evlm import tokens_there
from evlm_jax.models.trunk import pick
from evlm_jax.ops.decode_matmul import compute_dtype
from evlm_jax.parallel.sharding import shard


class ImageCache(NamedTuple):
    """I image slots of every row; what a model has no use for is None.

    X: cross-attention blocks. Z: I * S' keys of the slots, then zero keys: the sinks, here worth
    being stored, or one for those who see nothing else."""

    keys: jax.Array | None  # [X, B, K, H, Z]
    values: jax.Array | None  # [X, B, K, Z, H]
    # [B, Z] bool, keys that an image has (tokens_there), and the sinks; None: all
    there: jax.Array | None
    patches: jax.Array | None  # [1, B, I, P, D] that stand in the text

    @classmethod
    def spec(cls, cfg: EVLMConfig, rows: int, images: int) -> "ImageCache":
        """Shapes and dtypes."""
        dtype = compute_dtype(cfg.train.dtype)
        seen = images * cfg.view_tokens + max(cfg.xattn.sinks, 1)
        front = len(cfg.cross_layers), rows, cfg.xattn.kv_heads

        def some(wanted, dtype, *size):
            return jax.ShapeDtypeStruct(size, dtype) if wanted else None

        cross, head = bool(cfg.cross_layers), cfg.xattn.head_dim
        written = cfg.bridge.kind == "llava", dtype, 1, rows, images
        return cls(
            some(cross, dtype, *front, head, seen),
            some(cross, dtype, *front, seen, head),
            some(cfg.vit.grid_by_picture, jnp.bool, rows, seen),
            some(*written, cfg.vit.patches, cfg.llm.hidden),
        )

    @classmethod
    def empty(cls, cfg: EVLMConfig, rows: int, images: int) -> "ImageCache":
        """Without images."""
        made = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cls.spec(cfg, rows, images))
        if made.there is not None:
            sinks = jnp.arange(made.there.shape[1]) >= images * cfg.view_tokens
            made = made._replace(there=made.there | sinks)
        return made._placed()

    def slots(self, cfg: EVLMConfig) -> int:
        """I."""
        if self.patches is not None:
            return self.patches.shape[2]
        return (self.values.shape[3] - max(cfg.xattn.sinks, 1)) // cfg.view_tokens

    def write(
        self,
        cfg: EVLMConfig,
        crosses: nnx.Module | None,
        views: jax.Array,
        image: jax.Array,
        turned: Callable,
        first: jax.Array | int,
    ) -> "ImageCache":
        """With the images of a chunk of slots, the first of which is `first`.

        Args:
          crosses: the stack of cross-attention blocks.
          views: [G', n, S', V or D], visual states.
          image: [B, c], which of the n fills each slot.
          turned: as rotary.key_turns makes it, of these slots.
        """
        put = jax.lax.dynamic_update_slice
        if self.patches is not None:
            return self._replace(patches=put(self.patches, views[:, image], (0, 0, first, 0, 0)))
        if self.keys is None:
            return self  # of a language model alone
        number, at = jnp.array(cfg.tap_of_cross_layer), first * cfg.view_tokens

        def chunk(a):  # [B, c, S', ...] -> [B, c * S', ...]
            return a.reshape(len(a), -1, *a.shape[3:])

        def block(i, cache):
            keys, values = pick(crosses, i).keys_values(views[number[i]])
            keys, values = chunk(turned(keys[image], i)), chunk(values[image])
            return (
                put(cache[0], keys.transpose(0, 2, 3, 1)[None], (i, 0, 0, 0, at)),
                put(cache[1], values.transpose(0, 2, 1, 3)[None], (i, 0, 0, at, 0)),
            )

        keys, values = jax.lax.fori_loop(0, len(self.keys), block, (self.keys, self.values))
        new = self._replace(keys=keys, values=values)
        for there in tokens_there(cfg, views):
            new = new._replace(there=put(self.there, chunk(there[image]), (0, at)))
        return new._placed()

    def block(self, cfg: EVLMConfig, number: jax.Array) -> list[jax.Array]:
        """Keys and values of a cross-attention block by images, [B, I, S', K, H]: no sinks."""
        layer = text_cache.layer(self.keys, self.values, number)
        return [self._by_image(cfg, a) for a in layer]

    def mask(self, cfg: EVLMConfig) -> list[jax.Array]:
        """`there` by images, [B, I, S'], where pictures differ in their keys."""
        return [] if self.there is None else [self._by_image(cfg, self.there)]

    def kept(
        self, cfg: EVLMConfig, start: jax.Array, images: int
    ) -> tuple[jax.Array, "ImageCache"]:
        """For an answer whose tokens see images from slot `start` [B] on: (where those begin [B],
        the cache as it is, or if `images` are fewer than its slots a smaller copy).
        """
        if self.keys is None or images == self.slots(cfg):
            return start, self
        slot = jnp.minimum(start[:, None] + jnp.arange(images), self.slots(cfg) - 1)
        at = (slot[..., None] * cfg.view_tokens + jnp.arange(cfg.view_tokens)).reshape(
            len(slot), -1
        )
        sinks = jnp.arange(self.slots(cfg) * cfg.view_tokens, self.values.shape[3])
        at = jnp.concatenate([at, jnp.broadcast_to(sinks, (len(at), len(sinks)))], 1)
        there = None if self.there is None else jnp.take_along_axis(self.there, at, 1)
        keys = jnp.take_along_axis(self.keys, at[None, :, None, None], 4)
        values = jnp.take_along_axis(self.values, at[None, :, None, :, None], 3)
        return jnp.zeros_like(start), ImageCache(keys, values, there, None)

    def _by_image(self, cfg: EVLMConfig, a: jax.Array) -> jax.Array:
        """[B, Z, ...] -> [B, I, S', ...]."""
        slots = self.slots(cfg)
        return a[:, : slots * cfg.view_tokens].reshape(len(a), slots, -1, *a.shape[2:])

    def _placed(self) -> "ImageCache":
        """Split over the mesh as the text's caches are."""
        if self.keys is None:
            return self
        keys, values = (shard(a, None, "rows", "kv_heads") for a in (self.keys, self.values))
        return self._replace(keys=keys, values=values)
