"""A model with random weights made by numpy: compiling the real initialisation takes longer than
most tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.evlm import EVLM


@functools.cache
def shapes(cfg: EVLMConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without values, which is traced once for a config."""
    return nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))


def random_model(cfg: EVLMConfig, seed: int) -> EVLM:
    """Every parameter is random, gates and biases too; matrices have deviation 1/sqrt(in), norm
    scales lie around 1; quantised ones are random bytes.
    """
    rng = np.random.default_rng(seed)
    graphdef, state = shapes(cfg)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, leaf.shape), leaf.dtype)
        if "_scale'" in name:  # of tiles of NF4 numbers
            return jnp.asarray(rng.uniform(0.1, 0.2, leaf.shape), leaf.dtype)
        spread = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.3
        return jnp.asarray(("scale" in name) + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))
