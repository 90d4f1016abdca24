"""Self-attention of packed rows of text by the kernels of attention_kernels.py.

Token q sees k <= q < until[k], as batch.py has it. Blocks of tokens of which none sees another are
not visited, in either pass: a block of keys in front of a block of queries is seen iff the largest
`until` in it is beyond their first token. The pairs of a row follow from that alone, once a batch.

    block of 2, documents of 3 and 5 tokens     until    3 3 | 3 8 | 8 8 | 8 8

                   keys 0 1 2 3
        queries 0       x
                1       x x
                2         x x                   block 0 has ended
                3         x x x

A layer with a window sees keys less than that in front of a token, by positions of the text: a
dialog that stands far behind its trunk may be near to it. Such blocks are found token by token.
"""

import jax
import jax.numpy as jnp
import numpy as np

from evlm_jax.ops.attention_kernels import LANES, Form, attend, walks


def block_tokens(length: int) -> int:
    """Tokens of a block: a sixteenth of the row, so that half a block beside the diagonal is a
    sixteenth of what is visible; 128 to 512.
    """
    return min(max(length // 16 // LANES, 1) * LANES, 4 * LANES)


def visible_blocks(
    until: jax.Array, block: int, positions: jax.Array | None = None, window: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs of blocks on and below the diagonal, of all rows one after the other: until [B, T] ->
    (block of queries [n], block of keys [n], whether any token of one sees one of the other [n]),
    within a window of `positions` [B, T]; 0: there is none.
    """
    rows, count = len(until), until.shape[1] // block
    queries, keys = np.tril_indices(count)
    until = until.reshape(rows, count, block)
    if window:
        place = positions.reshape(until.shape)
        q, k = (np.arange(block) + block * number[:, None] for number in (queries, keys))
        near = place[:, queries, :, None] - place[:, keys, None] < window
        near &= (k[:, None] <= q[..., None]) & (q[..., None] < until[:, keys, None])
        seen = near.any((2, 3))
    else:
        seen = (until.max(-1)[:, keys] > queries * block) | (queries == keys)
    first = np.arange(rows)[:, None] * count
    return (first + queries).reshape(-1), (first + keys).reshape(-1), seen.reshape(-1)


@jax.named_scope("scores")
def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    until: jax.Array,
    positions: jax.Array | None = None,
    number: jax.Array | int = 0,
    windows: tuple[int, ...] = (0,),
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H], until [B, T] int32 -> [B, T, N, H]; softmax in float32,
    `scale` and `cap` as of models.attention.

    Args:
      positions: [B, T] int32 of tokens in their texts; needed where there is a window.
      number: of the layer, whose window is that of `windows`; 0: it has none.
    """
    rows, length = until.shape
    block = block_tokens(length)
    spare = -length % block
    rest = ((0, 0), (0, spare))
    q, k, v = (jnp.pad(x, (*rest, (0, 0), (0, 0))) for x in (q, k, v))
    alone = np.broadcast_to(np.arange(length, length + spare, dtype=np.int32) + 1, (rows, spare))
    until, place = jnp.concatenate([until, alone], axis=1), None
    queries, keys, seen = visible_blocks(until, block)
    sight = until.reshape(-1, 1, block)
    if any(windows):
        # lists of all kinds of layers do not depend on the layer: the compiler makes them once
        kinds, place = sorted(set(windows)), jnp.pad(positions, rest)
        seen = [visible_blocks(until, block, place, window)[2] for window in kinds]
        seen = jnp.stack(seen)[jnp.array([*map(kinds.index, windows)])[number]]
        edge = place + jnp.array([window or length for window in windows])[number]
        sight = jnp.concatenate([sight, edge.reshape(sight.shape)], 1)
        place = place.reshape(-1, block)
    form = Form("packed_attention", scale or q.shape[-1] ** -0.5, cap=cap, row=q.shape[1] // block)
    out = attend(
        *(x.reshape(-1, block, *x.shape[2:]) for x in (q, k, v)),
        sight,
        walks(*map(jnp.asarray, (queries, keys, seen)), rows * form.row),
        form,
        place,
    )
    return out.reshape(q.shape)[:, :length]
