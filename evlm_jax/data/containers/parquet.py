"""Parquet: rows by number, a row group at a time; pictures are named, and read when they are wanted."""

import functools
import threading
from collections.abc import Sequence
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evlm_jax.data.containers import files

KEPT = 4  # tables of row groups in memory
_one_at_a_time = threading.Lock()  # readers of one file


class Parquet(Sequence):
    """Rows {column: value}. Binary values, also as "bytes" of a struct or of a list of structs, are references."""

    def __init__(self, path: str):
        self.path, self._version = path, files.version(path)
        with files.open_file(path) as file:
            opened = pq.ParquetFile(file)
            self._schema, self._leaves = opened.schema_arrow, _leaves(opened)
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
            value = table[field.name][place].as_py() if table is not None and field.name in table.column_names else None
            row[field.name] = _named(field.type, value, f"{index}/{quote(field.name, safe='')}", self.path)
        return row


def read_columns(path: str, columns: Sequence[str]) -> dict[str, list]:
    """Whole columns. Raises OSError, or ValueError that names the file."""
    try:
        with files.open_file(path) as file:
            return pq.read_table(file, columns=list(columns)).to_pydict()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: cannot read the columns {', '.join(columns)}: {error}") from error


def read(place: str, path: str) -> bytes:
    """The bytes of a reference: place = ROW/COLUMN/...; names and numbers lead into structs and lists."""
    row, column, *inner = map(unquote, place.split("/"))
    ends = _ends(path, files.version(path))
    group, at = _find(ends, int(row))
    value = _table(path, files.version(path), group, (column,))[column][at].as_py()
    for step in inner:
        value = value and value[int(step) if isinstance(value, list) else step]
    if value is None:
        raise ValueError("the cell is empty")
    return value


def _named(kind: pa.DataType, value, place: str, path: str):
    """`value` with references in place of the binary values that were not read."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return f"parquet://{place}::{path}"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return {**(value or {}), "bytes": f"parquet://{place}/bytes::{path}"}
    if value is not None and _is_list(kind):
        return [_named(kind.value_type, inner, f"{place}/{i}", path) for i, inner in enumerate(value)]
    return value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _leaves(opened: pq.ParquetFile) -> tuple[str, ...]:
    """Paths of the columns that are no pictures; of a list of pictures there must be one, to tell its length."""
    columns = [opened.schema.column(i) for i in range(len(opened.schema))]
    plain = {c.path for c in columns if c.physical_type != "BYTE_ARRAY" or c.logical_type.type != "NONE"}
    lists = {field.name for field in opened.schema_arrow if _is_list(field.type)}
    told = {path.partition(".")[0] for path in plain}
    return tuple(c.path for c in columns if c.path in plain or c.path.partition(".")[0] in lists - told)


def _find(ends: np.ndarray, index: int) -> tuple[int, int]:
    group = int(np.searchsorted(ends, index, side="right"))
    return group, index - (int(ends[group - 1]) if group else 0)


@functools.lru_cache(1 << 12)
def _ends(path: str, version: str) -> np.ndarray:
    with files.open_file(path) as file:
        metadata = pq.read_metadata(file)
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64)


@functools.lru_cache(KEPT)
def _table(path: str, version: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    with _one_at_a_time, files.open_file(path) as file:
        return pq.ParquetFile(file).read_row_group(group, list(columns), use_threads=False)
