"""Rows of any container by its suffix, and the bytes behind a reference.

A reference is the path or URL of a file, or a place in a container:

    range://START+SIZE/NAME::FILE       bytes of a file: a member of a tar
    parquet://ROW/COLUMN/...::FILE      a cell
    record://ROW/FIELD::FILE            a field of a record of an ArrayRecord file
    page://NUMBER::SOURCE               a page of a source that draws them (data/ocr)
    scene://NUMBER::SOURCE              a scene likewise (data/scenes)
"""

import importlib
import io
from collections.abc import Sequence
from typing import BinaryIO

from evlm_jax.data.containers import files

# suffix -> module and class or function: what a container needs is imported when it is opened. A
# folder is read as the first that it has.
CONTAINERS = {
    ".tar": ("tar", "Tar"),
    ".array_record": ("records", "Records"),
    ".arrayrecord": ("records", "Records"),
    ".parquet": ("parquet", "Parquet"),
    ".jsonl": ("lines", "Lines"),
    ".json": ("lines", "load_list"),
}
PACKED = (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2")
MOST_BYTES = 1 << 31  # of what is read whole into memory
# kind of reference -> module of evlm_jax.data with `read(place, path, most bytes)`; by name, as the
# one of pages stands above this one
READERS = {
    "range": "containers.tar",
    "parquet": "containers.parquet",
    "record": "containers.records",
    "page": "sources",
    "scene": "sources",
}
DRAWN = ("page", "scene")


def find(path: str) -> list[str]:
    """The container files that a path means: a file, a pattern, or those of one kind below a
    folder. Raises FileNotFoundError.
    """
    found = files.find(path, CONTAINERS)
    kind = next(
        (suffix for suffix in CONTAINERS if any(file.endswith(suffix) for file in found)), None
    )
    if kind is None:
        packed = f"; {path} is compressed: unpack it" if path.endswith(PACKED) else ""
        raise FileNotFoundError(
            f"{path}: no file with one of the suffixes {', '.join(CONTAINERS)}{packed}"
        )
    return [file for file in found if file.endswith(kind)]


def open_rows(path: str) -> Sequence[dict]:
    """The rows of one container file.

    Raises ValueError that names it; a row that cannot be read raises errors of any kind.
    """
    module, name = next(value for suffix, value in CONTAINERS.items() if path.endswith(suffix))
    try:
        return getattr(_module(f"containers.{module}"), name)(path)
    except Exception as error:  # of damaged files readers raise errors of any kind
        raise ValueError(f"{path}: cannot read the file: {error}") from error


def open_ref(ref: str, most: int = MOST_BYTES) -> BinaryIO:
    """What a reference names.

    Raises OSError, ValueError, KeyError or IndexError; ValueError for more than `most` bytes.
    """
    kind, place, path = _split(ref)
    if not kind:
        return files.open_file(path)
    content = _module(READERS[kind]).read(place, path, most)
    if not isinstance(content, bytes) or len(content) > most:
        raise ValueError(
            f"{len(content)} bytes, the limit is {most}"
            if isinstance(content, bytes)
            else "the field holds no bytes"
        )
    return io.BytesIO(content)


def version(ref: str) -> str:
    """A string that changes when the file behind a reference does; drawn pictures have a constant
    one. Raises OSError.
    """
    kind, _, path = _split(ref)
    return "" if kind in DRAWN else files.version(path)


def _split(ref: str) -> tuple[str, str, str]:
    """Kind (empty for a file), place, file."""
    kind, mark, rest = ref.partition("://")
    if not mark or kind not in READERS:
        return "", "", ref
    place, _, path = rest.partition("::")
    return kind, place, path


def _module(name: str):
    return importlib.import_module(f"evlm_jax.data.{name}")
