"""Sizes of batches: few programs for all prompts, and little padding for short ones."""

import jax
import numpy as np
import pytest

from evlm_jax.data.samples import Turn
from tests.data.made import refs
from tests.test_generate import PROMPTS, made


@pytest.mark.ci
def test_many_short_prompts_have_rows_without_much_padding(monkeypatch):
    """And answers as alone, where a prompt has one of the sizes that any call has."""
    _, generator = made()
    lengths, prefill = [], generator._prefill

    def spy(weights, prompt, *rest, **sizes):
        lengths.append(prompt.tokens.shape[1])
        return prefill(weights, prompt, *rest, **sizes)

    monkeypatch.setattr(generator, "_prefill", spy)
    documents = [generator.prompt([Turn("user", "no"[: i % 3])]) for i in range(9)]
    assert generator.generate(documents, 12)[0] == generator.generate(documents[:1], 12)[0]
    generator.generate([*documents, generator.prompt(*PROMPTS[4])], 12)
    assert (max(lengths[:2]), lengths[2], min(lengths[3:])) == (24, 64, 64)


@pytest.mark.ci
def test_a_hundred_prompts_need_eight_programs(caplog):
    """Up to 1,024 tokens and 6 images, prefill and decode together, by JAX's own log of what it
    compiles.
    """
    _, generator = made()
    rng, documents = np.random.default_rng(0), []
    for i in range(100):
        images, length = int(rng.integers(0, 7)), int(1024 ** rng.random()) if i else 1024
        visuals = refs(*[1] * images) if i % 2 else refs(images) if images else ()
        bare = len(generator.prompt([Turn("user", "<image>" * len(visuals))], visuals).tokens)
        documents.append(
            generator.prompt(
                [Turn("user", "<image>" * len(visuals) + "a" * max(1, length - bare))], visuals
            )
        )
    sizes = [(len(document.tokens), len(document.refs)) for document in documents]
    assert (
        min(sizes)[0] < 64
        and 1000 < max(sizes)[0] <= 1024
        and {images for _, images in sizes} == set(range(7))
    )
    jax.clear_caches()  # what other tests compiled
    with jax.log_compiles(), caplog.at_level("WARNING"):
        answers = generator.generate(documents, 3, stop=())
    compiled = [
        record.message for record in caplog.records if record.message.startswith("Compiling")
    ]
    programs = [line for line in compiled if "prefill" in line or "decode" in line]
    assert {len(answer.tokens) for answer in answers} == {3} and len(set(programs)) == len(programs)
    assert 2 <= len(programs) <= 8, programs
    assert len(compiled) <= 14, compiled  # and what reads images, and keys
