"""`evlm convert import`: what it writes, goes on with after a kill, and refuses without leaving a
directory behind.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evlm_jax.checkpoint import lazy_tensors, safetensors_file
from evlm_jax.checkpoint import store as checkpoint
from evlm_jax.checkpoint.lazy_tensors import Tensor, read_all
from evlm_jax.checkpoint.safetensors_file import write_folder
from evlm_jax.cli import main
from evlm_jax.config import to_dict
from evlm_jax.convert import engine, export, importer
from evlm_jax.convert.families import GGUF
from evlm_jax.convert.readers import open_source
from evlm_jax.convert.tables import FAMILIES
from evlm_jax.launch import next_stage
from tests.helpers.checkpoints import (
    dinov2_directory,
    family,
    llama_directory,
    random_tensors,
    run_directory,
    tokenizer_directory,
)
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, tiny_config

CFG = tiny_config(
    vit={"image_size": 16, "taps": (1, 3)}
)  # positions are interpolated, block 4 is dropped
CHOICES = {  # of the tiny config, that a family needs
    "clip": {
        "vit": {
            "layer_scale": False,
            "patch_bias": False,
            "embed_norm": True,
            "activation": "quick_gelu",
        }
    },
    "siglip": {"vit": {"layer_scale": False, "class_token": False, "activation": "gelu_tanh"}},
    "eva02": {"vit": {"layer_scale": False, "norm": "res_post", "bias": "qv"}},
    "dinov2": {"vit": {"registers": 3}},
    "aimv2": {
        "vit": {
            **dict.fromkeys(("layer_scale", "class_token"), False),
            "bias": "none",
            "gated": True,
            "norm_kind": "rms",
            "patch_norm": True,
        }
    },
    "internvit": {"vit": {"bias": "out", "norm_kind": "rms", "qk_norm": "all"}},
    "dinov3": {"vit": {"registers": 3, "rotary": 100.0, "bias": "qv"}},
    "llama": {"llm": {"qkv_bias": True, "tied": False}},
    "olmo2": {"llm": {"qk_norm": "all", "norms": "post"}},
    "gemma2": {"llm": {"qk_norm": "head", "norms": "both+1"}},
    "gguf": {"llm": {"qk_norm": "head", "tied": False}},
    "qwen": {"llm": {"qkv_bias": True, "tied": False, "kv_heads": 4}},
    "openflamingo": BASELINES["flamingo"],
    "mllama": BASELINES["mllama"],
    "idefics": {
        "vit": {"layer_scale": False, "patch_bias": False, "embed_norm": True},
        "llm": {"tied": False},
        "xattn": {"norm_kind": "rms", "qk_norm": "head", "gated": True, "kv_norm": False},
        "bridge": {"kind": "flamingo", "qk_norm": "head"},
    },
}


@pytest.fixture
def towers(tmp_path):
    """The config, with towers on disk in bfloat16."""
    vision, llm = (
        dinov2_directory(tmp_path / "vision", CFG, "bfloat16"),
        llama_directory(tmp_path / "llm", CFG, "bfloat16"),
    )
    return replace(CFG, init=replace(CFG.init, vision=str(vision), llm=str(llm)))


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", [f.name for f in FAMILIES if f.name != "gemma3-gguf"]
)  # whose norms, w + 1, are rounded
def test_every_family_there_and_back(tmp_path, name, dtype):
    """Ours -> theirs on disk -> ours -> theirs, byte for byte."""
    found, cfg = family(name), tiny_config(**CHOICES.get(name, {}))
    before, sizes = random_tensors(cfg, found.tower, dtype), engine.sizes(cfg, found.tower)
    write_folder(tmp_path, engine.to_foreign(found, before, sizes))
    source = open_source(tmp_path)
    if name not in GGUF.values():  # which the header tells apart
        assert engine.recognise(source) == (found, "")
    steps, dropped = engine.conversion_plan(
        source, found, "", {name: tensor.shape for name, tensor in before.items()}, cfg
    )
    after = engine.to_canonical(source, steps, sizes)
    assert not dropped and same(read_all(before), read_all(after))
    assert same(read_all(source.tensors), read_all(engine.to_foreign(found, after, sizes)))


def test_towers_become_a_checkpoint(tmp_path, towers, capsys):
    importer.import_towers(towers, str(tmp_path / "out"))
    params, cfg = checkpoint.load_params(tmp_path / "out")
    assert cfg == towers and not checkpoint.trained(tmp_path / "out")
    assert {name: array.shape for name, array in params.items()} == engine.parameter_shapes(cfg)
    assert same(
        {n: a for n, a in params.items() if n.startswith(("vit/", "llm/"))}, engine.load_towers(cfg)
    )
    assert all(array == 0 for name, array in params.items() if name.endswith("gate"))
    said, meta = (
        capsys.readouterr().out,
        json.loads((tmp_path / "out/steps/0/meta/metadata").read_text()),
    )
    assert (
        meta["origin"]["vit"]["positions"] == "2x2 -> 4x4 by bicubic"
        and meta["origin"]["llm"]["positions"] == "as stored"
    )
    assert (
        "dropped on purpose: layernorm.weight" in said
        and "encoder.layer.3.norm1.weight" in meta["origin"]["vit"]["dropped"]
    )
    with pytest.raises(
        ValueError, match="imported or upcycled and is no run: give another workdir"
    ):
        checkpoint.Checkpoints(tmp_path / "out", keep=1).resume()


@pytest.mark.parametrize("copies", [0, 4], ids=["dense", "experts"])
def test_an_export_comes_back_bit_for_bit(tmp_path, copies):
    cfg = replace(CFG, moe=replace(CFG.moe, copies=copies))
    cfg = run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0), frozen_dtype="bfloat16")
    export.export(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    importer.import_model(cfg, str(tmp_path / "hf"), str(tmp_path / "back"))
    assert same(
        checkpoint.load_params(tmp_path / "back")[0], checkpoint.load_params(tmp_path / "run")[0]
    )
    params, trained = next_stage(
        cfg, str(tmp_path / "back")
    )  # of which no new stage may start a norm anew, or cast a block
    assert trained == params.keys()
    export.export(str(tmp_path / "back"), str(tmp_path / "again"), "hf")
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(ValueError, match=r"xattn.query_block is 4, the checkpoint has 8"):
        importer.import_model(
            replace(cfg, xattn=replace(cfg.xattn, query_block=4)),
            str(tmp_path / "hf"),
            str(tmp_path / "other"),
        )
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff" * 4)
    with pytest.raises(ValueError, match=r"hf: .* holds NaN or infinity, [12] of its \d+ numbers"):
        importer.read_export(cfg, str(tmp_path / "hf"))


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>"])
def test_a_placeholder_has_no_other_meaning(tmp_path, mark):
    """No answer would end, and an export would take each for an image."""
    folder = str(tokenizer_directory(tmp_path))
    importer.vocabulary(CFG, folder)
    media = replace(CFG.media, placeholder=mark)
    with pytest.raises(ValueError, match="media.placeholder .* begins or ends a text or a turn"):
        importer.vocabulary(replace(CFG, media=media), folder)


def damage(towers, how: str):
    """Spoils the language model on disk; returns what the error must say."""
    folder = Path(towers.init.llm)
    held = read_all(open_source(folder).tensors)
    norm, up = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
    if how == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        return "copy it again"
    if how == "vocabulary":
        tokens = json.loads((folder / "tokenizer.json").read_text())
        tokens["model"]["vocab"] |= {f"word{i}": 256 + i for i in range(200)}
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        return "the tokenizer has 456 ids, llm.vocab is 256"
    if how == "wrong family":
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"rope_theta": 5e5})
        )
        return "llm.rope_theta is 10000.0, the checkpoint has 500000.0"
    changed = {
        "extra tensor": ({"model.extra": held[norm]}, "no place for model.extra"),
        "missing tensor": ({up: None}, f"fills llm/layers/2/mlp/up/kernel: {up} is missing"),
        "wrong dtype": ({norm: np.ones(64, np.int32)}, f"{norm} of model.safetensors is int32"),
        "NaN": (
            {up: np.where(np.arange(64) == 9, np.nan, held[up]).astype(ml_dtypes.bfloat16)},
            f"{up} of model.safetensors holds NaN or infinity, {len(held[up])} of its"
            f" {held[up].size} numbers",
        ),
    }
    change, message = changed[how]
    kept = {name: array for name, array in (held | change).items() if array is not None}
    save_file(kept, folder / "model.safetensors")
    return message


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "vocabulary",
        "wrong family",
        "extra tensor",
        "missing tensor",
        "wrong dtype",
        "NaN",
    ],
)
def test_bad_input_leaves_nothing(tmp_path, towers, how):
    message = damage(towers, how)
    with pytest.raises(ValueError, match=message):
        importer.import_towers(towers, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_parameter_that_two_tensors_fill_is_refused(tmp_path):
    """A last matrix of the MLP, and beside it one by the name that gated ones have."""
    folder, name = dinov2_directory(tmp_path, CFG), "encoder.layer.1.mlp.fc2.weight"
    held = read_all(open_source(folder).tensors)
    save_file(held | {name.replace("fc2", "weights_out"): held[name]}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"{name} of .* and .*weights_out.* fill vit/blocks/1/mlp"
    ):
        engine.open_tower(CFG, open_source(folder), "vit")


def test_a_missing_shard_leaves_nothing(tmp_path, towers, monkeypatch):
    monkeypatch.setattr(safetensors_file, "SHARD", 20_000)
    llama_directory(tmp_path / "sharded", CFG)
    lost = sorted((tmp_path / "sharded").glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"names shards that are not there: {lost.name}"):
        importer.import_towers(
            replace(towers, init=replace(towers.init, llm=str(tmp_path / "sharded"))),
            str(tmp_path / "out"),
        )
    assert not list(tmp_path.glob("out*"))


EXPERIMENT = """
import json
from ml_collections import ConfigDict
def get_config(form=""):
    return ConfigDict(json.loads({text!r}), convert_dict=True)
"""


def test_the_commands(tmp_path, towers, capsys):
    """Import, export, import of the export, as they are typed; what goes wrong is one line and
    status 1.
    """
    (tmp_path / "mine.py").write_text(EXPERIMENT.format(text=json.dumps(to_dict(CFG))))
    config, place = ["--config", str(tmp_path / "mine.py")], lambda name: str(tmp_path / name)
    assert (
        main(
            [
                "convert",
                "import",
                *config,
                "--vision",
                towers.init.vision,
                "--llm",
                towers.init.llm,
                "--out",
                place("a"),
            ]
        )
        == 0
    )
    assert main(["convert", "export", "--checkpoint", place("a"), "--out", place("hf")]) == 0
    assert main(["convert", "import", *config, "--model", place("hf"), "--out", place("b")]) == 0
    assert same(checkpoint.load_params(place("a"))[0], checkpoint.load_params(place("b"))[0])
    capsys.readouterr()
    assert main(["convert", "import", *config, "--model", place("hf"), "--out", place("b")]) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"evlm: {place('b')} exists; give a new directory, or remove it"
    )


KILLED = """
import os, signal, sys, json
from evlm_jax.checkpoint import safetensors_file as tensors
from evlm_jax.config import from_config_dict
from evlm_jax.convert import importer
tensors.SHARD = 20_000
left, write = int(sys.argv[3]), tensors.write_tensor
def counted(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)
tensors.write_tensor = counted
importer.import_towers(from_config_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.pinned
def test_a_kill_leaves_what_the_next_import_goes_on_with(tmp_path, towers, monkeypatch):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", KILLED, json.dumps(to_dict(towers)), str(out), "40"]
    assert (
        subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    )
    assert not out.exists()
    (aside,) = (tmp_path / "out.incomplete/frozen").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in aside.glob("*.safetensors")}
    assert before
    monkeypatch.setattr(safetensors_file, "SHARD", 20_000)
    kept = []
    monkeypatch.setattr(
        safetensors_file,
        "write_tensor",
        lambda file, name, *rest, write=safetensors_file.write_tensor: (
            kept.append(name) or write(file, name, *rest)
        ),
    )
    importer.import_towers(towers, str(out))
    (store,) = (out / "frozen").iterdir()
    assert (
        before.items()
        <= {path.name: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}.items()
    )
    params, _ = checkpoint.load_params(out)
    assert 0 < len(kept) < len(params) and not (tmp_path / "out.incomplete").exists()
    assert same(
        {n: a for n, a in params.items() if n.startswith(("vit/", "llm/"))},
        engine.load_towers(towers),
    )


def test_a_kill_between_store_and_step(tmp_path, towers, monkeypatch):
    """The store is there, the step that names it is not: the next import writes both."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "write_imported", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            importer.import_towers(towers, str(out))
    assert not out.exists() and len(list((tmp_path / "out.incomplete/frozen").iterdir())) == 1
    importer.import_towers(towers, str(out))
    assert len(list((out / "frozen").iterdir())) == 1 and len(checkpoint.load_params(out)[0]) > 40


def test_a_changed_source_starts_over(tmp_path, towers):
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete/plan.json").write_text('{"another": "plan"}')
    (tmp_path / "out.incomplete/left").write_text("over")
    importer.import_towers(towers, str(tmp_path / "out"))
    assert not (tmp_path / "out/left").exists() and not (tmp_path / "out/plan.json").exists()


def test_flat_files(tmp_path, monkeypatch):
    """A tensor of every layout and dtype: written in blocks, read back, hashed as `digest` does."""
    rng = np.random.default_rng(0)
    arrays = {
        "scalar": np.float32(2.5) * np.ones((), np.float32),
        "turned": rng.standard_normal((70, 90)).astype(np.float32).T,
    }
    arrays |= {
        "half": rng.standard_normal((3, 4, 5)).astype(np.float16),
        "brain": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
    }
    arrays["brain turned"] = (
        rng.standard_normal((5, 4, 3)).astype(ml_dtypes.bfloat16).transpose(2, 0, 1)
    )
    monkeypatch.setattr(lazy_tensors, "BLOCK", 100)
    hashes = write_folder(tmp_path, {name: Tensor.of(array) for name, array in arrays.items()})
    assert {name: found.whole for name, found in hashes.items()} == {
        name: lazy_tensors.digest(array) for name, array in arrays.items()
    }
    assert same(read_all(open_source(tmp_path).tensors), arrays)
    assert same(load_file(tmp_path / "model.safetensors"), arrays)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
