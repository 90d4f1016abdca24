"""GGUF, the files of llama.cpp: weights and vocabulary."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, content

SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
STRINGS = (
    2**20
)  # in one file, more than any vocabulary with its merges: a hostile file takes no more memory
AXES = 4


class Cursor:
    """Reads values from a file's bytes in order."""

    def __init__(self, data: memoryview):
        self.data, self.position, self.strings = data, 0, 0

    def skip(self, length: int) -> memoryview:
        """The next `length` bytes."""
        start = self.position
        if length > len(self.data) - start:
            raise ValueError(
                f"ends at byte {len(self.data)}, where {length} bytes from {start} on are needed"
            )
        self.position += length
        return self.data[start : self.position]

    def number(self, kind: str) -> int:
        """The next number, of a format character of `struct`."""
        return struct.unpack("<" + kind, self.skip(struct.calcsize("<" + kind)))[0]

    def texts(self, count: int) -> list[str]:
        """The next `count` texts."""
        self.strings += count
        if self.strings > STRINGS:
            raise ValueError(f"more than {STRINGS} texts")
        data, at, found, length = self.data, self.position, [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            if (stop := at + 8) > len(data) or (stop := stop + length(data, at)[0]) > len(data):
                raise ValueError(f"ends at byte {len(data)}, in a text that begins at {at}")
            found.append(str(data[at + 8 : stop], "utf-8"))
            at = stop
        self.position = at
        return found

    def text(self) -> str:
        """The next text."""
        return self.texts(1)[0]

    def value(self) -> Any:
        """A number, a flag, a text, a list of texts, or an array of numbers."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            return self.texts(count) if kind == STRING else self.numbers(kind, count)
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        """The next `count` numbers of a GGUF type. Raises ValueError for an unknown one."""
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind} at byte {self.position}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.skip(count * dtype.itemsize), dtype)


def read_gguf(path: Path) -> Source:
    """Reads GGUF versions 2 and 3, little-endian; quantised tensors are dequantised to float32 when
    read.

    Its header parser is our own, because gguf.GGUFReader makes an array object of every vocabulary
    entry (5 s instead of 0.2 s).

    Raises:
      ValueError: no GGUF file; truncated; tensors that overlap, leave gaps, are listed twice or
        have a shape that their type cannot have.
    """
    with open(path, "rb") as file:
        begin = file.read(32)
    if (
        begin[:4] != b"GGUF"
        or len(begin) < 24
        or struct.unpack_from("<I", begin, 4)[0] not in (2, 3)
    ):
        what = content(begin) if begin[:4] != b"GGUF" else ""
        raise ValueError(
            f"{path} is {what}" if what else f"{path}: not a GGUF file of version 2 or 3"
        )
    try:
        return _read(path, Cursor(memoryview(np.memmap(path, np.uint8, mode="r"))))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, fetch it again: {error}") from error


def _read(path: Path, cursor: Cursor) -> Source:
    """Raises ValueError without the file's name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    cursor.skip(8)
    count, pairs = cursor.number("Q"), cursor.number("Q")
    metadata, infos = {}, {}
    for _ in range(pairs):
        if (key := cursor.text()) in metadata:
            raise ValueError(f"{key} stands twice")
        metadata[key] = cursor.value()
    for _ in range(count):
        name, axes = cursor.text(), cursor.number("I")
        if name in infos or axes > AXES:
            raise ValueError(f"{name} stands twice, or has more than {AXES} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        infos[name] = shape, GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, no power of two")

    def padded(length):
        return -(-length // alignment) * alignment

    base, stop, tensors = padded(cursor.position), 0, {}
    for name, (shape, kind, offset) in infos.items():
        block, size = GGML_QUANT_SIZES[kind]
        length = math.prod(shape) // block * size
        if not shape or shape[-1] % block or 0 in shape:
            raise ValueError(f"{name} has shape {shape}, which {kind.name} cannot have")
        if offset != stop or base + offset + length > len(cursor.data):
            raise ValueError(
                f"{name} lies at {offset}..{offset + length}, not behind the tensor before it, or"
                " beyond the end of the file"
            )
        stop = padded(offset + length)
        rows = (*shape[:-1], shape[-1] // block * size)

        def read(
            shape=shape, kind=kind, start=base + offset, length=length, rows=rows
        ) -> np.ndarray:
            return quants.dequantize(
                np.fromfile(path, np.uint8, length, offset=start).reshape(rows), kind
            ).reshape(shape)

        tensors[name] = Tensor(shape, np.dtype(np.float32), read)
    return Source(path, metadata, tensors)
