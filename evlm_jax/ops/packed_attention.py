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


def visible_blocks(until: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs of blocks on and below the diagonal, of all rows one after the other: until [B, T] ->
    (block of queries [n], block of keys [n], whether any token of one sees one of the other [n]).
    """
    rows, count = len(until), until.shape[1] // block
    queries, keys = np.tril_indices(count)
    latest = until.reshape(rows, count, block).max(-1)
    seen = (latest[:, keys] > queries * block) | (queries == keys)
    first = np.arange(rows)[:, None] * count
    return (first + queries).reshape(-1), (first + keys).reshape(-1), seen.reshape(-1)


@jax.named_scope("scores")
def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    until: jax.Array,
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H], until [B, T] int32 -> [B, T, N, H]; softmax in float32,
    `scale` and `cap` as of models.attention.
    """
    rows, length = until.shape
    block = block_tokens(length)
    spare = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))) for x in (q, k, v))
    alone = np.broadcast_to(np.arange(length, length + spare, dtype=np.int32) + 1, (rows, spare))
    until = jnp.concatenate([until, alone], axis=1)
    form = Form("packed_attention", scale or q.shape[-1] ** -0.5, cap=cap, row=q.shape[1] // block)
    out = attend(
        *(x.reshape(-1, block, *x.shape[2:]) for x in (q, k, v)),
        until.reshape(-1, block),
        walks(*map(jnp.asarray, visible_blocks(until, block)), rows * form.row),
        form,
    )
    return out.reshape(q.shape)[:, :length]
