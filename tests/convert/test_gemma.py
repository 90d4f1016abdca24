"""Gemma 3 270M, real weights, against transformers' reading of the same GGUF file: float32, highest
matmul precision, its BOS in front.
"""

import math
from pydoc_data.topics import topics

import numpy as np
import pytest

from evlm_jax import assets
from evlm_jax.config import from_config_dict
from evlm_jax.convert import engine
from evlm_jax.data.tokenizer import load_tokenizer
from experiments import demo
from tests.helpers.parity import (
    answer_logits,
    config_for,
    load,
    needs_asset,
    needs_transformers,
    relative,
    text_logits,
)
from tests.helpers.vocabularies import texts

GEMMA = "gemma3-270m"
CHINESE = "中国的首都是"
pytestmark = needs_asset(GEMMA)


def published(test):
    """Marks a test against transformers, which takes a minute to read the file."""
    return needs_transformers(pytest.mark.slow(test))


@pytest.fixture(scope="module")
def gemma():
    """(our config, our model, transformers' model) of the same GGUF file."""
    from transformers import AutoModelForCausalLM

    path = assets.path(GEMMA)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    ).eval()
    cfg = config_for(GEMMA, "llm")
    return cfg, load(cfg, GEMMA, "llm"), theirs


def test_the_demos_form_has_its_sizes():
    cfg = from_config_dict(demo.get_config("gemma"))
    assert config_for(GEMMA, "llm").llm == cfg.llm
    assert load_tokenizer(GEMMA).id(cfg.media.placeholder) == 6


@published
@pytest.mark.parametrize("text", ["The capital of France is", CHINESE, topics["with"]])
def test_logits_are_theirs(gemma, text):
    """Of the third text 700 tokens, of which five of six layers see 512."""
    import torch

    cfg, ours, theirs = gemma
    tokenizer = load_tokenizer(GEMMA)
    tokens = np.array([*tokenizer.bos, *tokenizer.encode(text)][:700])
    assert tokens[0] == 2 and (len(tokens) == 700) == (len(text) > 100)
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    found = relative(text_logits(cfg, ours, tokens), reference)
    print(f"\n{len(tokens)} tokens: {found:.2e} of the largest of {reference.size} logits")
    sizes = engine.parameter_shapes(cfg).items()
    ours_has = sum(math.prod(shape) for name, shape in sizes if name.startswith("llm/"))
    assert found <= 1e-5 and theirs.num_parameters() == ours_has == 268_098_176


@published
@pytest.mark.parametrize("text", ["The capital of France is", "A cat is", CHINESE, "红苹果是"])
def test_forty_greedy_tokens_are_theirs(gemma, text):
    """By our caches, along their answer: at each token ours chooses the same."""
    import torch

    _, ours, theirs = gemma
    tokenizer = load_tokenizer(GEMMA)
    prompt = [*tokenizer.bos, *tokenizer.encode(text)]
    with torch.no_grad():
        never = {"eos_token_id": 262144, "pad_token_id": 0}  # goes on behind the end token
        answer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, **never
        )[0, len(prompt) :].numpy()
    mine = answer_logits(ours, [np.array(prompt)], answer[None, :-1])[0].argmax(-1)
    print(f"\n{text!r} -> {tokenizer.decode(answer)!r}")
    assert len(answer) == 40 and mine.tolist() == answer.tolist()


@published
def test_without_its_bos_it_is_lost(gemma):
    """Which is why every document begins with it (`Tokenizer.bos`)."""
    cfg, ours, _ = gemma
    ids = load_tokenizer(GEMMA).encode(topics["assert"])[:200]

    def loss(front):
        tokens = np.array([*front, *ids])
        logits = text_logits(cfg, ours, tokens).astype(np.float64)[len(front) : -1]
        logits -= logits.max(-1, keepdims=True)
        picked = logits[np.arange(len(logits)), tokens[len(front) + 1 :]]
        return float((np.log(np.exp(logits).sum(-1)) - picked).mean())

    with_it, without = loss([2]), loss([])
    print(f"\nloss with BOS {with_it:.2f}, without {without:.2f}")
    assert without > with_it + 1


@published
def test_ids_are_theirs():
    """But of 32 spaces and more, which transformers joins by pairs (D-TOKEN-4)."""
    from transformers import AutoTokenizer

    path, ours = assets.path(GEMMA), load_tokenizer(GEMMA)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    given = [one for one in (*texts(1000), *topics.values()) if " " * 32 not in one]
    assert len(given) > 1050
    for one in given:
        expected = theirs(one, split_special_tokens=True).input_ids
        assert [*ours.bos, *ours.encode(one)] == expected, repr(one)
    assert engine.describe(GEMMA)["vocab"] == len(theirs) == ours.vocab_size
