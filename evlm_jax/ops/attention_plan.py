"""Which (tile, image) pairs a pool's cross-attention has to compute: made once per batch on the
host, used by every layer.

Tokens that see the same images are put together into tiles of `tile` tokens; a tile and one image
it sees are a pair, the unit of work. With 64 images in sight of a row each token sees one of them,
so pairs cost 1/64 of the masked form.

    tile = 2
    visible range   [0,1) [0,1) [0,1) [1,2) [1,2) [2,4) none
    tiles           (0 1) (2 -) (3 4) (5 -)
    pairs           (0,img0) (1,img0) (2,img1) (3,img2) (3,img3)

The last token is in no tile: its output is 0. A video's tile meets all its frames.
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


def pair_count(visible_start: np.ndarray, visible_stop: np.ndarray, tile: int) -> int:
    """Pairs that these tokens need: the packer's cost.

    `tile` 0: there is no cross-attention, and they need none.
    """
    return tile and sum(
        -(-len(tokens) // tile) * (stop - start)
        for start, stop, tokens in ranges(visible_start, visible_stop)
    )


def attention_plan(
    visible_start: np.ndarray, visible_stop: np.ndarray, tile: int, pairs: int
) -> dict[str, np.ndarray]:
    """The grouping of one pool, its rows one after the other, int32, as the fields of Batch of the
    same names.

    Returns:
      tile_tokens [P, tile] (U padding), token_tile [U] (P * tile where in no tile), pair_tile [P]
      (P padding), pair_image [P].
    Raises:
      ValueError: the pool needs more than `pairs` pairs.
    """
    length = len(visible_start)
    tile_tokens = np.full((pairs, tile), length, np.int32)
    token_tile = np.full(length, pairs * tile, np.int32)
    pair_tile, pair_image, tiles = [], [], 0
    needed = pair_count(visible_start, visible_stop, tile)
    if needed > pairs:
        raise ValueError(
            f"a pool needs {needed} (tile, image) pairs, the budget is {pairs}: raise data.pairs or"
            " pack fewer images"
        )
    for start, stop, tokens in ranges(visible_start, visible_stop):
        for first in range(0, len(tokens), tile):
            members = tokens[first : first + tile]
            tile_tokens[tiles, : len(members)] = members
            token_tile[members] = tiles * tile + np.arange(len(members))
            pair_tile += [tiles] * (stop - start)
            pair_image += range(start, stop)
            tiles += 1
    pad = pairs - len(pair_tile)
    return {
        "tile_tokens": tile_tokens,
        "token_tile": token_tile,
        "pair_tile": np.array(pair_tile + [pairs] * pad, np.int32),
        "pair_image": np.array(pair_image + [0] * pad, np.int32),
    }
