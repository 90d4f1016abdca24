"""Null counts out of a Parquet footer, read here: asked for the statistics of a damaged one,
pyarrow ends the whole process (an exception of C++ that nothing catches).

A footer is a struct in Thrift's compact protocol; the numbers below are field ids of
parquet.thrift.
"""

import io
import os
from typing import BinaryIO

STOP, TRUE, FALSE, BYTE, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = (
    0,
    1,
    2,
    3,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
)


def null_counts(file: BinaryIO) -> list[list[int | None]]:
    """Number of nulls as [row group][leaf column], None where the file does not record it.

    Reads a file that pyarrow opens. Raises ValueError.
    """
    file.seek(-8, os.SEEK_END)
    size = int.from_bytes(file.read(4), "little")
    file.seek(-8 - size, os.SEEK_END)
    try:
        groups = _struct(io.BytesIO(file.read(size)))[4]
        told = [[column[3].get(12, {}).get(3) for column in group[1]] for group in groups]
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError("its footer is damaged") from error
    return [[None if count is None else int(count) for count in group] for group in told]


def _struct(data: BinaryIO) -> dict:
    """{field id: value}"""
    found, number = {}, 0
    while (head := data.read(1)[0]) != STOP:
        kind = head & 15
        number = number + (head >> 4) if head >> 4 else _signed(data)
        found[number] = kind == TRUE if kind in (TRUE, FALSE) else _value(data, kind)
    return found


def _value(data: BinaryIO, kind: int):
    if kind in (TRUE, FALSE, BYTE):  # within a list a boolean is a byte
        return data.read(1)[0]
    if kind <= I64:
        return _signed(data)
    if kind in (DOUBLE, BINARY):
        return data.read(8 if kind == DOUBLE else _number(data))
    if kind in (LIST, SET):
        head = data.read(1)[0]
        return [
            _value(data, head & 15) for _ in range(head >> 4 if head >> 4 < 15 else _number(data))
        ]
    if kind == MAP:
        count = _number(data)
        key, value = divmod(data.read(1)[0], 16) if count else (0, 0)
        return [(_value(data, key), _value(data, value)) for _ in range(count)]
    if kind == STRUCT:
        return _struct(data)
    raise ValueError(f"Thrift has no type {kind}")


def _number(data: BinaryIO) -> int:
    """Seven bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number has more than 64 bits")


def _signed(data: BinaryIO) -> int:
    value = _number(data)
    return value >> 1 ^ -(value & 1)
