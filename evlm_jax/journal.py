"""Lines of text that are appended to, also in a store of objects, where nothing is.

A local journal is a file, X.jsonl. A remote one has its lines in parts beside it,
X.jsonl.parts/000001.jsonl and so on: the last part is written anew while it grows, and holds few
lines. Reading knows both forms, wherever they are: runs are copied from and to buckets."""

import os
import time
from collections.abc import Callable, Sequence
from itertools import takewhile

from etils import epath

from evlm_jax.paths import children, make, place, remote, write

PART = 256  # lines of a part
SECONDS = 10.0  # between two writings of a part


def read_lines(path: str | os.PathLike) -> list[str]:
    """The complete lines of a journal, without line ends; one that was cut off by a kill is left
    out.

    Empty where there is no journal.
    """
    return [line for file in _files(place(path)) for line in _lines(file)]


class Journal:
    """Appends to the lines of one path. Lines from the first on for which `keep` is false are
    removed.
    """

    def __init__(self, path: str | os.PathLike, keep: Callable[[str], bool] = lambda line: True):
        self._path = place(path)
        self._part, self._written, self._at = [], 0, time.monotonic()
        make(self._path.parent)
        files = _files(self._path)
        if remote(self._path):
            self._number = int(files[-1].stem) if files and files[-1] != self._path else 0
            self._trim(files, keep)
        else:
            kept = takewhile(keep, [line for file in files for line in _lines(file)])
            write(self._path, "".join(line + "\n" for line in kept))
            if _folder(self._path).exists():
                _folder(self._path).rmtree()

    def append(self, lines: Sequence[str]) -> None:
        """Appends lines. In a bucket they are written some seconds later, or at `flush`."""
        if not remote(self._path):
            with self._path.open("a") as file:
                file.write("".join(line + "\n" for line in lines))
            return
        for line in lines:
            if len(self._part) == PART:
                self.flush()
                self._part, self._written = [], 0
            if not self._part:
                self._number += 1
            self._part.append(line)
        if time.monotonic() - self._at > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all lines that are still buffered."""
        if len(self._part) > self._written:
            write(
                _folder(self._path) / f"{self._number:06}.jsonl",
                "".join(line + "\n" for line in self._part),
            )
            self._written, self._at = len(self._part), time.monotonic()

    @staticmethod
    def _trim(files: list[epath.Path], keep: Callable[[str], bool]) -> None:
        whole = True
        for file in files:
            lines = _lines(file)
            kept = [*takewhile(keep, lines)] if whole else []
            whole = whole and kept == lines
            if kept != lines:
                write(file, "".join(line + "\n" for line in kept)) if kept else file.unlink()


def _folder(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.parts")


def _files(path: epath.Path) -> list[epath.Path]:
    """Those that hold the lines of a journal, in order."""
    parts = [
        part
        for part in children(_folder(path))
        if part.suffix == path.suffix and part.stem.isdigit()
    ]
    return [path, *parts] if path.exists() else parts


def _lines(file: epath.Path) -> list[str]:
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    return whole.decode().split("\n") if whole else []
