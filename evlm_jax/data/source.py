"""Random access to samples: rows of a container, and a mapper that turns a row into a Sample when
it is asked for.
"""

import bisect
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import distinct
from evlm_jax.data.containers import files, rows
from evlm_jax.data.containers.files import Ref
from evlm_jax.data.retry import retried
from evlm_jax.data.samples import MARKER, RowError, Sample, SampleError

KEYS = (
    "id",
    "key",
    "__key__",
    "uuid",
    "url",
    "image",
    "video",
    "file_name",
)  # the first that a row has is its name


class Bad(NamedTuple):
    """An entry of a file that is no sample."""

    key: str
    error: str


class Source(Sequence[Sample]):
    """Samples of one sequence of rows. A row that cannot be read, or is no sample, raises RowError
    with its file, number and key.

    Args:
      name: as in `data.sources`.
      rows: any sequence.
      sample: mapper from a row to its Sample.
      dialogs: mapper from a row to its number of dialogs; by default every row has one.
      where: the file, for errors.
      numbers: of the rows that are samples; all by default.
      beside: further files that samples are made of.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence,
        sample: Callable[..., Sample],
        dialogs: Callable[..., int] | None = None,
        where: str = "",
        numbers: Sequence[int] | None = None,
        beside: Sequence[str] = (),
    ):
        self.name, self.rows, self.where, self._sample, self._dialogs = (
            name,
            rows,
            where,
            sample,
            dialogs,
        )
        self._numbers, self._beside = range(len(rows)) if numbers is None else numbers, beside

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, index = None, self._numbers[index]
        try:
            row = _row(self.rows, index)
            if isinstance(row, Bad):
                raise RowError(f"sample {self.name}/{row.key}: {row.error} ({self.where})")
            made = self._sample(row)
            return check(made) if isinstance(made, Sample) else made
        except SampleError:
            raise
        except (
            Exception
        ) as error:  # readers of damaged files and mappers of wrong rows raise errors of any kind
            place = f"{self.where}: row {index + 1}" if self.where else f"row {index + 1}"
            raise RowError(
                f"sample {self.name}/{key_of(row)}: {type(error).__name__}: {error} ({place})"
            ) from error

    def dialog_counts(self) -> list[int]:
        """Dialogs of every sample, without building the samples."""
        if self._dialogs is None:
            return [1] * len(self)
        return [
            1 if isinstance(row := self.rows[number], Bad) else self._dialogs(row)
            for number in self._numbers
        ]

    def state(self) -> str:
        """A string that changes when what the rows are made of does: files, or lists in memory.

        Raises OSError.
        """
        paths = [*([self.where] if self.where else []), *self._beside]
        held = self.rows if isinstance(self.rows, list) else len(self.rows)
        return _digest([(path, files.version(path)) for path in paths], held, len(self))


@retried
def _row(rows: Sequence, index: int):
    return rows[index]


class Chain(Sequence[Sample]):
    """Sources one after the other: the files of one `data.sources` entry."""

    def __init__(self, name: str, parts: Sequence[Source]):
        self.name, self.parts = name, parts
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._starts, index) - 1
        return self.parts[part][index - self._starts[part]]

    def dialog_counts(self) -> list[int]:
        """Dialogs of every sample."""
        return [count for part in self.parts for count in part.dialog_counts()]

    def state(self) -> str:
        """Combined state of all files."""
        return _digest([part.state() for part in self.parts])


class Subset(Sequence[Sample]):
    """The samples whose numbers are in a .npy file, which cleaning or sampling by cluster
    (data/sampling.py) wrote.
    """

    def __init__(self, name: str, source: Source | Chain, file: str):
        try:
            with files.open_file(file) as opened:
                self._numbers = np.load(opened)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"data source {name!r}: {file!r} is no .npy file: {error}") from error
        if (
            not isinstance(self._numbers, np.ndarray)
            or self._numbers.dtype.kind not in "iu"
            or self._numbers.ndim != 1
            or ((self._numbers < 0) | (self._numbers >= len(source))).any()
        ):
            raise ValueError(
                f"data source {name!r}: {file} must hold whole numbers from 0 to {len(source) - 1},"
                " one dimension"
            )
        self.name, self._source = name, source

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        return self._source[int(self._numbers[index])]

    def dialog_counts(self) -> list[int]:
        """Dialogs of every sample."""
        counts = self._source.dialog_counts()
        return [counts[number] for number in self._numbers]

    def state(self) -> str:
        """Combined state of the source and the numbers."""
        return _digest(self._source.state(), self._numbers.tolist())


def _digest(*facts) -> str:
    return hashlib.sha256(repr(facts).encode(errors="surrogatepass")).hexdigest()[:32]


def by_row(
    mapper: Callable[..., Sample],
    picked: Callable[[str], Sequence[int] | None] = lambda file: None,
    counter: Callable[..., Callable[..., int] | None] = lambda **options: None,
) -> Callable[..., Chain]:
    """Opens every container file of a path.

    Args:
      mapper: `mapper(name, folder of the file, row, **options)` makes a sample of a row.
      picked: the numbers of the rows of a file that are samples; None for all.
      counter: `counter(**options)` makes what counts the dialogs of a row; None: each has one.
    """

    def opened(name: str, path: str, **options: str) -> Chain:
        counts = counter(**options)
        found = rows.find(path)
        mappers = [partial(mapper, name, files.parent(file), **options) for file in found]
        return Chain(
            name,
            [
                Source(name, rows.open_rows(f), sample, counts, where=f, numbers=picked(f))
                for f, sample in zip(found, mappers)
            ],
        )

    return opened


def taken(entries: Iterable, what: str, take: Callable[[Any], list]) -> tuple[list, list[Bad]]:
    """`take` applied to each entry of a file, and the entries at which it raises.

    Raises ValueError where it raises at all of them.
    """
    made, bad, number = [], [], 0
    for number, entry in enumerate(entries, 1):
        try:
            made += take(entry)
        except Exception as error:  # of an odd entry it raises errors of any kind
            bad.append(Bad(f"{what} {number}", f"{type(error).__name__}: {error}"))
    if bad and len(bad) == number:
        raise ValueError(f"{bad[0].key}: {bad[0].error}")
    return made, bad


def by_id(path: str, entries: Iterable[dict], key: str, value: str = "") -> dict:
    """{entry[key]: entry[value], or the entry itself} of the entries of a file.

    Raises ValueError naming the file for an id that two of them have.
    """
    try:
        return distinct([(entry[key], entry[value] if value else entry) for entry in entries], key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check(sample: Sample) -> Sample:
    """Returns the sample if it is valid. Raises ValueError."""
    if not all(sample.dialogs) or not sample.dialogs:
        raise ValueError("there are no turns")
    for dialog in sample.dialogs:
        for turn in dialog:
            if turn.role not in ("user", "assistant"):
                raise ValueError(f"unknown role {turn.role!r}; use user or assistant")
            if not isinstance(turn.text, str) or isinstance(turn.text, Ref):
                raise ValueError(f"a turn must be text, it is {type(turn.text).__name__}")
            if not turn.text.isascii():
                turn.text.encode()  # half of a surrogate pair is no character
        if (found := sum(turn.text.count(MARKER) for turn in dialog)) != len(sample.visuals):
            raise ValueError(f"{found} {MARKER} markers for {len(sample.visuals)} images or videos")
    if sample.labels and len(sample.labels) != len(sample.dialogs):
        raise ValueError(f"{len(sample.labels)} labels for {len(sample.dialogs)} dialogs")
    if not isinstance(sample.key, str) or not all(
        isinstance(score, int | float) for score in sample.scores
    ):
        raise ValueError(
            f"the key must be text and scores numbers, they are {sample.key!r} and"
            f" {sample.scores!r}"
        )
    if bad := [ref.path for ref in sample.refs if not isinstance(ref.path, str) or not ref.path]:
        raise ValueError(f"{bad[0]!r} is no picture")
    return sample


def key_of(row) -> str:
    """How a row calls itself; "?" if it does not, or could not be read."""
    if row is None or isinstance(row, list):
        return "?"
    named = (
        next((row[field] for field in KEYS if row.get(field) is not None), "?")
        if isinstance(row, dict)
        else row
    )
    return str(named[0] if isinstance(named, (tuple, list)) and named else named)
