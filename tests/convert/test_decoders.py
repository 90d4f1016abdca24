"""Decoder families against transformers: random weights, legal values that are unusual; there, by
the cache, and back.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import read_all
from evlm_jax.checkpoint.safetensors_file import read_folder, write_folder
from evlm_jax.convert import engine
from evlm_jax.convert.describe_decoder import describe_decoder
from evlm_jax.convert.export import in_names_of
from evlm_jax.convert.families import GGUF, KINDS
from evlm_jax.convert.readers import open_source
from evlm_jax.convert.stock import stock_config
from tests.helpers.checkpoints import family
from tests.helpers.foreign_files import finish
from tests.helpers.parity import answer_logits, load, relative, text_logits
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 99,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 53,
    "pad_token_id": 0,
}
PROMPT, TOKENS = 23, 63  # 40 of them by the cache
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 5.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e3,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 3.0}
SLIDING, FULL = "sliding_attention", "full_attention"
CASES = {  # "model type, what is unusual": fields of its config
    "llama, llama3": {"rope_parameters": LLAMA3, "head_dim": 10},
    "llama, yarn, tied": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "llama, yarn, not truncated": {
        "rope_parameters": YARN | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 1.1}
    },
    "llama, linear, gelu": {
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        "hidden_act": "gelu",
    },
    "llama, dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    "gemma3_text, dynamic": {
        "head_dim": 10,
        "sliding_window": 8,
        "layer_types": [SLIDING, FULL, FULL],
        "max_position_embeddings": 30,  # within the answer
        "rope_parameters": {
            FULL: DYNAMIC,
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "mistral": {"sliding_window": 11, "head_dim": 10},
    "mistral, wider than the prompt": {"sliding_window": 30, "num_key_value_heads": 1},
    "ministral, some layers": {
        "head_dim": 10,
        "sliding_window": 9,
        "layer_types": [FULL, SLIDING, SLIDING],
    },
    "ministral3": {
        "head_dim": 10,
        "num_key_value_heads": 1,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3},
    },
    "ministral3, windows": {
        "sliding_window": 9,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "mscale": 0.7, "mscale_all_dim": 1},
    },
    "qwen2, upper layers slide": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "rope_parameters": YARN,
    },
    "qwen3": {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3, one key head, tied": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "smollm3, windows": {
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 12,
        "rope_parameters": YARN,
    },
    "olmo2": {"num_key_value_heads": 1, "rope_parameters": LLAMA3},
    "olmo3": {
        "sliding_window": 10,
        "layer_types": [SLIDING, SLIDING, FULL],
        "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 1e3}},
    },
    "gemma": {"head_dim": 10, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 10, "sliding_window": 13, "query_pre_attn_scalar": 17},
    "gemma2, no caps, not tied": {
        "head_dim": 6,
        "layer_types": [FULL] * 3,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "head_dim": 10,
        "sliding_window": 8,
        "layer_types": [SLIDING, SLIDING, FULL],
        "query_pre_attn_scalar": 20,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3_text, one key head": {
        "head_dim": 16,
        "num_key_value_heads": 1,
        "sliding_window": 70,
        "final_logit_softcapping": 5.0,
    },
    "granite": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
    },
    "phi3": {
        "sliding_window": 14,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.8,
        },
    },
    "phi3, one key head": {  # all of a head turning it would be a Llama
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.6,
        },
    },
}
# The others, which compute nothing of their own, are slow.
OFTEN = {"llama, llama3": (), "gemma3_text": ()}
OFTEN |= dict.fromkeys(("llama, dynamic", "mistral", "ministral3"), pytest.mark.ci)


def written(folder: Path, case: str, seed: int):
    """transformers' model of a case in `folder`; all its weights are random."""
    torch.manual_seed(seed)
    name = case.partition(",")[0]
    config = transformers.AutoConfig.for_model(name, **SIZES | copy.deepcopy(CASES[case]))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()


def logits_by_cache(model, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """[1 + n, vocab] behind a prompt and each token of an answer, read one at a time."""
    logits(model, prompt[:3])  # dynamic positions keep the base of the longest text before a short
    held, found = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for tokens in (prompt, *answer[:, None]):
            out = model(torch.tensor(tokens)[None], past_key_values=held, use_cache=True)
            found.append(out.logits[0, -1].numpy())
    return np.stack(found)


@pytest.mark.parametrize(
    "case, seed",
    [
        pytest.param(
            case, seed, marks=pytest.mark.slow if seed else OFTEN.get(case, pytest.mark.slow)
        )
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
    for length, ours in ((PROMPT, cached[0]), (5, cached[1])):
        answer = logits_by_cache(theirs, tokens[:length], tokens[PROMPT:])
        assert relative(ours, answer) <= 1e-5
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


@pytest.mark.parametrize("length", [12, 40])
def test_dynamic_positions_of_exported_code(length):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from evlm_jax.convert.torch_model.plain_evlm import EVLMParts

    config = transformers.LlamaConfig(**SIZES | CASES["llama, dynamic"])
    llm = describe_decoder(Path(), config.to_dict())
    model = SimpleNamespace(
        config=SimpleNamespace(llm=llm), training=False, _window=dict.fromkeys(range(3), 0).get
    )
    mask = torch.nn.functional.pad(torch.ones(2, length, dtype=torch.long), (4, 0))
    cos, sin, _ = next(EVLMParts._rope(model, mask, length, llm["rope_theta"]))
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = theirs[0].shape[-1] // 2
    for one, other in zip((cos, sin), theirs, strict=True):
        np.testing.assert_allclose(one[1, 0], other[0, :, :half], atol=1e-5)


def exported(folder: Path, cfg, tower) -> None:
    """As `--format llm` writes it, without a tokenizer."""
    folder.mkdir()
    config = stock_config(cfg.llm)
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    write_folder(folder, in_names_of(KINDS[config["model_type"]].family, tower.tensors, cfg))


KEYS = {  # of GGUF: fields of our config
    "embedding_length": "hidden",
    "block_count": "layers",
    "feed_forward_length": "mlp",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab",
}
OF_GGUF = {
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 128},  # as transformers reads every file
    "gemma3_text": {"head_dim": 256, "num_hidden_layers": 7, "sliding_window": 9},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_GGUF)
def test_gguf_is_read_as_transformers_reads_it(tmp_path, case, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setitem(CASES, case, OF_GGUF[case])
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], TOKENS)
    reference = logits(written(tmp_path / "in", case, 0), tokens)
    cfg = tiny_config(llm=engine.describe(str(tmp_path / "in")), xattn={"every": 0})
    tower = engine.open_tower(cfg, open_source(tmp_path / "in"), "llm")
    arch = case.removesuffix("_text")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    for key, ours in KEYS.items():
        writer.add_uint32(f"{arch}.{key}", getattr(cfg.llm, ours))
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", cfg.llm.eps)
    writer.add_float32(f"{arch}.rope.freq_base", cfg.llm.rope_theta)
    if any(cfg.llm.window):
        writer.add_uint32(f"{arch}.attention.sliding_window", max(cfg.llm.window))
    made = engine.to_foreign(family(GGUF[arch]), tower.tensors, engine.sizes(cfg, "llm"))
    for name, array in read_all(made).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    finish(writer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype="float32", attn_implementation="eager"
    )
    assert relative(logits(theirs.eval(), tokens), reference) <= 1e-5
    assert engine.describe(str(tmp_path / "m.gguf")) == engine.describe(str(tmp_path / "in"))
    model = load(cfg, str(tmp_path / "m.gguf"), "llm")
    assert relative(text_logits(cfg, model, tokens), reference) <= 1e-5
