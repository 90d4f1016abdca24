"""The endless streams of documents that all lanes share: one for each task, mixed of its sources,
shuffled anew in each epoch.

    n -> source (by weight, one pattern for all lanes) -> shuffle of the source (another in each
    epoch) -> sample and part -> Document

All of it is random access, so a position in a stream is a number.
"""

import functools
import sys
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import grain
import numpy as np

from evlm_jax.config import EVLMConfig
from evlm_jax.data.cut import encode_parts
from evlm_jax.data.samples import Sample, part, part_count
from evlm_jax.data.text import Document

TABLE = 1 << 16  # documents of a source: up to here their order is a table


class Task(NamedTuple):
    """Sources whose documents may share a row."""

    name: str
    weight: float  # of all its sources; those of all tasks sum to 1
    documents: grain.MapDataset


def tasks(sources: Sequence[Sequence[Sample]], tokenizer, cfg: EVLMConfig) -> list[Task]:
    """The tasks of `data.tasks`, in the order of their first sources; one of all sources where that
    is empty.
    """
    data = cfg.data
    names = data.tasks or ("",) * len(sources)
    documents = [
        _endless(Documents(source, tokenizer, cfg), data, number)
        for number, source in enumerate(sources)
    ]
    made = []
    for name in dict.fromkeys(names):
        own = [i for i, task in enumerate(names) if task == name]
        weights = [data.weights[i] for i in own]
        mixed = grain.MapDataset.select_from_datasets(
            [documents[i] for i in own], Mixture(weights, cfg.image_groups)
        )
        made.append(Task(name, sum(weights) / sum(data.weights), mixed))
    return made


class Documents(grain.MapDataset):
    """Documents of a source: each sample, split by `data.dialogs`; dialogs are dealt to the parts
    anew in each epoch.
    """

    def __init__(self, source, tokenizer, cfg: EVLMConfig):
        super().__init__()
        self._source, self._tokenizer, self._cfg = source, tokenizer, cfg
        self._ends = np.cumsum(
            [part_count(count, cfg.data.dialogs) for count in source.dialog_counts()]
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        epoch, place = divmod(index, len(self))
        number = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        data = self._cfg.data
        sample = part(self._source[number], place - first, data.dialogs, (data.seed, epoch, number))
        return encode_parts(sample, self._tokenizer, self._cfg)


class Shuffle(grain.MapDataset):
    """A different order in each epoch, by a table.

    Grain's own shuffle needs no table, but walks through 2**16 numbers: milliseconds for a short
    source.
    """

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._order = functools.lru_cache(2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(parent))
        )

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> Document:
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(self._order(epoch)[place])]


class Once(grain.MapDataset):
    """One epoch, then an error: no packing window may read beyond the end."""

    def __init__(self, parent: grain.MapDataset, name: str):
        super().__init__(parent)
        self._name = name

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Document:
        if index >= len(self._parent):
            raise ValueError(
                f"data source {self._name!r} has ended after {len(self._parent)} documents: set"
                ' data.ends to "repeat", train.steps or its weight lower, or give it more data'
            )
        return self._parent[index]


class Mixture(grain.transforms.DatasetSelectionMap):
    """Maps a stream index to (source, index in it). Each lane sees the sources in one pattern that
    has exactly their weights.

    The k-th turn of a source with the share s of the sum of weights is at (k + 1/2) / s. So after
    any number of turns its count is off by less than the number of sources. Weights are read as
    decimals: 0.1 is a tenth.
    """

    def __init__(self, weights: Sequence[float], lanes: int):
        if min(weights) <= 0:
            raise ValueError(f"config: data.weights {tuple(weights)} must be positive")
        exact = [Fraction(str(weight)) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        scale = lcm(*(share.numerator for share in self._shares))
        self._strides = [
            int(scale / share) for share in self._shares
        ]  # places of turns as whole numbers: (2 k + 1) * stride
        self._lanes = lanes
        self._turn = functools.lru_cache(1 << 12)(self._find)  # all lanes ask for the same turns

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn, lane = divmod(index, self._lanes)
        source, k = self._turn(turn)
        return source, k * self._lanes + lane

    def _find(self, turn: int) -> tuple[int, int]:
        """The source of a lane's turn, and how many turns it had before."""
        before = max(
            0, turn - len(self._shares)
        )  # up to this place at most `turn` turns stand: from there they are counted one by one
        taken = [int(before * share + Fraction(1, 2)) for share in self._shares]
        for _ in range(turn - sum(taken) + 1):
            source = min(range(len(taken)), key=lambda i: (2 * taken[i] + 1) * self._strides[i])
            taken[source] += 1
        return source, taken[source] - 1


def _endless(documents: Documents, data, number: int) -> grain.MapDataset:
    """Source `number`, shuffled, and repeated or not."""
    seed = (data.seed + 0x9E3779B1 * number) % 2**32
    shuffled = documents.shuffle(seed) if len(documents) > TABLE else Shuffle(documents, seed)
    return shuffled.repeat() if data.ends == "repeat" else Once(shuffled, data.sources[number])
