"""The one struct that a train step reads. Letters: see `config/__init__.py`.

Two pairs of integers describe every mask of the model, so no [T, T] or [T, I] mask is ever stored:

Text sees text. Token k is visible to token q iff k <= q < visible_until[k]. Documents of a row are
isolated because every token's `visible_until` ends with its document; several dialogs about one
image share the image's media tokens as a trunk:

    index           0    1    2    3    4    5    6    7    8
    token          img  img  q1   q1   a1   q2   a2   img  cap
    visible_until   7    7    5    5    5    7    7    9    9
    position        0    1    2    3    4    2    3    0    1

dog.png has two questions, then another document comes: 2, 3, 4 end before 5, so the dialogs do not
see each other, and positions go on as if each dialog stood alone.

Text sees images. `data.image_group` neighbouring rows, an image group, share image slots, so that a
row with many images and one with few leave none empty. Token q sees slots visible_start[q] <= i <
visible_stop[q] of its group: a media token its own image (or frame), text the nearest previous
image, text of a video all its frames, text before any image the empty range.

    group of 2 rows, 4 slots    row 0   A A A B B C C C          sees slots 0, 1, 2
                                row 1   D D D D D - - -          sees slot 3
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from evlm_jax.config import EVLMConfig


class Batch(NamedTuple):
    """Packed rows, in C image groups. Padding: visible_until = index + 1, empty visible range,
    media_slot -1, target_positions 0 with target -1.

    Query blocks and block pairs are None where the model has no cross-attention.
    """

    tokens: jax.Array  # [B, T] int32; the placeholder id at media positions
    positions: jax.Array  # [B, T] int32, restart with every document
    visible_until: jax.Array  # [B, T] int32, exclusive
    media_slot: jax.Array  # [B, T] int32; -1 text, else the row of the learnable media embedding
    visible_start: jax.Array  # [B, T] int32
    visible_stop: jax.Array  # [B, T] int32, exclusive
    target_positions: jax.Array  # [B, M] int32; position whose output predicts the target
    targets: jax.Array  # [B, M] int32; -1 padding
    target_source: jax.Array  # [B, M] int32; index into data.sources, for the loss per source
    # [C, J, query_block] int32; the group's tokens, row after row, by visible range; padding is U,
    # image_group * T
    block_tokens: jax.Array | None
    # [C, U] int32; index of a token in the flattened block_tokens, J*query_block if in none
    token_place: jax.Array | None
    # [C, P] int32; a query block and one image it sees: the unit of work; J padding, ascending
    pair_block: jax.Array | None
    pair_image: jax.Array | None  # [C, P] int32
    pixels: jax.Array | None  # [C, I, height, width, 3 or 4] uint8; None where taps are given
    # [C, I, G, S, V]; cached features of a frozen tower; None where pixels are given
    taps: jax.Array | None

    @classmethod
    def spec(cls, cfg: EVLMConfig, rows: int | None = None) -> "Batch":
        """Shapes and dtypes for tests, initialisation and ahead-of-time compilation."""
        d, vit, block = cfg.data, cfg.vit, cfg.query_block
        b = rows or cfg.train.batch
        c = b // d.image_group

        def ints(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        text, target, pairs = ints(b, d.length), ints(b, d.targets), ints(c, d.block_pairs)
        pixels = jax.ShapeDtypeStruct((c, d.slots, *vit.input_shape), jnp.uint8)
        taps = jax.ShapeDtypeStruct(
            (c, d.slots, len(vit.taps), vit.tokens, vit.width), jnp.bfloat16
        )
        return cls(
            tokens=text,
            positions=text,
            visible_until=text,
            media_slot=text,
            visible_start=text,
            visible_stop=text,
            target_positions=target,
            targets=target,
            target_source=target,
            block_tokens=ints(c, d.block_pairs, block) if block else None,
            token_place=ints(c, d.image_group * d.length) if block else None,
            pair_block=pairs if block else None,
            pair_image=pairs if block else None,
            pixels=None if d.cache_features else pixels,
            taps=taps if d.cache_features else None,
        )
