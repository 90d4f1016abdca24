"""Named tensors that are read and written one at a time, in safetensors files: models of any size pass through little memory.

A `Tensor` is a promise: shape, dtype, and a function that reads it. Maps of them are what converters hand on. Files are sharded as
Hugging Face has them; a shard appears under its name when it is complete, with the hashes of its tensors beside it, so that a writing
that was cut off goes on with the first shard that is missing.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from evlm_jax import paths

SHARD = 2**30  # bytes of one file; a tensor is never cut
BLOCK = 2**26  # bytes of one tensor that are copied, checked, hashed and written together
TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}
FLOATS = {np.dtype(TYPES[name]): name for name in ("F32", "F16", "BF16")}  # what is written
INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # its bits; those of NaN are larger
NAME, INDEX, HASHES = "model.safetensors", "model.safetensors.index.json", ".hashes.json"


class Tensor(NamedTuple):
    """`read()` gives the array; nothing is kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """An array that is there already."""
        return cls(array.shape, array.dtype, lambda: array)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


class Source(NamedTuple):
    """A checkpoint: `metadata` is config.json, the GGUF key-value store, or empty."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_all(tensors: Tensors) -> dict[str, np.ndarray]:
    """All of them, in memory."""
    return {name: tensor.read() for name, tensor in tensors.items()}


def digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes."""
    content = _begin(array.dtype, array.shape)
    for bits in _blocks(array):
        content.update(bits)
    return content.hexdigest()


# ------------------------------------------------------------------------------------------------------------------ reading


def read_safetensors(path: epath.Path) -> dict[str, Tensor]:
    """One file: 8 bytes of header length, a JSON header, then the bytes. Raises ValueError if the file is cut short."""
    path = paths.place(path)
    size = paths.size(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > size:
            raise ValueError(f"{path}: not a complete safetensors file; copy it again")
        header = json.loads(file.read(length))
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in facts["data_offsets"])
        if stop > size:
            raise ValueError(f"{path}: ends at byte {size}, but {name} ends at {stop}; copy it again")
        if facts["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name} has dtype {facts['dtype']}; read are {', '.join(TYPES)}")
        dtype, shape = np.dtype(TYPES[facts["dtype"]]), tuple(facts["shape"])
        tensors[name] = Tensor(shape, dtype, partial(_read_array, path, dtype, shape, start))
    return tensors


def _read_array(path: epath.Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def read_folder(folder: epath.Path, name: str = NAME, read: Callable = read_safetensors) -> dict[str, Tensor] | None:
    """The tensors of `folder/name` or of the shards of its index; None where neither is there.

    Raises:
      FileNotFoundError: a shard that the index names is missing.
      ValueError: a tensor of the index is not in its shard.
    """
    index = folder / f"{name}.index.json"
    if not index.exists():
        return read(folder / name) if (folder / name).exists() else None
    shard_of = json.loads(index.read_text())["weight_map"]
    if missing := sorted({shard for shard in shard_of.values() if not (folder / shard).exists()}):
        raise FileNotFoundError(f"{folder}: {index.name} names shards that are not there: {', '.join(missing)}; copy them again")
    shards = {shard: read(folder / shard) for shard in set(shard_of.values())}
    if lost := sorted(name for name, shard in shard_of.items() if name not in shards[shard]):
        raise ValueError(f"{folder}: not in the shard that {index.name} names: {', '.join(lost)}")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


# ------------------------------------------------------------------------------------------------------------------ writing


def write_folder(folder: epath.Path, tensors: Tensors, written: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """model.safetensors, or numbered shards and model.safetensors.index.json; shards that are there already are kept.

    Args:
      written: called with the bytes of each piece that is on disk.
    Returns:
      {name: hash of the tensor, as `digest`}
    Raises:
      ValueError: names a tensor that is no float, is not what its promise says, or holds NaN or infinity.
    """
    shards = [[]]
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; weights are {', '.join(map(str, FLOATS))}")
        if shards[-1] and sum(tensors[name].size for name in shards[-1]) + tensor.size > SHARD:
            shards.append([])
        shards[-1].append(name)
    files = [NAME] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    hashes = {}
    for file, names in zip(files, shards, strict=True):
        hashes |= _write_shard(folder / file, {name: tensors[name] for name in names}, written)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum(tensor.size for tensor in tensors.values())
        paths.write(folder / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
    for file in files:
        (folder / (file + HASHES)).unlink()
    return hashes


def _write_shard(path: epath.Path, tensors: Tensors, written: Callable[[int], None]) -> dict[str, str]:
    """One file and its hashes, unless they are there."""
    done = path.with_name(path.name + HASHES)
    if path.exists() and done.exists() and tensors.keys() == (hashes := json.loads(done.read_text())).keys():
        written(sum(tensor.size for tensor in tensors.values()))
        return hashes
    hashes = {}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # so each begins at a multiple of its item size
    with paths.writing(path) as file:
        file.write(_header(tensors))
        for name, tensor in tensors.items():
            hashes[name] = write_tensor(file, name, tensor, written)
        done.write_text(json.dumps(hashes))
    return hashes


def _header(tensors: Tensors) -> bytes:
    facts, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [offset, offset + tensor.size]
        facts[name] = {"dtype": FLOATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(facts).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text


def write_tensor(file: IO[bytes], name: str, tensor: Tensor, written: Callable[[int], None]) -> str:
    """Its bytes, little-endian and in C order, to an open file; returns its hash. Raises ValueError as `write_folder`."""
    array, content = tensor.read(), _begin(tensor.dtype, tensor.shape)
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {tensor.dtype} {tensor.shape}")
    infinity = INFINITY[FLOATS[array.dtype]]
    for bits in _blocks(array):
        if bits.size and (bits << 1 >> 1).max() >= infinity:  # without the sign
            raise ValueError(f"{name} holds NaN or infinity; mend the checkpoint that it comes from")
        content.update(bits)
        file.write(bits)
        written(bits.nbytes)
    return content.hexdigest()


def _begin(dtype: np.dtype, shape: tuple[int, ...]):
    return hashlib.sha256(f"{dtype} {shape} ".encode())


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's bits in C order, as flat unsigned integers, about BLOCK bytes at a time."""
    array = array.reshape(1) if array.ndim == 0 else array
    rows = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        yield _contiguous(array[first : first + rows]).reshape(-1).view(f"u{array.itemsize}")


def _contiguous(block: np.ndarray, tile: int = 64) -> np.ndarray:
    """C order. Transposed blocks are copied by tiles that fit the cache: six times as fast as in one piece."""
    if block.flags.c_contiguous:
        return block
    out = np.empty(block.shape, block.dtype)
    for first in range(0, block.shape[-1], tile):
        out[..., first : first + tile] = block[..., first : first + tile]
    return out
