"""Checkpoints of the sizes of Qwen3-8B and SigLIP so400m pass through the commands, both ways, in
less than 4 GiB of memory.
"""

import json
import shutil
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.checkpoint.safetensors_file import INDEX, read_folder
from evlm_jax.checkpoint.store import open_params
from tests.helpers.checkpoints import tokenizer_directory

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")
pytestmark = [pytest.mark.slow, pytest.mark.parity]
GIB = 2**30
CONFIG = ("--config", "experiments/evlm_8b.py:pretrain", "--config.media.placeholder=<|media|>")
QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
KEPT = {  # what holds random bits, by our name; the files have holes for all others, which are 0
    "model.embed_tokens.weight": "llm/embed",
    "model.layers.0.self_attn.k_proj.weight": "llm/layers/0/attn/k/kernel",
    "model.layers.35.mlp.down_proj.weight": "llm/layers/35/mlp/down/kernel",
    "lm_head.weight": "llm/head/kernel",
}
RANDOM = np.random.default_rng(0).integers(0, 2**16, 2**22 + 1, np.uint16) & 0xBFFF  # finite bits
PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16: RANDOM over and over in each of KEPT, and holes."""
    facts, stop = {}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 2 * prod(shape)
        facts[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    header = json.dumps(facts).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        begin = file.tell()
        file.truncate(begin + stop)
        for name in KEPT.keys() & shapes.keys():
            start, stop = facts[name]["data_offsets"]
            file.seek(begin + start)
            for left in range(stop - start, 0, -RANDOM.nbytes):
                file.write(RANDOM.tobytes()[:left])


def write_model(folder: Path, kind: str, sizes: dict) -> None:
    """transformers' model, in shards of a few layers with an index."""
    config = transformers.AutoConfig.for_model(kind, **sizes)
    auto = transformers.AutoModel if "vision" in kind else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        state = auto.from_config(config).state_dict()
    shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    folder.mkdir()
    config.save_pretrained(folder)
    shards = {f"model-{first}.safetensors": dict(shapes[first : first + 100])
              for first in range(0, len(shapes), 100)}  # fmt: skip
    for file, held in shards.items():
        write_shard(folder / file, held)
    where = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def peak(*arguments: str) -> float:
    """GiB of memory that `evlm convert` had at most."""
    command = [sys.executable, "-c", PEAK, sys.executable, "-m", "evlm_jax", "convert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return int(done.stdout.split()[-1]) / GIB


def same(tensor: Tensor, turned: bool) -> bool:
    """Whether a tensor, `turned` or as it is written, holds RANDOM over and over."""
    found = (tensor.read().T if turned else tensor.read()).view(np.uint16)
    width, rows = found.shape[1], max(1, 2**24 // found.shape[1])
    return all(
        np.array_equal(part.ravel(), np.resize(np.roll(RANDOM, -first * width), part.size))
        for first in range(0, len(found), rows)
        for part in [found[first : first + rows]]
    )


def test_8b_parameters_in_4_gib(tmp_path):
    if shutil.disk_usage(tmp_path).free < 50 * GIB:
        pytest.skip("needs 50 GiB of this machine's disk")
    vision, llm, towers, out = (str(tmp_path / name) for name in ("vit", "llm", "towers", "out"))
    write_model(tmp_path / "vit", "siglip_vision_model", SO400M)
    write_model(tmp_path / "llm", "qwen3", QWEN3_8B)
    tokenizer_directory(tmp_path / "llm")
    read = ("--vision", vision, "--llm", llm)
    found = {"import": peak("import", *CONFIG, *read, "--out", towers)}
    shutil.rmtree(vision), shutil.rmtree(llm)
    held, _ = open_params(towers)
    assert all(same(held[ours], ours != "llm/embed") for ours in KEPT.values())
    for form in ("llm", "hf"):
        found[form] = peak("export", "--checkpoint", towers, "--format", form, "--out", out)
        written = read_folder(tmp_path / "out")
        if form == "llm":
            assert all(same(written[name], False) for name in KEPT)
        shutil.rmtree(out)
    shutil.rmtree(towers)
    print(found)
    assert max(found.values()) < 4
