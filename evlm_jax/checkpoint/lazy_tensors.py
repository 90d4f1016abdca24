"""Named tensors that are read one at a time: models of any size pass through little memory.

A `Tensor` is a promise: shape, dtype, and a function that reads it. Maps of them are what
converters hand on."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from evlm_jax import paths

BLOCK = 2**26  # bytes of one tensor that are copied, checked, hashed and written together


class Tensor(NamedTuple):
    """A tensor of a file. `read()` returns the array and caches nothing."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """A tensor whose array is in memory already."""
        return cls(array.shape, array.dtype, lambda: array)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


class Source(NamedTuple):
    """Tensors of a checkpoint by name; `metadata` is config.json, the GGUF key-value store, or
    empty.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_all(tensors: Tensors) -> dict[str, np.ndarray]:
    """All tensors as arrays in memory."""
    return {name: tensor.read() for name, tensor in tensors.items()}


def digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes."""
    content = begin_digest(array.dtype, array.shape)
    for bits in blocks(array):
        content.update(bits)
    return content.hexdigest()


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object in UTF-8, with or without a byte order mark. Raises ValueError naming the
    file.
    """
    path = paths.place(path)
    try:
        read = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(read).__name__}")
    return read


CONTENTS = {  # how files begin that people have under another's name
    b"version https://git-lfs": "a Git LFS pointer, not the weights: run git lfs pull",
    b"<": "a page of HTML or XML, not the weights: fetch it again",
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip",
    b"{": "JSON",
}


def content(begin: bytes) -> str:
    """Kind of a file by its first bytes, in words; empty where it is not recognised."""
    if not begin:
        return "empty: copy it again"
    return next((what for magic, what in CONTENTS.items() if begin.startswith(magic)), "")


def begin_digest(dtype: np.dtype, shape: tuple[int, ...]):
    """A hash object for an array, to be updated with its `blocks`."""
    return hashlib.sha256(f"{dtype} {shape} ".encode())


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's bits in C order, as flat unsigned integers, about BLOCK bytes at a time."""
    array = array.reshape(1) if array.ndim == 0 else array
    rows = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        yield _contiguous(array[first : first + rows]).reshape(-1).view(f"u{array.itemsize}")


def _contiguous(block: np.ndarray, tile: int = 64) -> np.ndarray:
    """C order. Transposed blocks are copied by tiles that fit the cache: six times as fast as in
    one piece.
    """
    if block.flags.c_contiguous:
        return block
    out = np.empty(block.shape, block.dtype)
    for first in range(0, block.shape[-1], tile):
        out[..., first : first + tile] = block[..., first : first + tile]
    return out
