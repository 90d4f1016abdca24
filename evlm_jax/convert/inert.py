"""Tensors without a place in EVLM are dropped only after a look at their values: each of these says
what makes one say nothing.

Each takes the tensor, the embedding of the language model (read when called), and the fields that
the checkpoint fixes."""

import re
from collections.abc import Sequence

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Source
from evlm_jax.config import LLMConfig
from evlm_jax.config.schema import build
from evlm_jax.convert.naming import Family
from evlm_jax.models.rotary import frequencies


def _factors(array, embedding, facts) -> bool:
    """holds factors of the rotary frequencies that are neither 1 nor those of a Llama 3.1, 3.2 or
    3.3
    """
    llm = build(LLMConfig, facts, "llm")
    plain, scaled = (
        np.asarray(frequencies(llm, llm.rope_theta, scaled))
        for scaled in (False, llm.rope_scaling is not None)
    )
    return array.shape == plain.shape and np.allclose(array, plain / scaled, rtol=1e-4)


def _positions(array, embedding, facts) -> bool:
    """holds other position numbers than 0, 1, 2, ..."""
    return np.array_equal(array.reshape(-1), np.arange(array.size))


def _frequencies(array, embedding, facts) -> bool:
    """holds other rotary frequencies than those of rope_theta"""
    expected = facts["rope_theta"] ** -(np.arange(0, facts["head_dim"], 2) / facts["head_dim"])
    return array.size == expected.size and np.allclose(
        array.reshape(-1).astype(np.float64), expected, rtol=0.01, atol=1e-7
    )  # bfloat16


def _causal(array, embedding, facts) -> bool:
    """holds another mask than the causal one"""
    return array.ndim >= 2 and bool((array == np.tril(np.ones(array.shape[-2:]))).all())


def _masked(array, embedding, facts) -> bool:
    """holds another number than a large negative one"""
    return array.size == 1 and bool((array <= -1e4).all())


def _tied(array, embedding, facts) -> bool:
    """is another head than the embedding, and config.json says that they are one
    (tie_word_embeddings): set it to false to keep the head
    """
    return np.array_equal(array, embedding())


RULES = {
    "factors": _factors,
    "positions": _positions,
    "frequencies": _frequencies,
    "causal": _causal,
    "masked": _masked,
    "tied": _tied,
}


def check_dropped(
    source: Source, family: Family, prefix: str, dropped: Sequence[str], facts: dict
) -> None:
    """Reads the dropped tensors that may say something.

    Raises ValueError naming the first that does.
    """
    embedding = next(
        (f"{prefix}{row.foreign}" for row in family.rows if row.paths == ("llm/embed",)), ""
    )
    for name in dropped:
        rule = next(
            (
                rule
                for pattern, rule in family.drop.items()
                if re.fullmatch(pattern, name.removeprefix(prefix))
            ),
            "",
        )
        if rule and not RULES[rule](
            source.tensors[name].read(), lambda: source.tensors[embedding].read(), facts
        ):
            says = " ".join(RULES[rule].__doc__.split())  # a docstring may have several lines
            raise ValueError(f"{source.path}: {name} {says}")
