"""The conversion engine: what it refuses, and that its tables and position rules are right.

Parity of whole towers: test_parity_*.py.
"""

import json

import einops
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from evlm_jax import assets
from evlm_jax.checkpoint.lazy_tensors import Source, read_all
from evlm_jax.convert import engine, readers
from evlm_jax.convert.interpolate import resize_positions, weights
from evlm_jax.convert.tables import FAMILIES
from tests.helpers.parity import needs_asset, needs_transformers
from tests.helpers.tiny import tiny_config

CFG = tiny_config()
SHAPES = {
    name: shape for name, shape in engine.parameter_shapes(CFG).items() if name.startswith("llm/")
}


def llama_directory(folder, shapes: dict | None = None, **changes) -> Source:
    """A Llama checkpoint of the tiny config's decoder in `folder`; `shapes` and config keys as
    changed.
    """
    llm = CFG.llm
    tensors = {
        "model.embed_tokens.weight": (llm.vocab, llm.hidden),
        "model.norm.weight": (llm.hidden,),
    }
    for i in range(llm.layers):
        block = {f"self_attn.{x}_proj": (llm.heads * llm.head_dim, llm.hidden) for x in "qo"}
        block |= {f"self_attn.{x}_proj": (llm.kv_heads * llm.head_dim, llm.hidden) for x in "kv"}
        block |= {
            "mlp.gate_proj": (llm.mlp, llm.hidden),
            "mlp.up_proj": (llm.mlp, llm.hidden),
            "mlp.down_proj": (llm.hidden, llm.mlp),
        }
        block |= {"input_layernorm": (llm.hidden,), "post_attention_layernorm": (llm.hidden,)}
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    tensors = {
        name: shape for name, shape in (tensors | (shapes or {})).items() if shape is not None
    }
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config |= {
        "intermediate_size": 128,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    return readers.open_source(folder)


def test_every_array_lands_transposed_under_its_name(tmp_path):
    source = llama_directory(tmp_path)
    arrays = read_all(engine.open_tower(CFG, source, "llm").tensors)
    assert {name: array.shape for name, array in arrays.items()} == SHAPES
    assert (
        arrays["llm/layers/2/mlp/down/kernel"]
        == source.tensors["model.layers.2.mlp.down_proj.weight"].read().T
    ).all()


def test_errors_list_every_name(tmp_path):
    shapes = {"model.layers.1.extra.weight": (3,), "model.layers.9.mlp.up_proj.weight": (3, 3)}
    shapes |= {"model.norm.weight": None, "model.layers.3.mlp.up_proj.weight": None}
    with pytest.raises(ValueError) as error:
        engine.open_tower(CFG, llama_directory(tmp_path, shapes), "llm")
    for line in (
        "no place for model.layers.1.extra.weight",
        "no place for model.layers.9.mlp.up_proj.weight",
        "nothing fills llm/ln_f/scale",
        "nothing fills llm/layers/3/mlp/up/kernel",
    ):
        assert line in str(error.value)


def test_wrong_shape_names_the_array(tmp_path):
    """Ours, and what the file calls it."""
    name = "model.layers.0.mlp.up_proj.weight"
    message = rf"{name} of model.safetensors gives llm/layers/0/mlp/up/kernel \(64, 127\), the"
    with pytest.raises(ValueError, match=rf"{message} config needs \(64, 128\)"):
        engine.open_tower(CFG, llama_directory(tmp_path, {name: (127, 64)}), "llm")


def test_another_architecture_lists_every_field(tmp_path):
    with pytest.raises(ValueError) as error:
        engine.open_tower(CFG, llama_directory(tmp_path, rms_norm_eps=1e-6, rope_theta=5e5), "llm")
    assert "llm.eps is 1e-05, the checkpoint has 1e-06" in str(error.value)
    assert "llm.rope_theta is 10000.0, the checkpoint has 500000.0" in str(error.value)


def test_language_model_as_vision_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds llama, which is no vit"):
        engine.open_tower(CFG, llama_directory(tmp_path), "vit")


def test_unknown_names_are_refused(tmp_path):
    save_file({"a.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot tell the family.*none of dinov2"):
        engine.describe(str(tmp_path))


def test_empty_or_missing_source_is_named():
    for where in ("", "/no/such/place"):
        with pytest.raises(FileNotFoundError, match="nor an asset"):
            engine.describe(where)


class Code:
    """What a pickle can do: call something when it is loaded."""

    def __reduce__(self):
        return print, ("this ran",)


@needs_transformers
def test_pytorch_files(tmp_path, capsys):
    """Nested, bfloat16 and sharded; a pickle with code in it is refused and does not run."""
    import torch

    source = llama_directory(tmp_path)
    arrays = {name: tensor.read() for name, tensor in source.tensors.items()}
    tensors = {name: torch.tensor(array).to(torch.bfloat16) for name, array in arrays.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "whole.pt")
    (tmp_path / "shards").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "unused")
    (tmp_path / "config.json").rename(tmp_path / "shards" / "config.json")
    shard_of = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        torch.save(
            {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard},
            tmp_path / "shards" / shard,
        )
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": shard_of})
    )
    for place in ("whole.pt", "shards"):
        found = readers.open_source(tmp_path / place).tensors
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].shape == array.shape
            assert found[name].read().tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
    torch.save({"model": {"module": tensors}, "state_dict": tensors}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="two.pt holds state_dict and model: save one of them"):
        readers.open_source(tmp_path / "two.pt")
    turned = torch.arange(24.0).reshape(4, 6)
    torch.save({"turned": turned.T, "part": turned[1:3, 2:]}, tmp_path / "views.pt")
    for name, view in (("turned", turned.T), ("part", turned[1:3, 2:])):
        assert (
            readers.open_source(tmp_path / "views.pt").tensors[name].read() == view.numpy()
        ).all()
    torch.save({"w": turned}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old.pt: w is in the format of before PyTorch 1.6"):
        readers.open_source(tmp_path / "old.pt")
    torch.save(
        {"model.norm.weight": tensors["model.norm.weight"], "more": Code()}, tmp_path / "code.pt"
    )
    with pytest.raises(ValueError, match=r"code.pt: damaged, or holds more than tensors"):
        readers.open_source(tmp_path / "code.pt")
    assert "this ran" not in capsys.readouterr().out
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.pt: damaged"):
        readers.open_source(tmp_path / "cut.pt")


def test_truncated_file_and_missing_shard(tmp_path):
    llama_directory(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="copy it again"):
        readers.open_source(tmp_path)
    file.unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        readers.open_source(tmp_path)


def test_bfloat16_keeps_its_bits(tmp_path):
    import ml_dtypes

    values = np.random.default_rng(0).standard_normal((5, 7)).astype(ml_dtypes.bfloat16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [5, 7], "data_offsets": [0, 70]}}).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    read = readers.open_source(file).tensors["w"].read()
    assert read.dtype == ml_dtypes.bfloat16 and read.tobytes() == values.tobytes()


@needs_asset("dinov2-small")
def test_blocks_above_the_highest_tap_are_dropped():
    stored = engine.describe("dinov2-small")
    cfg = tiny_config(vit=stored | {"image_size": 28, "taps": (2, 5)})
    source = readers.open_source(assets.path("dinov2-small"))
    shapes = {
        name: shape
        for name, shape in engine.parameter_shapes(cfg).items()
        if name.startswith("vit/")
    }
    arrays = engine.open_tower(cfg, source, "vit").tensors
    assert {name.split("/")[2] for name in arrays if "blocks" in name} == set("01234")
    _, dropped = engine.conversion_plan(source, *engine.recognise(source), shapes, cfg)
    assert (
        "backbone.layernorm.weight" in dropped
        and "backbone.encoder.layer.5.norm1.weight" in dropped
    )
    assert len(dropped) + len(
        engine.conversion_plan(source, *engine.recognise(source), shapes, cfg)[0]
    ) == len(source.tensors)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_pattern_inverts(family):
    """Swapped sides undo a row, for tensors of odd sizes: what export will do."""
    sizes = {"heads": 3, "kv_heads": 3, "two": 2}
    for row in family.rows:
        if not row.pattern:
            continue
        left, right = row.pattern.split(" -> ")
        lengths = {
            axis: n
            for axis, n in (sizes | {"n": len(row.paths)}).items()
            if axis in row.pattern.replace("(", " ").replace(")", " ").split()
        }
        shape = [
            1 if token == "1" else 60 if token.startswith("(") else 5 for token in tokens(left)
        ]
        array = np.arange(np.prod(shape)).reshape(shape)
        forward = einops.rearrange(array, row.pattern, **lengths)
        half = {"half": 10} if "half" in row.pattern else {}
        assert (einops.rearrange(forward, f"{right} -> {left}", **lengths, **half) == array).all()


def tokens(side: str) -> list[str]:
    """Axes of one side of a pattern, a bracket as one."""
    out, depth = [], 0
    for word in side.split():
        if depth == 0:
            out.append(word)
        depth += word.count("(") - word.count(")")
    return out


def test_no_two_rows_of_a_family_take_the_same_tensor_or_place():
    for family in FAMILIES:
        foreign = [row.foreign for row in family.rows]
        places = [path for row in family.rows if row.written for path in row.paths]
        assert len(set(foreign)) == len(foreign) and len(set(places)) == len(places)


@needs_transformers
@pytest.mark.parametrize("rule, antialias", [("bicubic", False), ("antialias", True)])
@pytest.mark.parametrize(
    "grid, target", [(37, 16), (16, 32), (16, 8), (7, 7), (2, 3), (37, 8), (4, (3, 6))]
)
def test_interpolation_equals_torch(rule, antialias, grid, target):
    import torch

    target = target if isinstance(target, tuple) else (target, target)
    table = np.random.default_rng(0).standard_normal((1 + grid**2, 6)).astype(np.float32)
    planes = (
        torch.tensor(table[1:].astype(np.float64)).reshape(1, grid, grid, 6).permute(0, 3, 1, 2)
    )
    reference = torch.nn.functional.interpolate(
        planes, target, mode="bicubic", align_corners=False, antialias=antialias
    )
    ours = resize_positions(table, (grid, grid), target, rule)
    assert (ours[0] == table[0]).all()
    assert np.abs(ours[1:] - reference[0].permute(1, 2, 0).reshape(-1, 6).numpy()).max() <= 1e-6


@given(
    size=st.integers(1, 40),
    target=st.integers(1, 40),
    rule=st.sampled_from(["bicubic", "antialias"]),
)
def test_interpolation_keeps_constants_and_symmetry(size, target, rule):
    matrix = weights(size, target, rule)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-9)
    if size == target:
        np.testing.assert_allclose(matrix, np.eye(size), atol=1e-9)


def test_full_size_names_cover_eva_and_qwen():
    """The paper's towers by shapes alone: every parameter of the 14B model is filled by the tables,
    nothing twice.
    """
    import importlib

    from evlm_jax.config import from_config_dict

    base = importlib.import_module("experiments.base").get_config()
    base.data.sources, base.data.weights = (), ()
    cfg = from_config_dict(base)
    expected = engine.parameter_shapes(cfg)
    for name, tower, depth in (("eva02", "vit", 64), ("qwen", "llm", 40)):
        family = next(f for f in FAMILIES if f.name == name)
        filled = [
            path.format(i)
            for row in family.rows
            for i in (range(depth) if "{}" in row.foreign else (0,))
            for path in row.paths
        ]
        assert sorted(filled) == sorted(n for n in expected if n.startswith(tower))
