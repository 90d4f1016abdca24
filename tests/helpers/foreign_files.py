"""Files of other projects in small: GGUF and ONNX."""

from pathlib import Path

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import read_all
from evlm_jax.convert import engine
from tests.helpers.checkpoints import family, random_tensors
from tests.helpers.tiny import tiny_config

UNTIED = tiny_config(llm={"tied": False})
KEYS = {
    "embedding_length": 64,
    "block_count": 4,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
KEYS |= {
    "context_length": 64,
    "rope.dimension_count": 16,
    "rope.freq_base": 1e4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def gguf_file(path: Path, keys: dict, cfg=UNTIED, more: dict | None = None) -> Path:
    """The language model of `cfg` as llama.cpp has it, and `more` tensors; keys of other namespaces
    than "llama" with theirs.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), keys.get("general.architecture", "llama"))
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if key != "general.architecture":
            kinds[type(value)](
                key if key.startswith(("general.", "split.", "tokenizer.")) else f"llama.{key}",
                value,
            )
    made = engine.to_foreign(
        family("llama-gguf"), random_tensors(cfg, "llm"), engine.sizes(cfg, "llm")
    )
    for name, array in (read_all(made) | (more or {})).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    finish(writer)
    return path


def finish(writer) -> None:
    """Writes the file of a GGUFWriter that has all it is to hold."""
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message: bytes, or a number below 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    length, digits = len(value), b""
    while length > 127:
        digits, length = digits + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + digits + bytes([length]) + value
