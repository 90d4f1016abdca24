"""The weights of an ONNX file, by their module names.

An own walk over the file's protobuf messages: the bytes of tensors stay in the file until they are
read, and a hostile file of empty messages takes no memory, where a protobuf library makes an object
of each."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, content

GRAPH, NODE, INITIALIZER = 7, 1, 5  # field numbers: of ModelProto, and of GraphProto
NODE_INPUT, NODE_NAME, NODE_TYPE = 1, 3, 4
DIMS, DATA_TYPE, FLOATS, NAME, RAW, EXTERNAL, LOCATION = 1, 2, 4, 8, 9, 13, 14  # of TensorProto
TYPES = {
    1: "<f4",
    2: "u1",
    3: "i1",
    6: "<i4",
    7: "<i8",
    9: "?",
    10: "<f2",
    11: "<f8",
    16: ml_dtypes.bfloat16,
}
FLOATING = (1, 10, 11, 16)
CONSTANTS, AXES, FIELDS = (
    2**16,
    8,
    2**18,
)  # weights of a file, axes of a tensor, and fields that are looked at, at most
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Span = tuple[int, int]  # start and stop of bytes in the file


class Constant(NamedTuple):
    """An initializer."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # of its bytes in the file


class Messages:
    """A file of protobuf messages, read field by field, at most FIELDS of them.

    Methods raise ValueError.
    """

    def __init__(self, data: memoryview):
        self.data, self.left = data, FIELDS

    def number(self, at: int, stop: int) -> tuple[int, int]:
        """(number, position behind it)."""
        value = shift = 0
        while at < stop and shift < 70:
            byte = self.data[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value, at
        raise ValueError(f"no number at byte {at}")

    def fields(self, at: int, stop: int) -> Iterator[tuple[int, int | Span]]:
        """(field number, a number or where its bytes are) of the message at at..stop."""
        while at < stop:
            self.left -= 1
            key, at = self.number(at, stop)
            if self.left < 0:
                raise ValueError(f"more than {FIELDS} fields")
            if key & 7 == VARINT:
                value, at = self.number(at, stop)
                yield key >> 3, value
                continue
            if key & 7 == BYTES:
                length, at = self.number(at, stop)
            elif key & 7 in (FIXED32, FIXED64):
                length = 4 if key & 7 == FIXED32 else 8
            else:
                raise ValueError(f"a field of type {key & 7} at byte {at}")
            if length > stop - at:
                raise ValueError(
                    f"ends at byte {stop}, where {length} bytes from {at} on are needed"
                )
            yield key >> 3, (at, at + length)
            at += length

    def text(self, span: int | Span) -> str:
        """A name."""
        if isinstance(span, int):
            raise ValueError("a number in place of a name")
        return str(self.data[slice(*span)], "utf-8")

    def numbers(self, value: int | Span) -> list[int]:
        """A number, or packed ones, of which there are no more than AXES."""
        if isinstance(value, int):
            return [value]
        (at, stop), found = value, []
        while at < stop and len(found) <= AXES:
            one, at = self.number(at, stop)
            found.append(one)
        return found


def _constant(file: Messages, span: Span) -> Constant | None:
    """An initializer; None where it is of a type that no weight has.

    Raises ValueError where its bytes are not as its shape says.
    """
    name, shape, kind, held = "", [], 0, []
    for field, value in file.fields(*span):
        if field == NAME:
            name = file.text(value)
        elif field == DIMS and len(shape) <= AXES:
            shape += file.numbers(value)
        elif field == DATA_TYPE:
            kind = value
        elif (field == RAW or (field == FLOATS and kind == 1)) and not isinstance(value, int):
            held.append(value)
        elif field == EXTERNAL or (field == LOCATION and value):
            raise ValueError(
                f"the bytes of {name or 'a tensor'} are in another file: export it with all weights"
                " inside"
            )
    if kind not in TYPES or (kind not in FLOATING and not held):
        return None
    dtype, size = np.dtype(TYPES[kind]), math.prod(shape) * np.dtype(TYPES[kind]).itemsize
    start, stop = held[0] if len(held) == 1 else (span[0], span[0])
    if not name or len(shape) > AXES or stop - start != size:
        raise ValueError(
            f"{name or 'a tensor'} has {stop - start} bytes, a shape {tuple(shape)} of {dtype} has"
            f" {size}"
        )
    return Constant(name, tuple(shape), dtype, start)


def _product(file: Messages, span: Span) -> tuple[str, str] | None:
    """(second input, name) of a MatMul node; None of another."""
    inputs, name, kind = [], (0, 0), (0, 0)
    for field, value in file.fields(*span):
        if field == NODE_INPUT and len(inputs) < 2:
            inputs.append(value)
        elif field == NODE_NAME:
            name = value
        elif field == NODE_TYPE:
            kind = value
    return (
        (file.text(inputs[1]), file.text(name))
        if file.text(kind) == "MatMul" and len(inputs) == 2
        else None
    )


def _walk(file: Messages) -> tuple[dict[str, Constant], list[tuple[str, str]]]:
    """Initializers by name, and the `_product`s, of the graph.

    Raises ValueError for more than models have.
    """
    constants, products = {}, []
    graphs = [
        value
        for field, value in file.fields(0, len(file.data))
        if field == GRAPH and not isinstance(value, int)
    ]
    for part, span in (field for graph in graphs for field in file.fields(*graph)):
        if part == INITIALIZER and not isinstance(span, int) and (found := _constant(file, span)):
            if found.name in constants:
                raise ValueError(f"{found.name} stands twice")
            constants[found.name] = found
        elif part == NODE and not isinstance(span, int) and (product := _product(file, span)):
            products.append(product)
        if max(len(constants), len(products)) > CONSTANTS:
            raise ValueError(f"more than {CONSTANTS} weights")
    return constants, products


def read_onnx(path: Path) -> Source:
    """The weights of a PyTorch export.

    The exporter keeps the names of biases and norms, hides linear weights (transposed) in MatMul
    nodes that are named after the module, and folds DINOv2's position table into two unnamed
    constants: class row and patch rows.

    Raises:
      ValueError: no ONNX file, cut short, weights in another file.
    """
    with open(path, "rb") as file:
        if what := content(file.read(32)):
            raise ValueError(f"{path} is {what}")
    try:
        constants, products = _walk(Messages(memoryview(np.memmap(path, np.uint8, mode="r"))))
    except ValueError as error:
        raise ValueError(
            f"{path}: no ONNX file that can be read, fetch it again: {error}"
        ) from error

    def array(c):
        return np.fromfile(path, c.dtype, math.prod(c.shape), offset=c.start).reshape(c.shape)

    plain = {name: c for name, c in constants.items() if not name.startswith("onnx::")}
    tensors = {name: Tensor(c.shape, c.dtype, lambda c=c: array(c)) for name, c in plain.items()}
    for source, node in products:
        if (c := constants.pop(source, None)) is not None:
            name = node.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            tensors[name] = Tensor(c.shape[::-1], c.dtype, lambda c=c: array(c).T)
    folded = [c for name, c in constants.items() if name.startswith("onnx::") and len(c.shape) == 3]
    if len(folded) == 2 and folded[0].shape[2] == folded[1].shape[2]:
        shape = (1, sum(c.shape[1] for c in folded), folded[0].shape[2])
        positions = Tensor(
            shape, folded[0].dtype, lambda: np.concatenate([array(c) for c in folded], 1)
        )
        tensors["backbone.embeddings.position_embeddings"] = positions
    if not tensors:
        raise ValueError(f"{path}: no ONNX file with weights; export the model again")
    return Source(path, {}, tensors)
