"""Sampling against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax.models import sampling


@pytest.mark.parametrize("top_p", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_top_p_against_numpy(top_p, temperature):
    """Frequencies of many draws are those of the renormalised nucleus."""
    logits = np.random.default_rng(0).normal(0, 2, 20).astype(np.float32)
    draws = 20000
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = sampling.sample(
        jnp.tile(logits, (draws, 1)),
        keys,
        sampling.Sampling(jnp.float32(temperature), jnp.float32(top_p), None),
    )
    found = np.bincount(np.asarray(tokens), minlength=20) / draws

    wanted = np.exp(logits / temperature - (logits / temperature).max())
    wanted /= wanted.sum()
    order = np.argsort(-wanted)
    inside = order[: np.searchsorted(np.cumsum(wanted[order]), top_p) + 1]
    nucleus = np.zeros(20)
    nucleus[inside] = wanted[inside] / wanted[inside].sum()
    assert set(np.flatnonzero(found)) <= set(inside)
    assert np.abs(found - nucleus).max() < 4 * np.sqrt(0.25 / draws)


def test_temperature_zero_is_the_argmax():
    logits = jax.random.normal(jax.random.key(0), (5, 30))
    keys = jax.random.split(jax.random.key(1), 5)
    assert (
        sampling.sample(logits, keys, sampling.Sampling(jnp.float32(0), jnp.float32(0.5), None))
        == logits.argmax(-1)
    ).all()
