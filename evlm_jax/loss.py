"""Cross-entropy at the supervised positions only: the head never sees a position without a target."""

import jax
import jax.numpy as jnp

from evlm_jax.batch import Batch
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.moe import auxiliary_loss


def losses(model: EVLM, batch: Batch) -> jax.Array:
    """Cross-entropy of every target in nats, float32 [B, M]; 0 where there is none."""
    return _cross_entropy(model, model.hidden(batch), batch)


def loss_sums(model: EVLM, batch: Batch, sources: int) -> tuple[jax.Array, dict]:
    """Sum of the losses, and {"loss": [sources], "count": [sources]}. The caller divides by the global count.

    With experts the auxiliary loss is added to each target's, and "routing" of all blocks to the sums (models/moe.py).
    """
    hidden, routing = model.routed(batch)
    loss = _cross_entropy(model, hidden, batch)
    source = jnp.where(batch.targets >= 0, batch.target_source, sources)
    by_source = lambda x: jax.ops.segment_sum(x.reshape(-1), source.reshape(-1), sources)
    sums = {"loss": by_source(loss), "count": by_source(jnp.ones_like(loss))}
    if routing is None:
        return loss.sum(), sums
    return loss.sum() + sums["count"].sum() * auxiliary_loss(model.cfg.moe, routing), sums | {"routing": routing}


def _cross_entropy(model: EVLM, hidden: jax.Array, batch: Batch) -> jax.Array:
    hidden = jnp.take_along_axis(hidden, batch.target_at[..., None], axis=1)
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    picked = jnp.take_along_axis(log_probs, jnp.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(batch.targets >= 0, -picked, 0.0)
