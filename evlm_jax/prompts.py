"""Prompts as arrays, padded to a few sizes, so that few programs are compiled."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from evlm_jax.config import EVLMConfig
from evlm_jax.data import text
from evlm_jax.models.decoding import Prompt
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan

# tokens that prompts have room for, or answers; 16 frames of 16 media tokens and a question are 320
LENGTHS = (24, 64, 320, 1024)
IMAGES = (1, 8)  # image slots of a prompt


class Room(NamedTuple):
    """Sizes of a batch of prompts: in a call, up to 1,024 tokens and 8 images, one of four, each
    with more room than the one before; the smallest only where all of several prompts fit it.
    """

    length: int
    images: int

    @classmethod
    def of(cls, prompts: Sequence[text.Document], least: int = LENGTHS[1]) -> "Room":
        """The smallest room of at least so many tokens for all of these prompts."""
        length = rung(max(least, *(len(d.tokens) for d in prompts)), LENGTHS)
        images = rung(max(len(d.refs) for d in prompts), IMAGES)
        return cls(
            max(length, LENGTHS[-2]) if images > IMAGES[0] else length,
            max(images, IMAGES[1]) if length >= LENGTHS[-1] else images,
        )

    def block_pairs(self, block: int, needed: int) -> int:
        """(query block, image) pairs of a prompt.

        Of few images so many that any prompt fits; of many what is `needed`, up to a power of two.
        """
        most = self.images * (-(-self.length // block) + 1)
        return most if self.images <= IMAGES[-1] else min(most, bucket(needed))

    def row(self, cfg: EVLMConfig, document: text.Document) -> EVLMConfig:
        """The config for batches whose rows have this room, of one document each, with its pictures
        as pixels.
        """
        pairs = self.block_pairs(cfg.query_block, document.block_pairs) if cfg.query_block else 0
        sizes = {
            "length": self.length,
            "targets": self.length,
            "images": self.images,
            "slots": self.images,
            "block_pairs": max(pairs, self.images),
        }
        return replace(cfg, data=replace(cfg.data, image_group=1, cache_features=False, **sizes))


def collate(prompts: Sequence[text.Document], block: int, rows: int, room: Room) -> Prompt:
    """Prompts as padded arrays.

    Args:
      block: tokens of a query block; 0: without cross-attention.
      rows: at least as many as prompts.
    """
    arrays = {
        name: np.zeros((rows, room.length), np.int32)
        for name in ("tokens", "media_slot", "visible_start", "visible_stop")
    }
    arrays["media_slot"] -= 1
    lengths, start, count = np.zeros((3, rows), np.int32)
    for row, document in enumerate(prompts):
        lengths[row] = len(document.tokens)
        for name, array in arrays.items():
            array[row, : lengths[row]] = getattr(document, name)
        start[row] = document.visible_start[-1]
        count[row] = document.visible_stop[-1] - start[row]
    grouped = None
    if block:
        pairs = room.block_pairs(block, max(d.block_pairs for d in prompts))
        plans = [
            attention_plan(a, b, block, pairs)
            for a, b in zip(arrays["visible_start"], arrays["visible_stop"])
        ]
        grouped = AttentionPlan(
            *(np.stack([p[name] for p in plans]) for name in AttentionPlan._fields)
        )
    return Prompt(
        arrays["tokens"],
        arrays["media_slot"],
        lengths,
        np.maximum(arrays["visible_stop"] - 1, 0),
        grouped,
        start,
        count,
    )


def rung(size: int, ladder: tuple[int, ...]) -> int:
    """The smallest step of the ladder that is not below; above the ladder, the next multiple of its
    last step, or of a quarter of the power of two below, if that is more.
    """
    step = max(ladder[-1], 1 << max(size.bit_length() - 3, 0))
    return next((step for step in ladder if step >= size), 0) or -(-size // step) * step


def bucket(size: int, smallest: int = 1) -> int:
    """The next power of two times `smallest`."""
    while smallest < size:
        smallest *= 2
    return smallest
