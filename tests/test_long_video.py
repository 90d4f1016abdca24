"""Long videos: read in chunks they are what one pass over everything makes of them, and an answer
takes no more memory with every token.
"""

import jax
import numpy as np
import pytest

from evlm_jax.data.samples import Turn
from tests.data.made import refs
from tests.test_generate import PROMPTS, cached_logits, full_forward, made

pytestmark = pytest.mark.ci


def test_a_thousand_frames_in_chunks_are_those_of_one_pass(monkeypatch):
    """Of the text, too, of which a part asks at a time."""
    model, generator = made()
    asked, features = [], generator.features

    def spy(some):
        asked.append(len(some))
        return features(some)

    monkeypatch.setattr(generator, "features", spy)
    document = generator.prompt([Turn("user", "<image>what?")], refs(1000))
    tokens = np.array([[65, 66, 67]], np.int32)
    found = cached_logits(generator, [document], tokens, rows=1)
    wanted = full_forward(model, document, tokens[0].tolist(), 2304, 1024, 8192)
    assert np.abs(found[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert asked == [64] * 15 + [40]


def test_the_state_grows_with_no_token_and_its_room_with_text_alone(monkeypatch):
    _, generator = made()
    cfg, document, bytes_ = generator.cfg, generator.prompt(*PROMPTS[3]), []
    decode = generator._decode

    def spy(weights, state, *rest):
        bytes_.append(sum(a.nbytes for a in jax.tree.leaves(state)))
        return decode(weights, state, *rest)

    monkeypatch.setattr(generator, "_decode", spy)
    held = {}
    for most in (64, 320):
        bytes_.clear()
        generator.generate([document], most, stop=())
        assert len(bytes_) == -(-most // 64) and len(set(bytes_)) == 1
        held[most] = bytes_[0]
    token = 2 * cfg.llm.layers * cfg.llm.kv_heads * cfg.llm.head_dim * 4
    assert held[320] - held[64] == 256 * token


def test_more_frames_than_a_prompt_may_have_are_refused():
    _, generator = made()
    document = generator.prompt([Turn("user", "<image>what?")], refs(1025))
    with pytest.raises(ValueError, match="1025 pictures and frames, 1024 are the most: show fewer"):
        generator.generate([document])
