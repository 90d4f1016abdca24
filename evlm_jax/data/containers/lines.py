"""JSON: a file of one row a line, read by places in the file, or a file with one list."""

from collections.abc import Sequence

import numpy as np

from evlm_jax.data.containers import files, text


class Lines(Sequence):
    """The rows of a .jsonl file. Empty lines are none."""

    def __init__(self, path: str):
        self.path = path
        self._places = files.index(path, "lines", _places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict:
        start, size = map(int, self._places[index])
        if size > text.MOST_BYTES:
            raise ValueError(f"a line of {size} bytes, the limit is {text.MOST_BYTES}")
        return text.parse(files.read_range(self.path, start, size))


def _places(file) -> np.ndarray:
    """int64 [rows, 2]: start and length of each line with something in it."""
    places, start = [], 0
    for line in file:
        if line.strip():
            places.append((start, len(line)))
        start += len(line)
    return np.array(places, np.int64).reshape(-1, 2)


def load(path: str):
    """The value in a .json file. Raises ValueError that names the file."""
    try:
        with files.open_file(path) as file:
            return text.parse(file.read())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_list(path: str) -> list:
    """The rows of a .json file. Raises ValueError if there is something else in it."""
    rows = load(path)
    if not isinstance(rows, list):
        keys = (
            f" with the fields {', '.join(map(str, list(rows)[:9]))}"
            if isinstance(rows, dict)
            else ""
        )
        raise ValueError(f"there must be a list of rows, not {type(rows).__name__}{keys}")
    return rows
