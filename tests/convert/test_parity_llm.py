"""Language models against transformers, float32, highest matmul precision."""

import json

import numpy as np
import pytest

from evlm_jax import assets
from evlm_jax.convert import engine
from evlm_jax.data.tokenizer import load_tokenizer
from tests.helpers.parity import (
    answer_logits,
    config_for,
    load,
    needs_asset,
    needs_transformers,
    relative,
    text_logits,
)

pytestmark = needs_transformers
SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm2():
    """(our config, our model, transformers' model) of the same GGUF file."""
    from transformers import AutoModelForCausalLM

    path = assets.path(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    ).eval()
    cfg = config_for(SMOLLM2, "llm")
    return cfg, load(cfg, SMOLLM2, "llm"), theirs


@pytest.mark.ci
@needs_asset(SMOLLM2)
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_smollm2_logits_on_real_tokens(smollm2, count):
    from pydoc_data.topics import topics

    import torch

    cfg, ours, theirs = smollm2
    tokens = np.array(
        load_tokenizer(SMOLLM2).encode(topics["assert"] + topics["with"] + topics["class"])[:count]
    )
    assert len(tokens) == count
    mine = text_logits(cfg, ours, tokens)
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    print(
        f"\nSmolLM2: max abs difference {np.abs(mine - reference).max():.2e} over {reference.size}"
        " logits"
    )
    assert np.abs(mine - reference).max() <= 1e-3
    assert (mine.argmax(-1) == reference.argmax(-1)).all()


@pytest.mark.ci
@needs_asset(SMOLLM2)
@pytest.mark.parametrize(
    "question",
    [
        "What is the capital of France?",
        *(
            pytest.param(question, marks=pytest.mark.slow)
            for question in ("Describe a cat in one sentence.", "Why is the sky blue?")
        ),
    ],
)
def test_smollm2_greedy_continuation(smollm2, question):
    """Their 40 greedy tokens, fed to our model in one pass, are our argmax at each step: so ours
    generates the same.
    """
    import torch

    cfg, ours, theirs = smollm2
    tokenizer = load_tokenizer(SMOLLM2)
    start, end, words = tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>"), tokenizer.encode
    prompt = [start, *words(f"user\n{question}"), end, *words("\n"), start, *words("assistant\n")]
    with torch.no_grad():
        never = cfg.llm.vocab  # goes on behind the end token, so that all 40 are compared
        options = {
            "max_new_tokens": 40,
            "do_sample": False,
            "eos_token_id": never,
            "pad_token_id": 0,
        }
        options |= {"return_dict_in_generate": True, "output_logits": True}
        generated = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options
        )
    continuation = generated.sequences[0, len(prompt) :].numpy()
    top = torch.stack(generated.logits)[:, 0].topk(2, -1).values
    clear = ((top[:, 0] - top[:, 1]) >= 1e-3).numpy()
    stop = len(clear) if clear.all() else int(clear.argmin())
    mine = text_logits(
        cfg, ours, np.pad([*prompt, *continuation], (0, 72))[:72]
    )  # one length: one compilation
    assert len(continuation) == 40 and stop >= 5
    assert (mine[len(prompt) - 1 :][:stop].argmax(-1) == continuation[:stop]).all()


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}


@pytest.mark.parametrize(
    "family, kv_heads, tied",
    [("Llama", 2, True), ("Llama", 4, False), ("Qwen2", 2, False), ("Qwen2", 1, True)],
)
def test_tiny_random_models_from_a_transformers_directory(tmp_path, family, kv_heads, tied):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=5e4
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    cfg = config_for(str(tmp_path), "llm")
    assert (cfg.llm.kv_heads, cfg.llm.tied, cfg.llm.qkv_bias, cfg.llm.rope_theta) == (
        kv_heads,
        tied,
        family == "Qwen2",
        5e4,
    )
    tokens = np.random.default_rng(0).integers(0, 99, 40)
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    assert relative(text_logits(cfg, load(cfg, str(tmp_path), "llm"), tokens), reference) <= 1e-5


def randomise(model, spread: float = 0.3) -> None:
    """Norm weights and biases away from their defaults, so that a forgotten one shows."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape))


def qwen1_directory(folder) -> tuple[dict, object]:
    """A tiny Qwen 1.0 checkpoint in `folder`: (its config.json, transformers' Qwen2 model of the
    same numbers).
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(1)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SIZES, num_key_value_heads=4, rms_norm_eps=1e-6, tie_word_embeddings=False
        )
    ).eval()
    randomise(theirs, 0.1)  # sharp attention over 2048 keys magnifies rounding
    state, renamed = theirs.state_dict(), {}
    for i in range(3):

        def layer(name, i=i):
            return state[f"model.layers.{i}.{name}"]

        def fused(kind, layer=layer):
            return torch.cat([layer(f"self_attn.{x}_proj.{kind}") for x in "qkv"])

        renamed |= {
            f"transformer.h.{i}.attn.c_attn.{kind}": fused(kind) for kind in ("weight", "bias")
        }
        names = {
            "ln_1": "input_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "ln_2": "post_attention_layernorm",
        }
        names |= {"mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
        renamed |= {
            f"transformer.h.{i}.{new}.weight": layer(f"{old}.weight").clone()
            for new, old in names.items()
        }
        renamed[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    renamed |= {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
    }
    save_file(renamed | {"lm_head.weight": state["lm_head.weight"]}, folder / "model.safetensors")
    config = SIZES | {
        "model_type": "qwen",
        "intermediate_size": 112,
        "kv_channels": 8,
        "rotary_emb_base": 10000,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "seq_length": 2048,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config, theirs


@pytest.mark.ci
def test_qwen1_equals_the_qwen2_model_of_the_same_numbers_up_to_2048_tokens(tmp_path):
    """Qwen 1.0's fused c_attn, and w2 as the gate; training and generation.

    Beyond 2048 tokens generation is another function.
    """
    import torch

    _, theirs = qwen1_directory(tmp_path)
    cfg = config_for(str(tmp_path), "llm")
    assert (cfg.llm.mlp, cfg.llm.dynamic_ntk, cfg.llm.logn) == (56, 2048, 2048)
    model, tokens = load(cfg, str(tmp_path), "llm"), np.random.default_rng(0).integers(0, 99, 2049)
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    assert relative(text_logits(cfg, model, tokens[:2048]), reference[:2048]) <= 1e-5
    assert relative(answer_logits(model, [tokens[:2048]])[0, 0], reference[2047]) <= 1e-5
    assert relative(answer_logits(model, [tokens])[0, 0], reference[2048]) > 1e-3


def test_qwen1_config_decides_what_happens_beyond_its_context(tmp_path):
    config, _ = qwen1_directory(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"use_dynamic_ntk": False, "seq_length": 4096})
    )
    assert {"dynamic_ntk": 0, "logn": 4096}.items() <= engine.describe(str(tmp_path)).items()
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "use_logn_attn"})
    )
    with pytest.raises(ValueError, match="config.json lacks use_logn_attn"):
        engine.describe(str(tmp_path))
