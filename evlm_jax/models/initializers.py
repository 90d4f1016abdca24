"""How new parameters begin where that is more than what each declares (layers.param): a layer of
cross-attention at a time, media embeddings by the words of the language model.
"""

import functools

import jax
import numpy as np
from flax import nnx

from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.config import EVLMConfig
from evlm_jax.models import param_names, xattn

ROWS = 8192  # of the word embeddings, in float64 at a time


def cross_attention_tensors(cfg: EVLMConfig) -> dict[str, Tensor]:
    """What a run's cross-attention begins with, by train.seed and canonical name, made a layer at a
    time.
    """

    def block(number):
        each = xattn.layer_rngs(cfg, nnx.Rngs(cfg.train.seed))
        rngs = jax.tree.map(lambda keys: keys[number], each)
        return {
            param_names.tail(path): leaf[...]
            for path, leaf in nnx.to_flat_state(nnx.state(xattn.Block(cfg, rngs)))
        }

    make = functools.lru_cache(maxsize=1)(jax.jit(block))
    shapes = jax.eval_shape(block, 0)
    return {
        f"xattn/{layer}/{name}": Tensor(
            about.shape,
            np.dtype(about.dtype),
            lambda number=number, name=name: np.asarray(make(number)[name]),
        )
        for number, layer in enumerate(cfg.cross_layers)
        for name, about in shapes.items()
    }


def media_embedding(cfg: EVLMConfig, words: np.ndarray) -> np.ndarray:
    """float32 [media tokens, D]: the mean of what layers read of the words [vocab, D] plus noise at
    their scale.
    """
    mean, square = np.zeros((2, words.shape[1]))
    for first in range(0, len(words), ROWS):
        block = words[first : first + ROWS].astype(np.float64)
        mean += block.sum(0) / len(words)
        square += (block**2).sum(0) / len(words)
    noise = np.random.default_rng(cfg.train.seed).standard_normal(
        (cfg.media.tokens, words.shape[1])
    )
    media = (mean + np.sqrt(square - mean**2) * noise) * cfg.llm.scales.embedding
    return media.astype(np.float32)
