"""Tar files in the layout of webdataset and img2dataset: neighbouring members of one key are a row;
read by their places in the file (docs/decisions.md, D-DATA-3 and D-DATA-4).
"""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import BinaryIO
from urllib.parse import quote, unquote

import numpy as np

from evlm_jax.data.containers import files, text

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key, field
KIND = "range://"  # of references to members
BLOCK = 512
MOST_HEADER = 1 << 20  # bytes of a header of a header
# Kinds of members: with contents, without, and those that say something about the next one.
REGULAR, LINKS, EXTENDING = (
    (b"0", b"\0", b"7"),
    (b"1", b"2", b"3", b"4", b"5", b"6"),
    (b"x", b"g", b"L", b"K"),
)
TEXTS = ("txt", "text", "caption", "cls")


class Tar(Sequence):
    """Rows {"__key__": key, "jpg": reference, "txt": text, "json": value}.

    A member's key is its name up to the first dot behind its folder, its field what follows, in
    lower case. Members without a dot, or with one in front, belong to no row, as in webdataset.
    """

    def __init__(self, path: str):
        self.path = path
        self._members = files.index(path, "tar", _members)
        self._groups = self._members["group"]

    def __len__(self) -> int:
        return int(self._groups[-1]) + 1 if len(self._groups) else 0

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = {}
        for start, size, _, name in self._members[
            bisect_left(self._groups, index) : bisect_right(self._groups, index)
        ].tolist():
            name = name.decode(errors="replace")
            if ".." in name.split("/") or name.startswith("/"):
                raise ValueError(f"{name} leads out of the archive")
            row["__key__"], field = MEMBER.fullmatch(name).groups()
            field = field.lower()
            if field in row:
                raise ValueError(f"{name} comes twice")
            try:
                row[field] = self._value(field, name, start, size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return row

    def pictures(self, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(key, reference) of every member in one of these fields."""
        for name, start, size in self._members[["name", "start", "size"]].tolist():
            key, field = MEMBER.fullmatch(name.decode(errors="replace")).groups()
            if field.lower() in fields:
                yield key, self._reference(name.decode(errors="replace"), start, size)

    def _value(self, field: str, name: str, start: int, size: int):
        if field != "json" and field not in TEXTS:
            return self._reference(name, start, size)
        if size > text.MOST_BYTES:
            raise ValueError(f"{size} bytes of text, the limit is {text.MOST_BYTES}")
        content = files.read_range(self.path, start, size)
        return text.parse(content) if field == "json" else text.decode(content).rstrip("\n")

    def _reference(self, name: str, start: int, size: int) -> files.Ref:
        return files.Ref(f"{KIND}{start}+{size}/{quote(name)}::{self.path}")


def name_of(ref: str) -> str:
    """The name of the member that a reference is to."""
    return unquote(ref.partition("::")[0].removeprefix(KIND).partition("/")[2])


def read(place: str, path: str, most: int) -> bytes:
    """The bytes of a reference: place = START+SIZE/NAME."""
    start, size = map(int, place.partition("/")[0].split("+"))
    if size > most:
        raise ValueError(f"{size} bytes, the limit is {most}")
    return files.read_range(path, start, size)


def _members(file: BinaryIO) -> np.ndarray:
    """One element for each member of a row, in the order of the file."""
    found, group, last = [], -1, None
    for name, start, size in headers(file):
        if match := MEMBER.fullmatch(name):
            group += match[1] != last
            last = match[1]
            found.append((start, size, group, name.encode(errors="surrogateescape")))
    width = max((len(name) for *_, name in found), default=1)
    return np.array(
        found, [("start", np.int64), ("size", np.int64), ("group", np.int64), ("name", f"S{width}")]
    )


def headers(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of every regular file in a tar: V7, ustar, pax and GNU. Python's tarfile
    is three times slower.

    Raises ValueError for a damaged or truncated file, and for sparse members.
    """
    end, at = file.seek(0, os.SEEK_END), 0
    extended: dict[str, bytes] = {}  # what headers of headers say about the next member
    while at < end:
        file.seek(at)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            return
        kind, name, size = _header(block, at)
        at += BLOCK
        if kind not in EXTENDING:
            name, size = (
                extended.get("path", name),
                (int(extended.get("size", size)) if kind not in LINKS else 0),
            )
            sparse, extended = any(key.startswith("GNU.sparse") for key in extended), {}
            if kind == b"S" or sparse:
                raise ValueError(f"{name.decode(errors='replace')} is sparse; pack the files anew")
        if kind in EXTENDING and size > MOST_HEADER:
            raise ValueError(f"a header at byte {at} has {size} bytes")
        if at + size > end or size < 0:
            raise ValueError(f"the file ends within {name.decode(errors='replace')}")
        if kind == b"x":
            extended |= _records(file.read(size))
        elif kind == b"L":
            extended["path"] = file.read(size).rstrip(b"\0")
        elif kind in REGULAR and not name.endswith(b"/"):
            yield name.decode(errors="surrogateescape"), at, size
        at += -(-size // BLOCK) * BLOCK
    raise ValueError(
        "the file is cut off: there is no mark of its end" if end else "the file is empty"
    )


def _header(block: bytes, at: int) -> tuple[bytes, bytes, int]:
    """Kind, name and size. Raises ValueError for what is no header."""

    def field(start, stop):
        return block[start:stop].partition(b"\0")[0]

    try:
        whole, told = sum(block) - sum(block[148:156]) + 256, int(field(148, 156) or b"0", 8)
        size = (
            int.from_bytes(block[125:136])
            if block[124] & 128
            else int(field(124, 136).strip() or b"0", 8)
        )
    except (ValueError, IndexError):
        whole, told, size = 0, 1, 0
    if whole != told or len(block) != BLOCK:
        raise ValueError(f"there is no header at byte {at}")
    name, prefix = field(0, 100), field(345, 500)
    return block[156:157], prefix + b"/" + name if prefix else name, size


def _records(content: bytes) -> dict[str, bytes]:
    """Records of a pax header: LENGTH KEY=VALUE, one a line."""
    found = {}
    while content:
        digits, _, rest = content.partition(b" ")
        length = int(digits)
        if length <= len(digits) + 1:
            raise ValueError(f"a header says that it has {length} bytes")
        key, _, value = rest[: length - len(digits) - 2].partition(b"=")
        found[key.decode(errors="replace")] = value
        content = content[length:]
    return found
