"""Tensors -> safetensors files, one tensor in memory at a time."""

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

SHARD = 2**30  # bytes of one file; a tensor is never cut
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Entry(NamedTuple):
    """A tensor to be written; `make()` gives the array when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, entries: Sequence[Entry], written: Callable[[int], None] = lambda _: None) -> None:
    """model.safetensors, or numbered shards with model.safetensors.index.json as Hugging Face has them.

    Args:
      written: called with the bytes of each tensor that is on disk.
    """
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.size > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, written)


def write_safetensors(path: Path, entries: Sequence[Entry], written: Callable[[int], None] = lambda _: None) -> None:
    """One file. Raises ValueError naming a tensor that is not what its entry says, or holds NaN."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        if entry.dtype.name not in TYPES:
            raise ValueError(f"{entry.name} is {entry.dtype.name}; written are {', '.join(TYPES)}")
        header[entry.name] = {
            "dtype": TYPES[entry.dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            array = np.asarray(entry.make(), order="C")
            if array.shape != entry.shape or array.dtype != entry.dtype:
                raise ValueError(f"{entry.name} is {array.dtype} {array.shape}, expected {entry.dtype} {entry.shape}")
            if np.isnan(array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array).any():
                raise ValueError(f"{entry.name} holds NaN")
            file.write(array.tobytes())
            written(entry.size)
