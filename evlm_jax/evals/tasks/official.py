"""Official files, row by row: what is missing is named with file and row."""

import csv
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from evlm_jax.data.containers import text
from evlm_jax.data.samples import ImageRef

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".webp", ".gif", ".bmp")


class Entry:
    """An entry of a file. A field that is not there raises ValueError."""

    def __init__(self, file: Path, number: int | str, data: Mapping):
        self.file, self.number, self.data = file, number, data
        if not isinstance(data, Mapping):
            raise self.error(f"is {type(data).__name__}, not an object")

    def __getitem__(self, key: str):
        if key not in self.data:
            raise self.error(f"no field {key!r}; there are {', '.join(map(str, self.data))}")
        return self.data[key]

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def get(self, key: str, default=None):
        """What may be left out."""
        return self.data.get(key, default)

    def error(self, text: str) -> ValueError:
        """A ValueError about this row."""
        return ValueError(f"{self.file}: row {self.number}: {text}")

    def image(self, *places: Path) -> tuple[tuple[ImageRef, ...], ...]:
        """The visuals of a question about one image, at the first of the places that exists."""
        # a row names no file elsewhere: the data lie in the folder of its file, or in the one above
        for place in places:
            common = os.path.commonprefix([place.parts, self.file.parts])
            if ".." in place.parts[len(common) :] or len(common) < len(self.file.parts) - 2:
                raise self.error(f"the image {place} is not below the data")
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise self.error(f"no image {' or '.join(map(str, places))}")
        return ((ImageRef(str(found)),),)

    def answers(self, given: Iterable[str], count: int) -> list[str]:
        """The answers, if there are `count` of them."""
        given = list(given)
        if len(given) != count:
            raise self.error(f"{len(given)} answers, there must be {count}")
        return given


def read_json(file: Path, *keys: str):
    """Content of a JSON file, or the value at these keys of it."""
    if not file.is_file():
        raise ValueError(f"no file {file}")
    try:
        content = text.parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{file}: no field {key!r}")
        content = content[key]
    return content


def json_rows(file: Path, *keys: str) -> list[Entry]:
    """The entries of a list, numbered from 1, or of an object, by key."""
    content = read_json(file, *keys)
    if not isinstance(content, Mapping | list):
        raise ValueError(f"{file}: there must be a list or an object, not {type(content).__name__}")
    entries = content.items() if isinstance(content, Mapping) else enumerate(content, 1)
    return [Entry(file, number, data) for number, data in entries]


def json_lines(file: Path) -> list[Entry]:
    """One entry a line."""
    if not file.is_file():
        raise ValueError(f"no file {file}")
    rows = []
    for number, line in enumerate(text_lines(file), 1):
        try:
            rows.append(Entry(file, number, text.parse(line.encode())))
        except ValueError as error:
            raise ValueError(f"{file}: row {number}: not JSON: {error}") from error
    return rows


def text_lines(file: Path) -> list[str]:
    """The lines of a text file. Raises ValueError that names it."""
    try:
        return text.lines(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def tsv_rows(file: Path, columns: Iterable[str]) -> list[Entry]:
    """A table with a header that has at least these columns."""
    if not file.is_file():
        raise ValueError(f"no file {file}; give the .tsv itself")
    csv.field_size_limit(sys.maxsize)  # images stand in it
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(lines, delimiter="\t")
        header = next(table, [])
        if lacking := [name for name in columns if name not in header]:
            raise ValueError(
                f"{file}: row 1: no column {', '.join(lacking)}; there are {', '.join(header)}"
            )
        if twice := {name for name in header if header.count(name) > 1}:
            raise ValueError(f"{file}: row 1: {', '.join(sorted(twice))} stands there twice")
        rows = []
        for number, cells in enumerate(table, 2):
            if len(cells) != len(header):
                raise ValueError(
                    f"{file}: row {number}: {len(cells)} columns, the header has {len(header)}"
                )
            rows.append(Entry(file, number, dict(zip(header, cells))))
    return rows
