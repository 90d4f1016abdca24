"""What a cache holds of the images, behind the keys and values of the text."""

from typing import NamedTuple

import torch


class Images(NamedTuple):
    """Keys and values of images in a cache, and the position in the text behind it.

    All beams of a row have the same.
    """

    keys_values: list  # of every cross-attention block, [B, K, I * S + sinks, H]
    groups: torch.Tensor  # [B, I]; the images of a row are numbered as its tokens show them
    theta: float | torch.Tensor  # the prompts' rotary base, a number or [B, 1, 1, 1]
    media: torch.Tensor  # [B, 1], media tokens that were read
    until: int = 0  # length of the cache behind the last of them

    def read(self, media, past):
        """The cache with the media tokens of [B, T] that follow `past` tokens."""
        until = past + int(media.any(0).nonzero().max()) + 1 if media.any() else self.until
        return self._replace(media=self.media + media.sum(1, keepdim=True), until=until)

    def append(self, keys_values, groups, media_tokens, size, count):
        """The cache with new images of `size` keys behind those of each row; rows with fewer than
        `count` are padded.
        """
        old, new = self.groups.shape[1], groups.shape[1]
        held, place = -(-self.media // media_tokens), torch.arange(count, device=groups.device)
        order = torch.where(place < held, place, old + place - held).clamp(
            max=old + new - 1
        )  # [B, I]
        if old:
            groups = groups - groups.amin() + self.groups.amax() + 1
        groups = torch.cat([self.groups, groups], 1).gather(1, order)

        def join(a, b):
            sinks = b.shape[2] - size * new
            a, b = (x[:, :, : n * size].unflatten(2, (n, size)) for x, n in ((a, old), (b, new)))
            at = order.to(a.device)[:, None, :, None, None].expand(
                -1, a.shape[1], -1, size, a.shape[-1]
            )
            return torch.nn.functional.pad(
                torch.cat([a, b], 2).gather(2, at).flatten(2, 3), (0, 0, 0, sinks)
            )

        joined = [
            tuple(map(join, *pairs)) for pairs in zip(self.keys_values, keys_values, strict=True)
        ]
        return self._replace(keys_values=joined, groups=groups)
