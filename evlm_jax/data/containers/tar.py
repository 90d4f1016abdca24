"""Tar files in the layout of webdataset and img2dataset: neighbouring members of one key are a row; read by their places in the file."""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import numpy as np

from evlm_jax.data.containers import files

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key, field
TEXTS = ("txt", "text", "caption", "cls")


class Tar(Sequence):
    """Rows {"__key__": key, "jpg": reference, "txt": text, "json": value}.

    A member's key is its name up to the first dot behind its folder, its field what follows, in lower case. Members without a dot, or
    with one in front, belong to no row, as in webdataset.
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
        for member in self._members[slice(*np.searchsorted(self._groups, [index, index + 1]))]:
            name, start, size = bytes(member["name"]).decode(errors="replace"), int(member["start"]), int(member["size"])
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
        if field == "json":
            return json.loads(files.read_range(self.path, start, size))
        if field in TEXTS:
            return files.read_range(self.path, start, size).decode()
        return self._reference(name, start, size)

    def _reference(self, name: str, start: int, size: int) -> str:
        return f"range://{start}+{size}/{quote(name)}::{self.path}"


def read(place: str, path: str) -> bytes:
    """The bytes of a reference: place = START+SIZE/NAME."""
    start, size = place.partition("/")[0].split("+")
    return files.read_range(path, int(start), int(size))


def _members(file) -> np.ndarray:
    """One element for each member of a row, in the order of the file."""
    found, group, last = [], -1, None
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isfile() and (match := MEMBER.fullmatch(member.name)):
                group += match[1] != last
                last = match[1]
                found.append((member.offset_data, member.size, group, member.name.encode(errors="surrogateescape")))
            archive.members = []  # tarfile remembers all of them
    width = max((len(name) for *_, name in found), default=1)
    return np.array(found, [("start", np.int64), ("size", np.int64), ("group", np.int64), ("name", f"S{width}")])
