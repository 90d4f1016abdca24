"""GGUF, the files of llama.cpp: weights and vocabulary."""

import math
import struct
from pathlib import Path

import numpy as np

from evlm_jax.tensors import Source, Tensor

GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf(path: Path) -> Source:
    """GGUF versions 2 and 3, little-endian; quantised tensors are dequantised to float32 when read.

    An own header parser, because gguf.GGUFReader makes an array object of every vocabulary entry (5 s instead of 0.2 s).
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    data = memoryview(np.memmap(path, np.uint8, mode="r"))
    position = 0

    def take(kind: str):
        nonlocal position
        (value,) = struct.unpack_from("<" + kind, data, position)
        position += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal position
        length = take("Q")
        position += length
        return str(data[position - length : position], "utf-8")

    def value(kind: int):
        if kind == GGUF_STRING:
            return text()
        if kind == GGUF_ARRAY:
            item, count = take("I"), take("Q")
            return [value(item) for _ in range(count)]
        return take(GGUF_SCALARS[kind])

    if bytes(data[:4]) != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
        raise ValueError(f"{path}: not a GGUF file of version 2 or 3")
    position = 8
    count, pairs = take("Q"), take("Q")
    metadata = {text(): value(take("I")) for _ in range(pairs)}
    infos = [(text(), tuple(take("Q") for _ in range(take("I")))[::-1], GGMLQuantizationType(take("I")), take("Q")) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    base = -(-position // alignment) * alignment

    def reader(name, shape, kind, offset) -> Tensor:
        block, size = GGML_QUANT_SIZES[kind]
        length = math.prod(shape) // block * size
        if base + offset + length > len(data):
            raise ValueError(f"{path}: {name} lies behind the end of the file; fetch it again")
        rows = (*shape[:-1], shape[-1] // block * size)
        raw = lambda: np.fromfile(path, np.uint8, length, offset=base + offset).reshape(rows)
        return Tensor(shape, np.dtype(np.float32), lambda: quants.dequantize(raw(), kind).reshape(shape))

    return Source(path, metadata, {info[0]: reader(*info) for info in infos})
