"""How the next token is chosen from its logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are chosen."""

    temperature: jax.Array  # [], 0 is greedy
    top_p: jax.Array  # []
    stop: jax.Array  # [any] ids that end an answer


def sample(logits: jax.Array, random: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token of each row of logits [B, vocab]: the best where temperature is 0, else drawn from the smallest set of best tokens
    that together have probability `top_p` (nucleus sampling, arXiv 1904.09751). `random`: [B] PRNG keys."""

    def draw(row, key):
        scaled = row / temperature
        best = jnp.sort(scaled, descending=True)
        probability = jax.nn.softmax(best)
        inside = jnp.cumsum(probability) - probability < top_p  # the mass in front of a token; the best one is always inside
        floor = jnp.min(jnp.where(inside, best, jnp.inf))
        return jax.random.categorical(key, jnp.where(scaled >= jnp.minimum(floor, best[0]), scaled, -jnp.inf))

    greedy = lambda: jnp.argmax(logits, -1)
    return jax.lax.cond(temperature > 0, lambda: jax.vmap(draw)(logits, random), greedy).astype(jnp.int32)
