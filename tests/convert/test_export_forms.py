"""The other forms of an export: loaded by the software that they are for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.checkpoint import store
from evlm_jax.convert import export, importer
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.models import xattn
from evlm_jax.models.param_names import flatten, unflatten
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from evlm_jax.runs import save_model
from tests.helpers.checkpoints import run_directory
from tests.helpers.parity import needs_transformers, open_flamingo_helpers, relative, text_logits
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config


@needs_transformers
@pytest.mark.parametrize(
    "llm",
    [{}, {"qkv_bias": True, "tied": False, "kv_heads": 4}],
    ids=["LlamaForCausalLM", "Qwen2ForCausalLM"],
)
def test_llm_is_a_stock_model(tmp_path, llm, request):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = tiny_config(llm=llm)
    model = random_model(cfg, seed=0)
    run_directory(tmp_path / "run", cfg, model)
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), "llm")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ in request.node.name and not hasattr(theirs.config, "auto_map")
    tokens = np.random.default_rng(0).integers(0, cfg.llm.vocab, 40)
    model.xattn.attn_gate.scalar[...], model.xattn.ffn_gate.scalar[...] = (
        0 * model.xattn.attn_gate.scalar[...],
        0 * model.xattn.ffn_gate.scalar[...],
    )
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    assert relative(text_logits(cfg, model, tokens), reference) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("What is this?")["input_ids"]) == "What is this?"


@needs_transformers
def test_openflamingo(tmp_path):
    import torch

    hidden, visual, words, images, tokens = 64, 32, 12, 3, 5
    cfg = tiny_config(
        xattn={"heads": 8, "kv_heads": 8, "head_dim": 64, "ffn": 4 * hidden, "sinks": 0, "every": 2}
    )
    model = random_model(cfg, seed=0)
    run_directory(tmp_path / "run", cfg, model)
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), "openflamingo")
    state = torch.load(tmp_path / "out/openflamingo.pt", weights_only=True)
    assert torch.equal(
        state.pop("media_tokens"), torch.tensor(np.asarray(model.media.embedding[...]))
    )
    prefix = "lang_encoder.model.layers.2.gated_cross_attn_layer."
    block = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    norm = [block.pop(f"attn.norm_media.{part}") for part in ("weight", "bias")]
    theirs = open_flamingo_helpers().GatedCrossAttentionBlock(dim=hidden, dim_visual=visual)
    theirs.load_state_dict(block)  # strict
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, words, hidden)).astype(np.float32)
    tap = rng.standard_normal((1, images, tokens, visual)).astype(np.float32)
    marks = np.zeros((1, words), bool)
    marks[0, [2, 5, 9]] = True
    with torch.no_grad():
        media = torch.nn.functional.layer_norm(
            torch.tensor(tap), (visual,), *norm, eps=cfg.xattn.eps
        )
        expected = theirs(torch.tensor(x), media, media_locations=torch.tensor(marks)).numpy()
    ours: xattn.Block = jax.tree.map(lambda a: a[1], model.xattn)
    stop = marks[0].cumsum().astype(np.int32)
    grouping = AttentionPlan(
        **{
            name: jnp.array(p)[None]
            for name, p in attention_plan(
                np.maximum(stop - 1, 0), stop, cfg.xattn.query_block, 12
            ).items()
        }
    )
    with jax.default_matmul_precision("highest"):
        keys, values = ours.keys_values(jnp.array(tap))
        got, *_ = ours(
            jnp.array(x), lambda q: (grouped_attention(q, keys, values, grouping, 0), None)
        )
    assert relative(np.asarray(got), expected) <= 1e-5


def test_openflamingo_has_no_shared_keys(tmp_path):
    cfg = tiny_config(xattn={"kv_heads": 1})
    run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0))
    with pytest.raises(
        ValueError,
        match=(
            "keys for every head, not xattn.kv_heads = 1 of xattn.heads = 2: use --format hf or"
            " torch"
        ),
    ):
        export.export(str(tmp_path / "run"), str(tmp_path / "out"), "openflamingo")


def test_openflamingo_has_no_place_for_trained_towers(tmp_path):
    cfg = tiny_config()
    cfg = run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0))
    params, tokenizer = store.load_params(tmp_path / "run")[0], load_tokenizer(cfg.init.llm)
    save_model(cfg, params, tokenizer, str(tmp_path / "all"))
    towers = sum(name.startswith(("vit/", "llm/")) for name in params)
    with pytest.raises(ValueError, match=rf"of the towers \({towers} parameters, as llm/embed"):
        export.export(str(tmp_path / "all"), str(tmp_path / "out"), "openflamingo")
    assert not list(tmp_path.glob("out*"))


PLAIN = """
import sys
# as if they were not installed
sys.modules |= dict.fromkeys(
    ("jax", "flax", "evlm_jax", "transformers", "torchvision", "einops")
)
import json, torch
from out.plain_evlm import EVLM  # the directory is a package
model = EVLM(json.load(open("out/config.json"))).eval()
model.load_state_dict(torch.load("out/evlm.pt", weights_only=True, mmap=True))
with torch.no_grad():
    torch.save(model(torch.arange(40)[None] % 250), "out/logits.pt")
"""


@pytest.mark.ci
@needs_transformers
def test_torch_needs_torch_alone(tmp_path):
    import torch

    cfg = tiny_config()
    model = random_model(cfg, seed=0)
    run_directory(tmp_path / "run", cfg, model, frozen_dtype="bfloat16")
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), "torch")
    state = torch.load(tmp_path / "out/evlm.pt", weights_only=True)
    held = store.open_params(str(tmp_path / "run"))[0]
    assert len(state) == len(held)
    assert state["llm.layers.1.mlp.up.weight"].dtype == torch.bfloat16
    up = held["llm/layers/1/mlp/up/kernel"].read().T
    assert state["llm.layers.1.mlp.up.weight"].view(torch.int16).numpy().tobytes() == up.tobytes()
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        env=os.environ | {"PYTHONPATH": ""},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rounded = {
        name: np.asarray(array).astype(held[name].dtype).astype(np.float32)
        for name, array in flatten(cfg, nnx.state(model)).items()
    }
    graphdef, shapes = nnx.split(model)
    ours = text_logits(
        cfg, nnx.merge(graphdef, unflatten(cfg, rounded, shapes)), np.arange(40) % 250
    )
    assert relative(torch.load(tmp_path / "out/logits.pt")[0].numpy(), ours) <= 1e-4


def test_what_files_of_an_export_say_twice_must_agree(tmp_path):
    """Where one was edited, transformers and this package would compute with different values."""
    cfg = tiny_config()
    cfg = run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0))
    export.export(str(tmp_path / "run"), out := str(tmp_path / "out"), "hf")
    for name, changes in (
        ("processor_config", {"mean": [0.5] * 3}),
        ("processor_config", {"image_size": 16}),
        ("processor_config", {"text_start": [254]}),
        ("config", {"image_token_id": 3}),
        ("generation_config", {"eos_token_id": 254}),
        ("generation_config", {"suppress_tokens": [7]}),
    ):
        file = Path(out) / f"{name}.json"
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(ValueError, match=f"{name}.json has {next(iter(changes))} .*, not "):
            importer.read_export(cfg, out)
        file.write_text(text)
    importer.read_export(cfg, out)
