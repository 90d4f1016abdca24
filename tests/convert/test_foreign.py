"""Foreign checkpoints: what people's directories hold is read, compared or named."""

import json
import struct
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evlm_jax import assets
from evlm_jax.checkpoint import safetensors_file
from evlm_jax.checkpoint.lazy_tensors import read_all
from evlm_jax.config import RopeScaling
from evlm_jax.convert import engine, importer
from evlm_jax.convert.readers import open_source
from tests.helpers.checkpoints import dinov2_directory, llama_directory
from tests.helpers.foreign_files import KEYS, UNTIED, field, gguf_file
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config

CFG = tiny_config()


# -------------------------------------------------------------------------------------- directories


def test_a_single_file_wins_over_a_stale_index(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "SHARD", 20_000)
    llama_directory(tmp_path, CFG)
    monkeypatch.undo()
    whole = {name: 2 * tensor.read() for name, tensor in open_source(tmp_path).tensors.items()}
    save_file(whole, tmp_path / "model.safetensors")
    found = read_all(open_source(tmp_path).tensors)
    assert found.keys() == whole.keys() and all(
        (found[name] == whole[name]).all() for name in whole
    )


def test_an_index_tells_all_of_its_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "SHARD", 20_000)
    llama_directory(tmp_path, CFG)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.0.input_layernorm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="does not name model.layers.0.input_layernorm.weight in model-0"
    ):
        open_source(tmp_path)
    for odd in ({"weight_map": {"a": "../model.safetensors"}}, {"weight_map": ["a"]}, {}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(odd))
        with pytest.raises(ValueError, match="weight_map must hold names of files beside it"):
            open_source(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    llama_directory(tmp_path / "llm", UNTIED)
    dinov2_directory(tmp_path / "vit", CFG)
    before = read_all(engine.open_tower(UNTIED, open_source(tmp_path / "llm"), "llm").tensors)
    for folder in ("llm", "vit"):
        held = load_file(tmp_path / folder / "model.safetensors")
        save_file(
            {prefix + name: array for name, array in held.items()},
            tmp_path / folder / "model.safetensors",
        )
    after = engine.open_tower(UNTIED, open_source(tmp_path / "llm"), "llm")
    assert after.prefix == prefix and all(
        (after.tensors[name].read() == before[name]).all() for name in before
    )
    assert engine.recognise(open_source(tmp_path / "vit"))[1] == prefix


def test_the_import_says_the_prefix(tmp_path, capsys):
    llm, vit = llama_directory(tmp_path / "llm", CFG), dinov2_directory(tmp_path / "vit", CFG)
    save_file(
        {f"module.{name}": array for name, array in load_file(llm / "model.safetensors").items()},
        llm / "model.safetensors",
    )
    cfg = tiny_config(init={"vision": str(vit), "llm": str(llm)})
    importer.import_towers(cfg, str(tmp_path / "out"))
    assert "prefix module. taken off" in capsys.readouterr().out


def test_an_adapter_is_named(tmp_path):
    save_file(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros(
                (2, 4), np.float32
            )
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "someone/llama"}'
    )
    with pytest.raises(ValueError, match=r"holds an adapter \(LORA of someone/llama\): merge it"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "name", ["qweight", "weight_scale", "weight_scale_inv", "SCB", "absmax", "weight_packed"]
)
def test_quantised_weights_are_named(tmp_path, name):
    llama_directory(tmp_path, CFG)
    held = load_file(tmp_path / "model.safetensors")
    save_file(
        held | {f"model.layers.0.mlp.up_proj.{name}": np.zeros(2, np.float32)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=f"{name} belongs to quantised weights"):
        engine.describe(str(tmp_path))


def test_a_part_of_a_larger_model_is_named(tmp_path):
    llama_directory(tmp_path, CFG)
    held = load_file(tmp_path / "model.safetensors")
    save_file(
        {f"language_model.{name}": array for name, array in held.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match="language_model. are parts of a larger model or an adapter"
    ):
        engine.describe(str(tmp_path))


BEGINS = {
    b"": "is empty: copy it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n": (
        "is a Git LFS pointer"
    ),
    b"<!DOCTYPE html><html></html>" * 3: "is a page of HTML",
    b"PK\x03\x04" + bytes(60): "is a zip archive",
    b"\x80\x02" + bytes(60): "is a pickle",
    b"anything else at all, of some length": "not a|no ONNX file",
}


@pytest.mark.parametrize("begin", BEGINS, ids=BEGINS.values())
@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "onnx"])
def test_files_of_another_kind_are_named(tmp_path, begin, suffix):
    (tmp_path / f"w.{suffix}").write_bytes(begin)
    with pytest.raises(ValueError, match=BEGINS[begin]):
        open_source(tmp_path / f"w.{suffix}")


@pytest.mark.parity
def test_damaged_pytorch_files_are_named(tmp_path):
    """Bytes of the pickle inside are changed: read, or refused in one line."""
    import torch

    torch.save(
        {
            "state_dict": {"a": torch.arange(6.0), "b": torch.zeros(4, dtype=torch.bfloat16)},
            "epoch": 3,
        },
        tmp_path / "whole.pt",
    )
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    rng, refused = np.random.default_rng(0), 0
    for _ in range(30):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
            for name, held in members.items():
                held = bytearray(held)
                if name.endswith("data.pkl"):
                    held[rng.integers(len(held))] = rng.integers(256)
                file.writestr(name, bytes(held))
        try:
            read_all(open_source(tmp_path / "w.pt").tensors)
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/w.pt") and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 5
    for other, message in (
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a tensor"),
        ({"epoch": 1}, "no tensors, but epoch"),
    ):
        torch.save(other, tmp_path / "o.pt")
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "o.pt")


def test_json_files_are_named(tmp_path):
    llama_directory(tmp_path, CFG)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text("\ufeff" + text)
    assert engine.describe(str(tmp_path))["hidden"] == 64
    for broken in (text[:-1] + ",}", "[]", "", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json: "):
            engine.describe(str(tmp_path))


# ---------------------------------------------------------------------------------- what is dropped


def test_a_head_beside_a_tied_embedding_is_compared(tmp_path):
    llama_directory(tmp_path, CFG)
    held = load_file(tmp_path / "model.safetensors")
    save_file(
        held | {"lm_head.weight": held["model.embed_tokens.weight"].copy()},
        tmp_path / "model.safetensors",
    )
    assert engine.open_tower(CFG, open_source(tmp_path), "llm").dropped == ["lm_head.weight"]
    save_file(
        held | {"lm_head.weight": held["model.embed_tokens.weight"] * 1.001},
        tmp_path / "model.safetensors",
    )
    message = r"lm_head.weight is another head than the embedding, and .* to keep the head$"
    with pytest.raises(ValueError, match=message):
        engine.open_tower(CFG, open_source(tmp_path), "llm")


def test_rotary_frequencies_are_compared(tmp_path):
    llama_directory(tmp_path, CFG)
    held, name = (
        load_file(tmp_path / "model.safetensors"),
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    frequencies = (1e4 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
    save_file(held | {name: frequencies}, tmp_path / "model.safetensors")
    assert engine.open_tower(CFG, open_source(tmp_path), "llm").dropped == [name]
    save_file(held | {name: frequencies / 4}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="inv_freq holds other rotary frequencies"):
        engine.open_tower(CFG, open_source(tmp_path), "llm")


# --------------------------------------------------------------------------------------------- GGUF


NOT_PLAIN = {
    "scaled positions": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        "llama.rope.scaling.factor 8.0",
    ),
    "yarn": ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn'"),
    "the old key": ({"rope.scale_linear": 4.0}, "llama.rope.scale_linear 4.0"),
    "experts": ({"expert_count": 8}, "llama.expert_count 8"),
    "partial rotary positions": (
        {"rope.dimension_count": 8},
        "llama.rope.dimension_count is 8, not 16",
    ),
    "other values": ({"attention.value_length": 8}, "llama.attention.value_length is 8, not 16"),
    "an unknown key": ({"logit_scale": 2.0}, "llama.logit_scale 2.0"),
    "heads by layer": ({"attention.head_count_kv": [2, 2, 4, 2]}, "llama.attention.head_count_kv"),
    "another architecture": (
        {"general.architecture": "gemma2"},
        "general.architecture 'gemma2', read is llama, qwen2, qwen3, gemma3",
    ),
    "an adapter": ({"general.type": "adapter"}, "general.type 'adapter'"),
    "a part": ({"split.count": 3}, "split.count 3"),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_no_plain_gguf_is_refused_by_its_keys(tmp_path, case):
    changes, message = NOT_PLAIN[case]
    with pytest.raises(ValueError, match=message) as error:
        engine.describe(str(gguf_file(tmp_path / "m.gguf", KEYS | changes)))
    assert str(tmp_path / "m.gguf") in str(error.value) and len(str(error.value).splitlines()) == 1


def test_gguf_without_keys_takes_the_defaults_of_llama_cpp(tmp_path):
    cfg = tiny_config(llm={"tied": False, "kv_heads": 4})
    keys = {
        key: value
        for key, value in KEYS.items()
        if key not in ("rope.freq_base", "attention.head_count_kv")
    }
    found = engine.describe(str(gguf_file(tmp_path / "m.gguf", keys, cfg)))
    assert (found["rope_theta"], found["kv_heads"]) == (1e4, 4)
    keys.pop("attention.layer_norm_rms_epsilon")
    with pytest.raises(
        ValueError, match="m.gguf: the GGUF file lacks llama.attention.layer_norm_rms_epsilon"
    ):
        engine.describe(str(gguf_file(tmp_path / "m.gguf", keys, cfg)))


LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_frequency_factors_of_a_gguf_are_looked_at(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    one = np.ones(8, np.float32)
    path = gguf_file(
        tmp_path / "one.gguf", KEYS | {"rope.scaling.type": "none"}, more={"rope_freqs.weight": one}
    )
    assert engine.open_tower(UNTIED, open_source(path), "llm").dropped == ["rope_freqs.weight"]
    theirs = transformers.LlamaConfig(  # as llama.cpp's converter divides plain by scaled ones
        head_dim=16, max_position_embeddings=131072, rope_parameters=LLAMA31
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    factors = (1e4 ** -(np.arange(0, 16, 2) / 16) / scaled.numpy()).astype(np.float32)
    path = gguf_file(tmp_path / "three.gguf", KEYS, more={"rope_freqs.weight": factors})
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    cfg = replace(UNTIED, llm=replace(UNTIED.llm, rope_scaling=scaling))
    assert engine.open_tower(cfg, open_source(path), "llm").dropped == ["rope_freqs.weight"]
    path = gguf_file(
        tmp_path / "two.gguf",
        KEYS,
        more={"rope_freqs.weight": one * np.linspace(1, 8, 8, dtype=np.float32)},
    )
    with pytest.raises(
        ValueError,
        match="rope_freqs.weight holds factors of the rotary frequencies that are neither",
    ):
        engine.open_tower(cfg, open_source(path), "llm")


# --------------------------------------------------------------------------------------------- ONNX


def test_onnx_weights_are_read_where_they_lie(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    def tensor(name, *more):
        return field(5, field(1, 2) + field(1, 3) + field(2, 1) + field(8, name) + b"".join(more))

    raw, packed = (
        tensor(b"a.bias", field(9, values.tobytes())),
        tensor(b"onnx::7", field(4, struct.pack("<6f", *values.ravel()))),
    )
    node = field(
        1,
        field(1, b"x") + field(1, b"onnx::7") + field(3, b"/block/q/MatMul") + field(4, b"MatMul"),
    )
    (tmp_path / "m.onnx").write_bytes(field(7, raw + packed + node))
    found = read_all(open_source(tmp_path / "m.onnx").tensors)
    assert found.keys() == {"a.bias", "block.q.weight"}
    assert (found["a.bias"] == values).all() and (found["block.q.weight"] == values.T).all()
    elsewhere = tensor(
        b"a.bias", field(14, 1), field(13, field(1, b"location") + field(2, b"../secret"))
    )
    (tmp_path / "m.onnx").write_bytes(field(7, elsewhere))
    with pytest.raises(ValueError, match="the bytes of a.bias are in another file"):
        open_source(tmp_path / "m.onnx")


@needs_asset("dinov2-small")
def test_the_onnx_library_reads_the_same(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = assets.path("dinov2-small")
    ours, graph = open_source(path).tensors, onnx.load(path).graph
    theirs = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    shared = theirs.keys() & ours.keys()
    assert len(shared) > 100 and all((ours[name].read() == theirs[name]).all() for name in shared)
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in theirs]
    for node in products:
        name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
        assert (ours[name].read() == theirs[node.input[1]].T).all()
