"""Qwen 1.0 beyond its context: caches, and the PyTorch model with its cache, against a decoder in

pytestmark = pytest.mark.ci
NumPy written from the formulas.

A context of 16 tokens stands for Qwen's 2048.
"""

import math
from functools import cache

import numpy as np
import pytest
from flax import nnx

from evlm_jax.convert import export
from evlm_jax.models.param_names import flatten
from tests.helpers.checkpoints import run_directory
from tests.helpers.parity import answer_logits, needs_transformers, relative, text_logits
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

CONTEXT = 16
QWEN = {"qkv_bias": True, "tied": False, "kv_heads": 4}
LENGTHS = np.array(
    [5, 10, 15, 16, 17, 32, 33, 64, 65]
)  # of the prompts of a batch: around the context, its double and its fourfold
STEPS = 20


def made(**fields):
    """(model without images: gates 0; its parameters by canonical name)."""
    cfg = tiny_config(llm=QWEN | fields)
    model = random_model(cfg, seed=0)
    for gate in model.xattn.gates().values():
        gate.close()
    return model, {
        name: np.asarray(array) for name, array in flatten(cfg, nnx.state(model)).items()
    }


def oracle(cfg, params, tokens, length, dynamic_ntk, logn):
    """Logits [T, vocab] in float64 of a text whose first `length` tokens are the prompt."""

    def get(name):
        return params[f"llm/{name}"].astype(np.float64)

    def linear(x, name):
        return x @ get(f"{name}/kernel") + (
            get(f"{name}/bias") if f"llm/{name}/bias" in params else 0
        )

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.eps) * get(f"{name}/scale")

    half = cfg.head_dim // 2
    alpha = max(2 ** math.ceil(math.log2(length / CONTEXT) + 1) - 1, 1) if dynamic_ntk else 1
    base = cfg.rope_theta * alpha ** (cfg.head_dim / (cfg.head_dim - 2))
    frequencies = np.array([base ** (-2 * i / cfg.head_dim) for i in range(half)])

    def rotated(x):  # [T, N, H]: the pair (i, i + H/2) as a complex number
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
            1j * np.arange(len(x))[:, None, None] * frequencies
        )
        return np.concatenate([turned.real, turned.imag], -1)

    x = get("embed")[tokens]
    for i in range(cfg.layers):
        y = norm(x, f"layers/{i}/ln1")
        q, k, v = (
            linear(y, f"layers/{i}/attn/{name}").reshape(len(x), cfg.heads, cfg.head_dim)
            for name in "qkv"
        )
        q, k, out = rotated(q), rotated(k), np.zeros_like(q)
        for t in range(len(x)):
            keys = max(length, t + 1)  # of the pass that reads token t
            factor = max(1, math.log(t + 1, CONTEXT)) if logn and keys > CONTEXT else 1
            for n in range(cfg.heads):
                weights = np.exp(k[: t + 1, n] @ q[t, n] * factor / math.sqrt(cfg.head_dim))
                out[t, n] = weights @ v[: t + 1, n] / weights.sum()
        x = x + linear(out.reshape(len(x), -1), f"layers/{i}/attn/o")
        y = norm(x, f"layers/{i}/ln2")
        gate, up = linear(y, f"layers/{i}/mlp/gate"), linear(y, f"layers/{i}/mlp/up")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"layers/{i}/mlp/down")
    return norm(x, "ln_f") @ get("head/kernel")


@cache
def texts():
    """(prompts of LENGTHS, tokens that follow [B, STEPS])."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 250, n) for n in LENGTHS], rng.integers(
        0, 250, (len(LENGTHS), STEPS)
    ).astype(np.int32)


def wanted(cfg, params, dynamic_ntk, logn):
    """Of the oracle, [B, 1 + STEPS, vocab]."""
    rows = [(len(prompt), np.concatenate([prompt, answer])) for prompt, answer in zip(*texts())]
    return np.stack(
        [oracle(cfg, params, tokens, n, dynamic_ntk, logn)[n - 1 :] for n, tokens in rows]
    )


@pytest.mark.parametrize("dynamic_ntk, logn", [(True, True), (True, False), (False, True)])
def test_caches_equal_numpy(dynamic_ntk, logn):
    """An answer that grows beyond the context keeps its prompt's base, and is sharpened from there
    on.
    """
    model, params = made(dynamic_ntk=CONTEXT * dynamic_ntk, logn=CONTEXT * logn)
    reference = wanted(model.cfg.llm, params, dynamic_ntk, logn)
    assert relative(answer_logits(model, *texts()), reference) <= 1e-5
    changed = np.abs(reference - wanted(model.cfg.llm, params, False, False)).max(-1) > 1e-3
    grown = LENGTHS[:, None] + np.arange(STEPS + 1)
    assert (
        changed == (dynamic_ntk & (LENGTHS > CONTEXT)[:, None] | logn & (grown > CONTEXT))
    ).all()


@needs_transformers
def test_exported_model_equals_numpy(tmp_path):
    """Prompts padded on the left, tokens one at a time by its cache; in training it has neither, as
    ours.
    """
    import torch

    from evlm_jax.convert.torch_model.modeling_evlm import EVLMForCausalLM

    model, params = made(dynamic_ntk=CONTEXT, logn=CONTEXT)
    run_directory(tmp_path / "run", model.cfg, model)
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), "hf")
    theirs = EVLMForCausalLM.from_pretrained(tmp_path / "out")
    prompts, answers = texts()
    padding = LENGTHS.max() - LENGTHS
    ids = torch.tensor(np.stack([np.pad(prompt, (n, 0)) for prompt, n in zip(prompts, padding)]))
    mask = torch.tensor(np.arange(LENGTHS.max()) >= padding[:, None]).long()
    with torch.no_grad():
        out = theirs(ids, attention_mask=mask, use_cache=True)
        found = [out.logits[:, -1]]
        for token in torch.tensor(answers.T[..., None]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = theirs(
                token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits[:, -1])
    assert (
        relative(torch.stack(found, 1).numpy(), wanted(model.cfg.llm, params, True, True)) <= 1e-5
    )
    with torch.no_grad():
        trained = theirs.train()(torch.tensor(prompts[-1])[None]).logits[0].numpy()
    assert relative(trained, text_logits(model.cfg, model, prompts[-1])) <= 1e-5
