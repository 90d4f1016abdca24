"""Adapters in PEFT's format: PEFT loads ours on what we export, we load PEFT's, and what we would
not compute is refused by name.
"""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax import cli
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from evlm_jax.convert.export import export, family_of
from evlm_jax.convert.peft import export_adapters, patterns_of, read_config
from evlm_jax.models.lora import is_adapter
from evlm_jax.models.param_names import unflatten
from tests.helpers.checkpoints import run_directory
from tests.helpers.parity import needs_transformers, relative, text_logits
from tests.helpers.random_model import random_model, shapes
from tests.helpers.tiny import tiny_config

LLM = r"^llm/layers/\d+/(attn/[qo]|mlp/down)/"
CFG = tiny_config(  # a language model alone, so that its logits are the model's
    xattn={"every": 0}, lora={"patterns": (LLM,), "rank": 3, "alpha": 6.0}
)


def convert(*words):
    assert not cli.main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with the run, the run without adapters, base and adapter; the run's model, whose
    adapters are not 0).
    """
    folder, model = tmp_path_factory.mktemp("peft"), random_model(CFG, 0)
    run_directory(folder / "run", CFG, model)
    out = ("export", "--checkpoint", folder / "run")
    convert(*out, "--format", "llm", "--without-adapters", "--out", folder / "base")
    convert(*out, "--format", "peft-llm", "--out", folder / "adapter")
    graphdef, state = shapes(CFG.merged)
    params = store.load_params(folder / "run")[0]
    plain = {name: array for name, array in params.items() if not is_adapter(name)}
    plain = jax.tree.map(jnp.asarray, unflatten(CFG.merged, plain, state))
    run_directory(folder / "bare", CFG.merged, nnx.merge(graphdef, plain))
    return folder, model


def test_the_files_are_as_peft_writes_them(made):
    folder, _ = made
    said = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 3, 6.0)
    assert said["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    found = read_safetensors(folder / "adapter/adapter_model.safetensors")
    at = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    assert found.keys() == {
        at.format(i, m, side) for i in range(4) for m in modules for side in "AB"
    }
    params = store.load_params(folder / "run")[0]
    mine = found[at.format(2, "mlp.down_proj", "A")].read()
    np.testing.assert_array_equal(mine, params["llm/layers/2/mlp/down/lora_a"].T)


@needs_transformers
def test_peft_loads_ours_and_we_load_peft_s(made, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    from transformers import AutoModelForCausalLM

    folder, model = made
    tokens = np.random.default_rng(0).integers(0, CFG.llm.vocab, 40)

    def logits(module):
        with torch.no_grad():
            return module.eval()(torch.tensor(tokens)[None]).logits[0].numpy()

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    alone = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter")
    ours = text_logits(CFG, model, tokens)
    assert relative(ours, logits(theirs)) <= 1e-5 < relative(alone, logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt = ("adapt", "--checkpoint", folder / "bare", "--adapter")
    convert(*adapt, tmp_path / "theirs", "--out", tmp_path / "back")
    params, (back, cfg) = (
        store.load_params(folder / "run")[0],
        store.load_params(tmp_path / "back"),
    )
    assert back.keys() == params.keys() and (cfg.lora.rank, cfg.lora.alpha) == (3, 6.0)
    assert all(back[name].tobytes() == params[name].tobytes() for name in params)
    # One that PEFT made itself, by its other scale, on other modules.
    own = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj", "up_proj"])
    fresh = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), own)
    torch.manual_seed(0)
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    fresh.save_pretrained(tmp_path / "own")
    convert(*adapt, tmp_path / "own", "--out", tmp_path / "adapted")
    found, cfg = store.load_params(tmp_path / "adapted")
    graphdef, state = shapes(cfg)
    adapted = nnx.merge(graphdef, jax.tree.map(jnp.asarray, unflatten(cfg, found, state)))
    assert relative(text_logits(cfg, adapted, tokens), logits(fresh)) <= 1e-5


@needs_transformers
def test_peft_merges_adapters_of_all_parts_into_what_we_merge(tmp_path):
    """Of the whole model: ViT, language model, cross-attention."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    from transformers import AutoModelForImageTextToText

    patterns = (LLM, "^xattn/.*/(k|ffn/fc2)/", "^vit/blocks/[01]/mlp/")
    cfg = tiny_config(lora={"patterns": patterns, "rank": 2, "alpha": 6.0})
    run_directory(tmp_path / "run", cfg, random_model(cfg, 0))
    out = ("export", "--checkpoint", tmp_path / "run", "--format")
    convert(*out, "hf", "--without-adapters", "--out", tmp_path / "base")
    convert(*out, "hf", "--out", tmp_path / "merged")
    convert(*out, "peft", "--out", tmp_path / "adapter")
    base, ours = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / form, trust_remote_code=True)
        for form in ("base", "merged")
    )
    before = {name: array.clone() for name, array in base.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        torch.testing.assert_close(theirs[name], array, rtol=0, atol=1e-5)
    assert sum(not torch.equal(before[name], ours[name]) for name in ours) == 24
    with pytest.raises(ValueError, match="hold no towers, and llm/layers/0/attn/o/lora_a changes"):
        export(str(tmp_path / "run"), str(tmp_path / "flamingo"), "openflamingo")


# ---------------------------------------------------------------------------------------- refusals


PLAIN = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "field, value",
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [3]),
        ("a_field_of_tomorrow", 0.5),
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("lora_alpha", "6"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, field, value):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | {field: value}))
    with pytest.raises(ValueError, match=rf"adapter_config.json.*\b{field}\b"):
        read_config(path)


def test_what_says_nothing_is_read(tmp_path):
    path = tmp_path / "adapter_config.json"
    nothing = {"use_dora": False, "modules_to_save": None, "rank_pattern": {}, "of_tomorrow": None}
    path.write_text(json.dumps(PLAIN | nothing | {"lora_dropout": 0.1, "use_rslora": True}))
    found = read_config(path)
    assert found.rank == 3 and np.isclose(found.alpha / found.rank, 6 / 3**0.5)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda name, array: (name.replace("q_proj", "x_proj"), array), "x_proj.lora_A.weight"),
        (lambda name, array: (name.replace("lora_A", "lora_magnitude"), array), "lora_magnitude"),
        (lambda name, array: (name, array[:2] if "lora_A" in name else array), r"\(64, 2\)"),
        (lambda name, array: None if "3.self" in name else (name, array), "not llm/layers/3/attn"),
        (lambda name, array: None if "lora_B" in name else (name, array), "nothing fills .*lora_b"),
        (lambda name, array: None, "holds no tensors"),
        (lambda name, array: (name, array.astype(np.uint8)), "lora_a is uint8; weights are"),
    ],
)
def test_tensors_without_a_place_are_refused_by_name(made, tmp_path, change, error, capsys):
    folder, _ = made
    shutil.copytree(folder / "adapter", tmp_path / "bad")
    tensors = read_safetensors(folder / "adapter/adapter_model.safetensors")
    changed = filter(None, (change(name, tensor.read()) for name, tensor in tensors.items()))
    tensors = {name: Tensor.of(array) for name, array in changed}
    write_safetensors(tmp_path / "bad/adapter_model.safetensors", tensors)
    words = ["--checkpoint", folder / "bare", "--adapter", tmp_path / "bad", "--out"]
    assert cli.main(["convert", "adapt", *map(str, words), str(tmp_path / "out")]) == 1
    assert re.search(error, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_fused_matrix_has_no_adapter_of_its_own(tmp_path):
    """Phi-3 keeps queries, keys and values in one."""
    tensors = {
        name: Tensor.of(np.zeros((2, 2), np.float32))
        for name in ("llm/layers/0/attn/q/lora_a", "llm/layers/0/attn/q/lora_b")
    }
    with pytest.raises(ValueError, match="phi3 has no module of its own for llm/layers/0/attn/q,"):
        export_adapters(tmp_path, tensors, CFG, family_of("phi3"))


def test_patterns_choose_what_they_were_made_of():
    kernels = [f"vit/blocks/{i}/attn/{x}/kernel" for i in range(12) for x in "qk"]
    kernels += ["bridge/proj/kernel"]
    some = [name.replace("/kernel", "/lora_a") for name in kernels if "/1" in name and "q" in name]
    every = [f"vit/blocks/{i}/attn/k/lora_b" for i in range(12)]
    assert patterns_of([*some, *every, "bridge/proj/lora_a"], kernels) == (
        "^bridge/proj/kernel$",
        r"^vit/blocks/\d+/attn/k/kernel$",
        "^vit/blocks/(1|10|11)/attn/q/kernel$",
    )


def test_a_run_without_adapters_has_none_to_export(made, tmp_path):
    source, out = str(made[0] / "bare"), str(tmp_path / "out")
    with pytest.raises(ValueError, match="the checkpoint has no adapters"):
        export(source, out, "peft-llm")
    with pytest.raises(ValueError, match="leave out --without-adapters"):
        export(source, out, "peft-llm", adapters=False)
