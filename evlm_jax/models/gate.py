"""How far a part of a cross-attention block is open.

A variant is another class with the same members, which `attention_gate` makes; what the rest of the
package knows of it stands in config/xattn.py. `join` is of blocks beside self-attention.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.layers import Linear, param

# Attention [B, T, N, H] and the logarithm of the sum of its exponentials, float32 [B, T, N].
Sums = tuple[jax.Array, jax.Array]
START = -4.0  # a mixing gate begins 1.8% open


class Gate(nnx.Module):
    """tanh of one learnable number that begins at 0: closed (Flamingo, arXiv 2204.14198)."""

    def __init__(self, rngs: nnx.Rngs):
        self.scalar = param(rngs, (), ())

    def __call__(self, x: jax.Array) -> jax.Array:
        """The factor of what a part of the block adds to x [B, T, D]; broadcasts to it."""
        return self.opening().astype(x.dtype)

    def join(self, text: jax.Array, images: jax.Array) -> jax.Array:
        """What attention to text and to images give together; all [B, T, N, H]."""
        return text + self(text) * images

    def opening(self) -> jax.Array:
        """What a run reports of the gate: float32 [], or [X] of a stack of X blocks."""
        return jnp.tanh(self.scalar[...].astype(jnp.float32))

    def close(self) -> None:
        """Sets the factor to 0: that part of the block is then the identity, bit for bit."""
        self.scalar[...] = jnp.zeros_like(self.scalar[...])


class MixingGate(nnx.Module):
    """Share in which images take the place of text, for each token, head and channel: sigmoid of a
    linear layer over what the text gives a head, one for all heads (mPLUG-Owl3-7B-240728).

    A sigmoid is never closed; it begins where a frozen language model hardly notices.
    """

    def __init__(self, head_dim: int, rngs: nnx.Rngs):
        self.linear = Linear((head_dim, head_dim), ("whole", "whole"), rngs, bias=True)
        self.linear.bias = param(rngs, (head_dim,), ("whole",), value=START)

    def join(self, text: jax.Array, images: jax.Array) -> jax.Array:
        """As of Gate. What sees no image, to which attention gives exactly 0, keeps its text."""
        share = jax.nn.sigmoid(self.linear(text).astype(jnp.float32)).astype(text.dtype)
        seen = (images != 0).any(-1, keepdims=True)
        return jnp.where(seen, text + share * (images - text), text)

    def opening(self) -> jax.Array:
        """As of Gate, at a text of zeros: the mean of the channels."""
        return jax.nn.sigmoid(self.linear.bias[...].astype(jnp.float32)).mean(-1)

    def close(self) -> None:
        """As of Gate."""
        self.linear.kernel[...] = jnp.zeros_like(self.linear.kernel[...])
        self.linear.bias[...] = jnp.full_like(self.linear.bias[...], -jnp.inf)


class OneSoftmax(nnx.Module):
    """No gate: a token's scores of text and of images share a softmax (mPLUG-Owl3, form 241101).
    From the beginning, images count as their scores say.
    """

    def join(self, text: Sums, images: Sums) -> jax.Array:
        """[B, T, N, H], as of Gate, from attention to each alone."""
        (text, own), (images, other) = text, images
        share = jax.nn.sigmoid(other - own)[..., None].astype(text.dtype)
        return text + share * (images - text)


def attention_gate(cfg: EVLMConfig, rngs: nnx.Rngs) -> Gate | MixingGate | OneSoftmax:
    """The gate of a block's attention; that of its FFN is always a `Gate`."""
    if cfg.xattn.one_softmax:
        return OneSoftmax()
    return MixingGate(cfg.xattn.head_dim, rngs) if cfg.xattn.gate == "mixing" else Gate(rngs)
