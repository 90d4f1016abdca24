"""Local or remote: the one place that decides, and what stores of objects do otherwise than disks.

What has a scheme is remote. Runs, towers, exports and results may lie at gs:// and s3://, which
orbax, tensorstore and epath know, and single data files at whatever fsspec opens. A store has no
folders that could be made, renamed or dated, and nothing there is appended to; an object has its
name when it is complete. So what is written piece by piece gets a mark when it is whole, and
libraries that write or map local files only have a `Mirror`, or a copy in the cache (`here`).
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec
from etils import epath

from evlm_jax import stores
from evlm_jax.assets import cache_root

CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> what fsspec opens it by
BLOCK = 1 << 24  # bytes that are copied at a time
PROBE = 1 << 16  # bytes: more than a full disk has left in its last block
TEXTS = (".json", ".txt", ".model", ".tiktoken", ".jinja")  # what a tokenizer may stand in
COPIES = 60.0  # seconds between the copies of a mirror

os.environ.setdefault(
    "EPATH_USE_TF", "false"
)  # where TensorFlow is installed, epath would ask it: one client for all
# Tensorstore and other hosts write as well: a listing that was kept would not show it. And epath
# finalizes what it writes: with the same options all share one client, which looks for credentials.
for _protocol, _options in (
    ("gcs", {"use_listings_cache": False, "finalize_on_close": True}),
    ("s3", {"use_listings_cache": False}),
):
    fsspec.config.conf[_protocol] = _options | fsspec.config.conf.get(_protocol, {})


def remote(path: str | os.PathLike) -> bool:
    """Whether the path has a scheme, as gs://."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike) -> epath.Path:
    """A path that a user has given: a local one made absolute, a remote one unchanged.

    Raises:
      ValueError: another scheme than gs:// and s3://.
      ImportError: its client is not installed.
      OSError: its store does not answer (stores.ask).
    """
    text = os.fspath(path)
    if text.startswith(("gs:/", "s3:/")) and not text.partition("://")[2].strip("/"):
        raise ValueError(
            f"{text} names no bucket: gs://BUCKET/.., as text (pathlib takes a slash away)"
        )
    if not remote(text):
        try:
            return epath.Path(os.path.abspath(os.path.expanduser(text)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{text}: the working directory is gone") from error
    client = CLIENTS.get(text.partition("://")[0])
    if client is None:
        raise ValueError(
            f"{text}: runs, towers and results are read and written at local paths, gs:// and"
            " s3://: copy it to one of them"
        )
    if importlib.util.find_spec(client) is None:
        raise ImportError(f'{text} needs {client}: pip install "evlm-jax[cloud]"')
    stores.ask(text)
    return epath.Path(text)


def local(path: str | os.PathLike, what: str) -> Path:
    """A path that must be local. Raises ValueError, in which `what` names the argument."""
    if remote(path):
        raise ValueError(
            f"{os.fspath(path)}: {what} is local only: give a local path, and copy (gcloud storage"
            " cp -r, aws s3 cp)"
        )
    return Path(path)


def children(folder: epath.Path) -> list[epath.Path]:
    """Contents of a folder by name, none where it is missing. Raises PermissionError."""
    if remote(folder):
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in found if path.name and path != folder)
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def version(path: str | os.PathLike) -> str:
    """A string that changes when a file does: of size and time for a local one, of the store's
    metadata for a remote one. Raises OSError.
    """
    if remote(path):
        system, inner = fsspec.core.url_to_fs(os.fspath(path))
        return system.ukey(inner)
    stat = os.stat(path)
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def size(path: epath.Path) -> int:
    """Size of a file in bytes. Raises OSError.

    (epath would look up the names of a local file's owners, who need not have any.)
    """
    return path.stat().length if remote(path) else os.path.getsize(path)


def here(path: str | os.PathLike, name: str | None = None) -> Path:
    """A local copy of a file, for readers of local files: a remote one is copied to the cache,
    again when it changes.

    `name`: of its folder in the cache; by default of the file's version.
    """
    if not remote(path):
        return Path(path)
    name = name or hashlib.sha256(f"{path} {version(path)}".encode()).hexdigest()[:32]
    kept = cache_root() / "remote" / name / os.path.basename(path)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        system, inner = fsspec.core.url_to_fs(os.fspath(path))
        with (
            system.open(inner, "rb") as source,
            tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as part,
        ):
            shutil.copyfileobj(source, part, BLOCK)
        os.replace(part.name, kept)
    return kept


def with_neighbours(path: os.PathLike) -> Path:
    """As `here`, for a folder, or a file that needs others beside it: all small ones are copied,
    into one folder.
    """
    if not remote(path):
        return Path(path)
    path = place(path)
    folder = path if path.is_dir() else path.parent
    files = [file for file in children(folder) if file.suffix in TEXTS or file == path]
    name = hashlib.sha256(
        "".join(f"{file} {version(file)}" for file in files).encode()
    ).hexdigest()[:32]
    for file in files:
        here(file, name)
    kept = cache_root() / "remote" / name
    return kept if folder == path else kept / path.name


def make(folder: epath.Path) -> None:
    """Makes a folder, where the file system has folders.

    (A client that is told to make one in a store may make the bucket.)
    """
    if not remote(folder):
        os.makedirs(folder, exist_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Context with a file that gets its name when it is complete, and not after an error."""
    path = place(path)
    make(path.parent)
    part = path if remote(path) else path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # no room, says a write alone
            error.filename = os.fspath(path)
        part.unlink(missing_ok=True)
        raise
    if part != path:
        os.replace(part, path)


def write(path: str | os.PathLike, content: str | bytes) -> epath.Path:
    """Writes a whole file, replacing one of that name. Returns its path."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return place(path)


def move(source: epath.Path, target: epath.Path, mark: str) -> None:
    """Moves a folder within a store; in a bucket object by object, so that after a kill it is
    complete in one of the two places.
    """
    make(target.parent)
    if not remote(source):
        source.rename(target)
        return
    system, inner = fsspec.core.url_to_fs(os.fspath(source))
    system.copy(inner, system._strip_protocol(os.fspath(target)), recursive=True)
    remove(source, mark)


def remove(folder: epath.Path, mark: str) -> None:
    """Removes a folder and all in it, first the file without which it counts as incomplete."""
    if folder.is_dir():
        (folder / mark).unlink(missing_ok=True)
    folder.rmtree()


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a file within a store, on the server of a bucket."""
    system, inner = fsspec.core.url_to_fs(os.fspath(source))
    system.cp_file(inner, system._strip_protocol(os.fspath(target)))


def probe(folder: str | os.PathLike) -> None:
    """Writes a small file and removes it, in a bucket also by tensorstore, which writes the arrays.

    Raises OSError where that fails.
    """
    where = place(folder)
    name = f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        make(where)
        try:
            with (where / name).open("wb") as file:
                file.write(bytes(PROBE))
                file.flush()
        finally:
            (where / name).unlink(missing_ok=True)
        if remote(where):
            stores.within(stores.PATIENCE, _probe_tensorstore, where, name)
    except (FileExistsError, NotADirectoryError) as error:
        above = (path for path in (where, *where.parents) if os.path.lexists(path))
        raise OSError(
            f"{where}: cannot write there: Not a directory: {next(above, where)} is no folder; give"
            " another place"
        ) from error
    except Exception as error:  # clients of stores raise errors of any kind
        text = " ".join(f"{getattr(error, 'strerror', None) or error}".split())
        text = text or type(error).__name__
        raise OSError(
            f"{where}: cannot write there: {text}; give a place that this machine may write to and"
            " that has room"
        ) from error


def probe_above(path: str | os.PathLike) -> None:
    """As `probe`, where a file or folder is to be made later; makes none. Raises OSError."""
    folder = place(path).parent
    while not remote(folder) and not folder.exists():
        folder = folder.parent
    probe(folder)


def probe_file(path: str | os.PathLike) -> None:
    """As `probe_above`; raises OSError where a folder has the name."""
    if place(path).is_dir():
        raise OSError(f"{os.fspath(path)} is a folder: give the name of a file")
    probe_above(path)


def _probe_tensorstore(folder: epath.Path, name: str) -> None:
    import tensorstore

    store = tensorstore.KvStore.open(f"{folder}/").result()
    store.write(name, bytes(1)).result()
    store.write(name, None).result()


class Mirror:
    """A local folder for libraries that write local files only: `here` is `folder` itself, or one
    whose files are copied there.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = place(folder)
        self.here = Path(tempfile.mkdtemp(prefix="evlm-") if remote(self._folder) else self._folder)
        self._copied, self._at = {}, time.monotonic()

    def copy(self, seconds: float = 0.0) -> None:
        """Copies files that have changed since the last call, unless that was less than so many
        seconds ago.
        """
        if not remote(self._folder) or time.monotonic() - self._at < seconds:
            return
        for path in sorted(self.here.rglob("*")):
            if path.is_file() and self._copied.get(path) != (state := version(path)):
                with (
                    path.open("rb") as source,
                    writing(self._folder / path.relative_to(self.here).as_posix()) as target,
                ):
                    shutil.copyfileobj(source, target, BLOCK)
                self._copied[path] = state
        self._at = time.monotonic()

    def close(self) -> None:
        """Copies for the last time and removes the local folder."""
        if remote(self._folder):
            try:
                self.copy()
            finally:
                shutil.rmtree(self.here, ignore_errors=True)
