"""How the next token is chosen from its logits: transformers' processors by their names, in
transformers' order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are chosen. The values are arguments of a program, not parts of it."""

    temperature: jax.Array  # [], 0 is greedy
    top_p: jax.Array  # []
    stop: jax.Array  # [any] ids that end an answer
    top_k: jax.Array | int = 0  # [], 0 is all
    min_p: jax.Array | float = 0.0  # []
    allowed: jax.Array | None = None  # [vocab] bool, ids that may be chosen; None: all
    repetition_penalty: jax.Array | None = (
        None  # []; None: nobody remembers which tokens were there
    )


def sample(
    logits: jax.Array, random: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
    """One token of each row of logits [B, vocab]: the best where temperature is 0, else drawn from
    `warped`.

    Args:
      random: [B] PRNG keys.
      seen: [B, vocab] bool, the tokens of the prompt and of the answer so far, where there is a
        repetition penalty.
    """
    logits = processed(logits, sampling, seen)

    def draw(row, key):
        return jax.random.categorical(key, warped(row, sampling))

    return jax.lax.cond(
        sampling.temperature > 0,
        lambda: jax.vmap(draw)(logits, random),
        lambda: jnp.argmax(logits, -1),
    ).astype(jnp.int32)


def processed(logits: jax.Array, sampling: Sampling, seen: jax.Array | None) -> jax.Array:
    """Logits [B, vocab] with the repetition penalty (arXiv 1909.05858), and -inf where a token is
    not allowed.
    """
    if sampling.repetition_penalty is not None:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    return logits if sampling.allowed is None else jnp.where(sampling.allowed, logits, -jnp.inf)


def warped(row: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [vocab] over the temperature; -inf outside of the `top_k` best, then outside of the
    smallest set of best ones that have probability `top_p` (nucleus sampling, arXiv 1904.09751),
    then below `min_p` times the best one's probability (arXiv 2407.01082).
    """
    scaled = row / sampling.temperature
    best = jnp.sort(scaled, descending=True)
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, len(best)), len(best))
    floor = best[top_k - 1]
    best = jnp.where(best >= floor, best, -jnp.inf)
    probability = jax.nn.softmax(best)
    inside = (jnp.cumsum(probability) - probability < sampling.top_p) | (
        sampling.top_p >= 1
    )  # the mass in front of a token
    floor = jnp.maximum(floor, jnp.min(jnp.where(inside, best, jnp.inf)))
    floor = jnp.maximum(floor, best[0] + jnp.log(sampling.min_p))
    return jnp.where(
        scaled >= jnp.minimum(floor, best[0]), scaled, -jnp.inf
    )  # the best one is always inside
