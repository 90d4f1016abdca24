"""How far a part of a cross-attention block is open.

A variant is another class with the same members, and xattn.Block makes that.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.models.layers import param


class Gate(nnx.Module):
    """tanh of one learnable number that begins at 0: closed (Flamingo, arXiv 2204.14198)."""

    def __init__(self, rngs: nnx.Rngs):
        self.scalar = param(rngs, (), ())

    def __call__(self, x: jax.Array) -> jax.Array:
        """The factor of what a part of the block adds to x [B, T, D]; broadcasts to it."""
        return self.opening().astype(x.dtype)

    def opening(self) -> jax.Array:
        """What a run reports of the gate: float32 [], or [X] of a stack of X blocks."""
        return jnp.tanh(self.scalar[...].astype(jnp.float32))

    def close(self) -> None:
        """Sets the factor to 0: that part of the block is then the identity, bit for bit."""
        self.scalar[...] = jnp.zeros_like(self.scalar[...])
