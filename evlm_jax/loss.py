"""Cross-entropy at the supervised positions only: the head never sees a position without a target."""

import jax
import jax.numpy as jnp

from evlm_jax.batch import Batch
from evlm_jax.models.evlm import EVLM


def losses(model: EVLM, batch: Batch) -> jax.Array:
    """Cross-entropy of every target in nats, float32 [B, M]; 0 where there is none."""
    hidden = jnp.take_along_axis(model.hidden(batch), batch.target_at[..., None], axis=1)
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    picked = jnp.take_along_axis(log_probs, jnp.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(batch.targets >= 0, -picked, 0.0)


def loss_sums(model: EVLM, batch: Batch, sources: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the losses, and per source {"loss": [sources], "count": [sources]}. The caller divides by the global count."""
    loss = losses(model, batch)
    source = jnp.where(batch.targets >= 0, batch.target_source, sources)
    by_source = lambda x: jax.ops.segment_sum(x.reshape(-1), source.reshape(-1), sources)
    return loss.sum(), {"loss": by_source(loss), "count": by_source(jnp.ones_like(loss))}
