"""Data-dependent start of the cross-attention's norms (the idea of arXiv 1602.07868, applied to
LayerNorm).

Unusual: where an answer is predicted, most of a normalised residual stream is one constant vector,
whatever the question (98% of its square in SmolLM2-135M). Queries made from it begin blind to the
words they should look for. So the norms that read the text subtract what the predicting positions
have in common and divide by the spread of all text around it, channel by channel; the norm that
reads the taps does so with the mean over visual tokens. From there they are trained like any
others (docs/decisions.md, D-MODEL-2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.flops import real_tokens
from evlm_jax.models.evlm import EVLM

FLOOR = 1e-2  # added to variances, so that a channel that hardly moves is not blown up


def centre_norms(model: EVLM, batch: Batch) -> nnx.State:
    """The model's State with the norms of its cross-attention set for `batch`.

    They must be new (scale 1, bias 0), and the gates 0: then the blocks read the language model's
    own stream."""
    states, row = model.visual_states(batch), jnp.arange(len(batch.tokens))[:, None]
    zeros, group = jnp.zeros(batch.tokens.shape), jnp.arange(len(batch.pair_image))[:, None]
    predicts = zeros.at[row, batch.target_positions].add(batch.targets >= 0)
    text = (real_tokens(batch) & (batch.media_slot < 0)).astype(jnp.float32)
    images = jnp.zeros(states.shape[1:4])  # [C, I, S']
    images = images.at[group, batch.pair_image].max(
        (batch.pair_block < batch.block_tokens.shape[1])[..., None].astype(jnp.float32)
    )

    def observe(block, state, x):
        of_text = _moments(block.norm(x), predicts, text)
        of_images = (
            {"kv_norm": _moments(block.kv_norm(state), images, images)} if block.kv_norm else {}
        )
        return {"norm": of_text, "ffn_norm": of_text} | of_images

    for name, (centre, spread) in model.forward_with_observer(batch, states, observe)[
        1
    ].observed.items():
        norm = getattr(model.xattn, name)
        norm.scale[...], norm.bias[...] = 1 / spread, -centre / spread
    return nnx.state(model)


def _moments(
    x: jax.Array, centre_weight: jax.Array, spread_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean of x [..., C] and root mean square of its distance from there: two [C],
    float32.
    """

    def mean(a, w):
        return (a * w[..., None]).reshape(-1, a.shape[-1]).sum(0) / jnp.maximum(w.sum(), 1)

    x = x.astype(jnp.float32)
    centre = mean(x, centre_weight)
    return centre, jnp.sqrt(mean(jnp.square(x - centre), spread_weight) + FLOOR)
