"""Cross-entropy at the supervised positions only: the head never sees a position without a
target.
"""

import jax
import jax.numpy as jnp

from evlm_jax.batch import Batch
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.moe import auxiliary_loss
from evlm_jax.parallel.sharding import shard


def losses(model: EVLM, batch: Batch) -> jax.Array:
    """Cross-entropy of every target in nats, float32 [B, M]; 0 where there is none."""
    return _cross_entropy(model, model.hidden(batch), batch)


def loss_sums(model: EVLM, batch: Batch, sources: int) -> tuple[jax.Array, dict]:
    """Sum of the losses, and {"loss": [sources], "count": [sources]}. The caller divides by the
    global count.

    With experts the auxiliary loss is added to each target's, and "routing" of all blocks to the
    sums (models/moe.py)."""
    hidden, routing = model.forward_with_aux(batch)
    loss = _cross_entropy(model, hidden, batch)
    source = jnp.where(batch.targets >= 0, batch.target_source, sources)

    def by_source(x):
        return jax.ops.segment_sum(x.reshape(-1), source.reshape(-1), sources)

    sums = {"loss": by_source(loss), "count": by_source(jnp.ones_like(loss))}
    if routing is None:
        return loss.sum(), sums
    return loss.sum() + sums["count"].sum() * auxiliary_loss(model.cfg.moe, routing), sums | {
        "routing": routing
    }


def _cross_entropy(model: EVLM, hidden: jax.Array, batch: Batch) -> jax.Array:
    """By chunks of `train.loss_chunk` targets: the logits of one chunk are all that is ever in
    memory, forward and backward.
    """
    readout, count = model.readout(), batch.targets.shape[1]
    chunk = model.cfg.train.loss_chunk or count

    def of(hidden: jax.Array, at: jax.Array, targets: jax.Array) -> jax.Array:
        logits = shard(
            readout(jnp.take_along_axis(hidden, at[..., None], axis=1)), "rows", None, "vocab"
        )
        picked = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0).sum(
            -1
        )  # no look-up in a split vocabulary
        return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)

    if chunk >= count:
        return of(hidden, batch.target_positions, batch.targets)

    def cut(x, fill):
        return (
            jnp.pad(x, ((0, 0), (0, -count % chunk)), constant_values=fill)
            .reshape(len(x), -1, chunk)
            .swapaxes(0, 1)
        )

    body = jax.checkpoint(lambda _, inputs: (None, of(hidden, *inputs)), prevent_cse=False)
    losses = jax.lax.scan(body, None, (cut(batch.target_positions, 0), cut(batch.targets, -1)))[1]
    return losses.swapaxes(0, 1).reshape(len(hidden), -1)[:, :count]
