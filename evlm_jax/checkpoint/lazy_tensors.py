"""Named tensors that are read one at a time: models of any size pass through little memory.

A `Tensor` is a promise: shape, dtype, and a function that reads it. Maps of them are what
converters hand on, and what checkpoints are opened as."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from evlm_jax import paths

BLOCK = 2**26  # bytes of one tensor that are copied, checked, hashed and written together
ALIGNED = 64  # bytes


class Chunk(NamedTuple):
    """A box of a tensor that is read, and compared with its digest, by itself."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Tensor(NamedTuple):
    """A tensor of a file. `read()` returns the array and caches nothing."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    chunks: tuple[Chunk, ...] = ()  # which cover it; () where it is read whole only
    origin: str = ""  # its name and file, of a folder with several names or files

    @property
    def boxes(self) -> tuple[Chunk, ...]:
        """What can be read by itself: its chunks, or all of it."""
        return self.chunks or (Chunk((0,) * len(self.shape), self.shape, self.read),)

    def astype(self, dtype: np.dtype) -> "Tensor":
        """The tensor with its values in `dtype`."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self

        def cast(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
            return lambda: read().astype(dtype)

        chunks = tuple(chunk._replace(read=cast(chunk.read)) for chunk in self.chunks)
        return Tensor(self.shape, dtype, cast(self.read), chunks, self.origin)

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """A tensor whose array is in memory already."""
        return cls(array.shape, array.dtype, lambda: array)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """Tensors of one shape that are to be one array, `stacked` along a leading axis; or a single
    one.
    """

    tensors: tuple[Tensor, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*((len(self.tensors),) if self.stacked else ()), *self.tensors[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype that holds all of them."""
        return np.result_type(*(tensor.dtype for tensor in self.tensors))


class Source(NamedTuple):
    """Tensors of a checkpoint by name; `metadata` is config.json, the GGUF key-value store, or
    empty.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def spelled(self, name: str) -> str:
        """A tensor as its file calls it, for messages."""
        return self.tensors[name].origin or name


def read_all(tensors: Tensors, threads: int = 1) -> dict[str, np.ndarray]:
    """All tensors as arrays in memory."""
    with ThreadPoolExecutor(threads) as pool:  # reading and hashing let other threads run
        return dict(zip(tensors, pool.map(lambda tensor: tensor.read(), tensors.values())))


def opened(values: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
    """Arrays as tensors that are in memory already; tensors as they are."""
    return {
        name: value if isinstance(value, Tensor) else Tensor.of(value)
        for name, value in values.items()
    }


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """New memory that begins at a multiple of ALIGNED bytes: JAX on a CPU takes it as it is, and
    copies any other.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    begin = -memory.ctypes.data % ALIGNED
    return memory[begin : begin + size].view(dtype).reshape(shape)


def digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes."""
    content = begin_digest(array.dtype, array.shape)
    for bits in blocks(array):
        content.update(bits)
    return content.hexdigest()


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object in UTF-8, with or without a byte order mark. Raises ValueError naming the
    file, also where a field has two values.
    """
    path = paths.place(path)
    try:
        read = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(read).__name__}")
    return read


def distinct(pairs: list[tuple[Any, Any]], kind: str = "field") -> dict:
    """The object of these pairs, for readers of JSON. Raises ValueError for one that occurs twice:
    it has no value that could be trusted.
    """
    if len(found := dict(pairs)) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the {kind} {twice!r} stands there twice")
    return found


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
    rows = _block_rows(array.shape, array.dtype)
    for first in range(0, len(array), rows):
        yield _contiguous(array[first : first + rows]).reshape(-1).view(f"u{array.itemsize}")


def block_boxes(
    shape: tuple[int, ...], dtype: np.dtype
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of each of an array's `blocks`; none where it is one block."""
    if not shape or shape[0] <= (rows := _block_rows(shape, dtype)):
        return []
    zeros = (0,) * (len(shape) - 1)
    firsts = range(0, shape[0], rows)
    return [((first, *zeros), (min(rows, shape[0] - first), *shape[1:])) for first in firsts]


def _block_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return max(1, BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))


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
