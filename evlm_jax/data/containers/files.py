"""Files by path, or by a URL that fsspec opens (gs://, s3://, memory://, ...), and indices of large
files that are kept in the cache.
"""

import errno
import functools
import hashlib
import os
import posixpath
import stat
import tempfile
from collections.abc import Callable, Iterable
from typing import BinaryIO

import fsspec
import numpy as np

from evlm_jax import paths, stores
from evlm_jax.assets import cache_root
from evlm_jax.paths import remote

SMALL = 1 << 24  # bytes: the index of a smaller file is made anew
OPEN = 64  # files that stay open


class Ref(str):
    """A place in a container, as rows.open_ref reads it.

    Readers make them: a text in a row that spells one is just a name.
    """

    __slots__ = ()


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading. Raises OSError, also for a device or a pipe, which may have no
    end.
    """
    if not remote(path):
        if not stat.S_ISREG(kind := os.stat(path).st_mode) and not stat.S_ISDIR(
            kind
        ):  # of a folder `open` tells
            raise OSError(errno.EINVAL, "not a regular file", path)
        return open(path, "rb")
    system, inner = _system(path)
    return system.open(inner, "rb")


def _system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system of a path, and the path within it. A local one is never read as fsspec's chain of
    several (a::b). Raises ValueError for an unknown scheme, or one whose client is missing.
    """
    if not remote(path):
        return fsspec.filesystem("file"), os.path.abspath(path)
    try:
        stores.ask(path)
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{path}: {error}; a path is local, gs://, s3://, or what fsspec opens"
        ) from error


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` on. Raises OSError, and ValueError where the file ends before."""
    if remote(path):
        system, inner = _system(path)
        content = system.cat_file(inner, start, start + size)
    else:
        # every system call lets other threads take the lock: one, those of a file object are seven
        file = _opened(path)
        content = os.pread(file.number, size, start)
        while 0 < len(content) < size and (
            more := os.pread(file.number, size - len(content), start + len(content))
        ):
            content += more  # Linux reads at most 2 GiB at once
    if len(content) != size:
        raise ValueError(f"the file ends before byte {start + size}")
    return content


class _Descriptor:
    """An open file, closed when it is no longer referenced."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        if hasattr(self, "number"):
            close(self.number)


@functools.lru_cache(OPEN)
def _opened(path: str) -> _Descriptor:
    """A file that stays open between reads; `index` closes all, so that a container that is opened
    anew is read as it is then.
    """
    return _Descriptor(path)


def version(path: str) -> str:
    """`paths.version` of a data file. Raises OSError."""
    return _remote_version(path) if remote(path) else paths.version(path)


@functools.lru_cache(1 << 16)
def _remote_version(path: str) -> str:
    """Asked for once: what is remote does not change while a run reads it."""
    return paths.version(path)


def find(path: str, suffixes: Iterable[str]) -> list[str]:
    """A file; or the files below a folder, or that match a pattern, with one of the suffixes, in
    order of name.

    Hidden files and folders are skipped, also those that other systems leave beside a file
    (._a.jpg). Raises FileNotFoundError.
    """
    path = path if remote(path) else os.path.expanduser(path)
    system, inner = _system(path)
    if system.isfile(inner):
        return [path]
    folder = system.isdir(inner)
    found = system.find(inner) if folder else system.glob(inner)
    if not found and not folder:
        raise FileNotFoundError(f"{path}: no such file, folder or pattern of files")

    def hidden(file):
        return "/." in (file[len(inner) :] if folder else f"/{posixpath.basename(file)}")

    kept = sorted(
        file for file in found if file.lower().endswith(tuple(suffixes)) and not hidden(file)
    )
    return [system.unstrip_protocol(file) for file in kept] if remote(path) else kept


def join(folder: str, name: str) -> str:
    """`name` in `folder`; a name that is absolute or a URL stays as it is, an empty one is the
    folder.
    """
    if not name:
        return folder
    return name if remote(name) else posixpath.join(folder, name)


def inside(folder: str, name: str) -> str:
    """Path of a file that a row names: in `folder`, or a whole path or URL that is below it.
    References of readers stay as they are.

    Rows are untrusted, so a name decides neither which host is contacted nor which folder is read.
    Raises ValueError.
    """
    if isinstance(name, Ref):
        return name
    if (
        not isinstance(name, str) or not name or "\0" in name or ("::" in name and remote(folder))
    ):  # fsspec chains what :: joins
        raise ValueError(f"{name!r} is no name of a file")
    path = join(folder, name)
    (scheme, below), (own, top) = _place(path), _place(folder)
    if scheme != own or (below != top and not below.startswith(top.rstrip("/") + "/")):
        raise ValueError(
            f"{name!r} is not below {folder or 'the current folder'}: images=FOLDER says where"
            " pictures are"
        )
    return path


def _place(path: str) -> tuple[str, str]:
    """Scheme and path, without . and .. in it."""
    scheme, mark, rest = path.rpartition("://")
    return scheme + mark, posixpath.normpath(rest if mark else os.path.abspath(path))


def parent(path: str, levels: int = 1) -> str:
    """The folder of a file, or one further up."""
    for _ in range(levels):
        path = posixpath.dirname(path)
    return path


def index(path: str, kind: str, build: Callable[[BinaryIO], np.ndarray]) -> np.ndarray:
    """`build(file)`, which for large files is kept in the cache and mapped into memory, until the
    file changes.

    Args:
      kind: of the index, part of its name.
    """
    _opened.cache_clear()
    state = version(path)
    with open_file(path) as file:
        if file.seek(0, os.SEEK_END) < SMALL:
            file.seek(0)
            return build(file)
        name = hashlib.sha256(
            repr((os.path.abspath(path) if not remote(path) else path, state)).encode()
        ).hexdigest()[:32]
        kept = cache_root() / "index" / f"{name}.{kind}.npy"
        if not kept.exists():
            file.seek(0)
            array = build(file)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as part:
                np.save(part, array)
            os.replace(part.name, kept)
    return np.asarray(
        np.load(kept, mmap_mode="r")
    )  # slices of a np.memmap take eight times as long
