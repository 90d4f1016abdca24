"""Which (query block, image) pairs an image group's cross-attention has to compute: made once per
batch on the host, used by every layer.

Tokens that see the same images are put together into query blocks of `block` tokens; a block and
one image it sees are a block pair, the unit of work. With 64 images in sight of a row each token
sees one of them, so block pairs cost 1/64 of the masked form.

    block = 2
    visible range   [0,1) [0,1) [0,1) [1,2) [1,2) [2,4) none
    query blocks    (0 1) (2 -) (3 4) (5 -)
    block pairs     (0,img0) (1,img0) (2,img1) (3,img2) (3,img3)

The last token is in no block: its output is 0. The block of a video's text meets all its frames.
"""

import numpy as np


def ranges(
    visible_start: np.ndarray, visible_stop: np.ndarray
) -> list[tuple[int, int, np.ndarray]]:
    """(start, stop, token indices) of each distinct non-empty visible range, ordered by start."""
    keys = visible_start.astype(np.int64) << 32 | visible_stop
    cuts = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
    spans: dict[int, list[np.ndarray]] = {}
    for first, last in zip(
        cuts, cuts[1:]
    ):  # neighbours mostly see the same: far fewer than tokens, which np.unique would sort
        if first < last and visible_stop[first] > visible_start[first]:
            spans.setdefault(int(keys[first]), []).append(np.arange(first, last))
    return [(key >> 32, key & 0xFFFFFFFF, np.concatenate(spans[key])) for key in sorted(spans)]


def block_pair_count(visible_start: np.ndarray, visible_stop: np.ndarray, block: int) -> int:
    """Block pairs that these tokens need: the packer's cost.

    `block` 0: there is no cross-attention, and they need none.
    """
    return block and sum(
        -(-len(tokens) // block) * (stop - start)
        for start, stop, tokens in ranges(visible_start, visible_stop)
    )


def attention_plan(
    visible_start: np.ndarray, visible_stop: np.ndarray, block: int, pairs: int
) -> dict[str, np.ndarray]:
    """The plan of one image group, its rows one after the other, int32, as the fields of Batch of
    the same names.

    Returns:
      block_tokens [P, block] (U padding), token_place [U] (P * block where in no block),
      pair_block [P] (P padding), pair_image [P].
    Raises:
      ValueError: the group needs more than `pairs` block pairs.
    """
    length = len(visible_start)
    block_tokens = np.full((pairs, block), length, np.int32)
    token_place = np.full(length, pairs * block, np.int32)
    pair_block, pair_image, blocks = [], [], 0
    needed = block_pair_count(visible_start, visible_stop, block)
    if needed > pairs:
        raise ValueError(
            f"an image group needs {needed} (query block, image) pairs, the budget is {pairs}:"
            " raise data.block_pairs or pack fewer images"
        )
    for start, stop, tokens in ranges(visible_start, visible_stop):
        for first in range(0, len(tokens), block):
            members = tokens[first : first + block]
            block_tokens[blocks, : len(members)] = members
            token_place[members] = blocks * block + np.arange(len(members))
            pair_block += [blocks] * (stop - start)
            pair_image += range(start, stop)
            blocks += 1
    pad = pairs - len(pair_block)
    return {
        "block_tokens": block_tokens,
        "token_place": token_place,
        "pair_block": np.array(pair_block + [pairs] * pad, np.int32),
        "pair_image": np.array(pair_image + [0] * pad, np.int32),
    }
