"""Parquet: rows by number, a row group at a time; pictures are named, and read when they are
wanted.
"""

import functools
import threading
from collections.abc import Sequence
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evlm_jax.data.containers import files, footer

KEPT = 4  # tables of row groups in memory
SHAPES = 1 << 10  # columns of row groups, without their bytes
BYTES = object()  # a binary value that was not read
_one_at_a_time = threading.Lock()  # readers of one file


class Parquet(Sequence):
    """Rows {column: value}.

    Binary values, also as "bytes" of a struct or of a list of structs, are references.
    """

    def __init__(self, path: str):
        self.path, self._version, self._lacking = path, files.version(path), {}
        with files.open_file(path) as file:
            opened = pq.ParquetFile(file)
            self._schema, self._leaves, self._gaps = (
                opened.schema_arrow,
                _leaves(opened),
                _gaps(opened, footer.null_counts(file)),
            )
        self._ends = _ends(path, self._version)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group, place = _find(self._ends, index)
        table = _table(self.path, self._version, group, self._leaves) if self._leaves else None
        row = {}
        for field in self._schema:
            if (group, field.name) in self._gaps and self._lacks(group, field, table):
                value = _shapes(self.path, self._version, group, field.name)[place]
            else:
                value = (
                    table[field.name][place].as_py()
                    if table is not None and field.name in table.column_names
                    else None
                )
                value = _full(field.type, value)
            row[field.name] = _named(value, f"{index}/{quote(field.name, safe='')}", self.path)
        return row

    def _lacks(self, group: int, field: pa.Field, table: pa.Table | None) -> bool:
        """Whether a binary value may lack in a row group."""
        key = group, field.name
        if key not in self._lacking:
            lacking = self._gaps[key]
            if (
                lacking
                and _is_list(field.type)
                and table is not None
                and field.name in table.column_names
            ):
                lengths = pc.list_value_length(table[field.name])
                lacking -= len(lengths) - (pc.sum(pc.greater(lengths, 0)).as_py() or 0)
            self._lacking[key] = lacking != 0
        return self._lacking[key]


def downloaded(path: str) -> list[int] | None:
    """The rows of img2dataset's table whose pictures it got; None where it is no such table. Raises
    OSError, or ValueError.
    """
    with files.open_file(path) as file:
        if "status" not in pq.read_schema(file).names:
            return None
    return [
        number
        for number, status in enumerate(read_columns(path, ["status"])["status"])
        if status == "success"
    ]


def read_columns(path: str, columns: Sequence[str]) -> dict[str, list]:
    """Whole columns. Raises OSError, or ValueError that names the file."""
    try:
        with files.open_file(path) as file:
            return pq.read_table(file, columns=list(columns)).to_pydict()
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: cannot read the columns {', '.join(columns)}: {error}"
        ) from error


def read(place: str, path: str, _most: int) -> bytes:
    """The bytes of a reference: place = ROW/COLUMN/...; names and numbers lead into structs and
    lists.
    """
    row, column, *inner = map(unquote, place.split("/"))
    ends = _ends(path, files.version(path))
    group, at = _find(ends, int(row))
    value = _table(path, files.version(path), group, (column,))[column][at].as_py()
    for step in inner:
        value = value and value[int(step) if isinstance(value, list) else step]
    if value is None:
        raise ValueError("the cell is empty")
    return value


def _named(value, place: str, path: str):
    """`value` with references in place of BYTES."""
    if value is BYTES:
        return files.Ref(f"parquet://{place}::{path}")
    if isinstance(value, dict):
        return {
            name: _named(inner, f"{place}/{quote(name, safe='')}", path)
            for name, inner in value.items()
        }
    return (
        [_named(inner, f"{place}/{i}", path) for i, inner in enumerate(value)]
        if isinstance(value, list)
        else value
    )


def _full(kind: pa.DataType, value):
    """`value` with BYTES in place of the binary values that were not read, of a row group in which
    none lacks.
    """
    if _is_binary(kind):
        return BYTES
    if pa.types.is_struct(kind):
        inner = {field.name: _full(field.type, (value or {}).get(field.name)) for field in kind}
        return inner if value is not None or _holds_binary(kind) else None
    if value is not None and _is_list(kind):
        return [_full(kind.value_type, inner) for inner in value]
    return value


def _hollow(value):
    """`value` with BYTES in place of binary values."""
    if isinstance(value, bytes):
        return BYTES
    if isinstance(value, dict):
        return {name: _hollow(inner) for name, inner in value.items()}
    return [_hollow(inner) for inner in value] if isinstance(value, list) else value


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    found = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(is_one(kind) for is_one in found)


def _is_list(kind: pa.DataType) -> bool:
    found = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(is_one(kind) for is_one in found)


def _holds_binary(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_binary(field.type) for field in kind)
    return _holds_binary(kind.value_type) if _is_list(kind) else _is_binary(kind)


def _gaps(
    opened: pq.ParquetFile, lacking: list[list[int | None]]
) -> dict[tuple[int, str], int | None]:
    """{(row group, column): how many binary values lack in it, an empty list counting as one, or
    None where the file does not tell}.

    `lacking`: the same of each [row group][leaf column].
    """
    found = {}
    tops = [field.name for field in opened.schema_arrow for _ in range(_leaf_count(field.type))]
    if any(len(group) != len(tops) for group in lacking):
        raise ValueError("a row group in its footer has other columns than its schema")
    for i, name in enumerate(tops):
        column = opened.schema.column(i)
        if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY") and _holds_binary(
            opened.schema_arrow.field(name).type
        ):
            for number, group in enumerate(lacking):
                if group[i] != 0 and column.logical_type.type == "NONE":
                    found[number, name] = None if (number, name) in found else group[i]
    return found


def _leaf_count(kind: pa.DataType) -> int:
    if pa.types.is_struct(kind):
        return sum(_leaf_count(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _leaf_count(kind.key_type) + _leaf_count(kind.item_type)
    return _leaf_count(kind.value_type) if _is_list(kind) else 1


def _leaves(opened: pq.ParquetFile) -> tuple[str, ...]:
    """Paths of the columns that are no pictures; of a list of pictures there must be one, to tell
    its length.
    """
    columns = [opened.schema.column(i) for i in range(len(opened.schema))]
    plain = {
        c.path for c in columns if c.physical_type != "BYTE_ARRAY" or c.logical_type.type != "NONE"
    }
    lists = {field.name for field in opened.schema_arrow if _is_list(field.type)}
    told = {path.partition(".")[0] for path in plain}
    return tuple(
        c.path for c in columns if c.path in plain or c.path.partition(".")[0] in lists - told
    )


def _find(ends: np.ndarray, index: int) -> tuple[int, int]:
    group = int(np.searchsorted(ends, index, side="right"))
    return group, index - (int(ends[group - 1]) if group else 0)


@functools.lru_cache(1 << 12)
def _ends(path: str, version: str) -> np.ndarray:
    with files.open_file(path) as file:
        metadata = pq.read_metadata(file)
    return np.cumsum(
        [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64
    )


@functools.lru_cache(SHAPES)
def _shapes(path: str, version: str, group: int, column: str) -> list:
    """The values of a column that lacks some, without their bytes: it is read once for that."""
    return [
        _hollow(value.as_py())
        for value in _table.__wrapped__(path, version, group, (column,))[column]
    ]


@functools.lru_cache(KEPT)
def _table(path: str, version: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    with _one_at_a_time, files.open_file(path) as file:
        return pq.ParquetFile(file).read_row_group(group, list(columns), use_threads=False)
