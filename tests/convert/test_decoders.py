"""Decoder families against transformers: random weights, legal values that are unusual; there, by
the cache, and back.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import read_all
from evlm_jax.checkpoint.safetensors_file import read_folder, write_folder
from evlm_jax.convert import engine
from evlm_jax.convert.export import in_names_of
from evlm_jax.convert.readers import open_source
from evlm_jax.convert.stock import stock_config
from tests.helpers.parity import answer_logits, load, relative, text_logits
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 99,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 53,
    "pad_token_id": 0,
}
PROMPT, TOKENS = 23, 63  # 40 of them by the cache
CASES = {  # "model type, what is unusual": fields of its config
    "qwen3": {"head_dim": 10, "rope_theta": 1e6},
    "qwen3, one key head, tied": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}
OFTEN = ("qwen3",)  # the others are slow


def written(folder: Path, case: str, seed: int):
    """transformers' model of a case in `folder`; all its weights are random."""
    torch.manual_seed(seed)
    name = case.partition(",")[0]
    config = transformers.AutoConfig.for_model(name, **SIZES | CASES[case])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()


@pytest.mark.parametrize(
    "case, seed",
    [
        pytest.param(case, seed, marks=() if case in OFTEN and not seed else pytest.mark.slow)
        for case in CASES
        for seed in (0, 1)
    ],
)
def test_a_family_there_and_back(tmp_path, case, seed):
    theirs = written(tmp_path / "in", case, seed)
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], TOKENS)
    reference = logits(theirs, tokens)
    cfg = tiny_config(llm=engine.describe(str(tmp_path / "in")), xattn={"every": 0})
    model = load(cfg, str(tmp_path / "in"), "llm")
    assert relative(text_logits(cfg, model, tokens), reference) <= 1e-5
    cached = answer_logits(model, [tokens[:PROMPT], tokens[:5]], np.stack([tokens[PROMPT:]] * 2))
    assert relative(cached[0], reference[PROMPT - 1 :]) <= 1e-5
    other = logits(theirs, np.concatenate([tokens[:5], tokens[PROMPT:]]))[4:]
    assert relative(cached[1], other) <= 1e-5
    exported(tmp_path / "out", cfg, engine.open_tower(cfg, open_source(tmp_path / "in"), "llm"))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    np.testing.assert_array_equal(logits(again.eval(), tokens), reference)
    assert engine.describe(str(tmp_path / "out")) == engine.describe(str(tmp_path / "in"))
    before, after = (read_all(read_folder(tmp_path / side)) for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def exported(folder: Path, cfg, tower) -> None:
    """As `--format llm` writes it, without a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stock_config(cfg.llm)))
    write_folder(folder, in_names_of("llama", tower.tensors, cfg))
