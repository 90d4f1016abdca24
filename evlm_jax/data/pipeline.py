"""Batches: the mixture of sources, packed in lanes, with pictures; the saved position makes every run repeatable.

The unit of determinism is a lane: row j of every batch comes from lane j of `train.batch`, whatever number of processes shares
the lanes. Lane j reads the documents n * lanes + j, n = 0, 1, ... of one endless random-access stream:

    n -> source (by weight, one pattern for all lanes) -> shuffle of the source (another in each epoch) -> sample and part -> Document

(with the parts that a long one is cut into), so its position is a number and the few indices that wait in its packing window.
"""

import atexit
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import grain
import ml_dtypes
import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.cut import encode_parts
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.pack import Drop, Packer, assemble, fill, unfit
from evlm_jax.data.samples import Sample, part, part_count
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import Document

PREFETCH = 2  # batches made ahead, in a thread
ENOUGH = 1000  # documents, before their share of drops is judged
TABLE = 1 << 16  # documents of a source: up to here their order is a table


def batches(
    cfg: EVLMConfig, tokenizer, features: FeatureStore | None = None, lanes: Sequence[int] | None = None
) -> grain.DatasetIterator[tuple[Batch, dict]]:
    """An endless iterator of (Batch of numpy arrays, info) with `get_state()` and `set_state(state)`, both about what was consumed.

    `close()` stops its thread.

    info: "keys" (the samples of each row), "fill" (used share of each budget), "drops" (list of Drop since the last batch), "cut" (parts of
    longer documents among them).
    State: {"lanes": {lane number: {"next", "pending"}}}, JSON-able; the states of several processes are merged by merging "lanes", and any
    number of processes restores from that.

    Args:
      features: where the taps come from if `data.cache_features`; what it lacks is computed when a batch needs it.
      lanes: numbers of the rows that this process makes, ascending (mesh.Layout.own_rows); all where left out.
    """
    if cfg.data.cache_features != (features is not None):
        raise ValueError(f"config: data.cache_features is {cfg.data.cache_features}; a feature store is needed exactly when it is true")
    sources = [open_source(name) for name in cfg.data.sources]
    return Prefetch(RowsIterator(stream(sources, tokenizer, cfg), cfg, lanes or range(cfg.train.batch), features), PREFETCH)


def stream(sources: Sequence[Sequence[Sample]], tokenizer, cfg: EVLMConfig) -> grain.MapDataset:
    """The endless stream of documents that the lanes share."""
    seeds = [(cfg.data.seed + 0x9E3779B1 * i) % 2**32 for i in range(len(sources))]
    documents = [Documents(source, tokenizer, cfg) for source in sources]
    shuffled = [d.shuffle(seed) if len(d) > TABLE else Shuffle(d, seed) for d, seed in zip(documents, seeds)]
    return grain.MapDataset.select_from_datasets([d.repeat() for d in shuffled], Mixture(cfg.data.weights, cfg.train.batch))


class Documents(grain.MapDataset):
    """A source's documents: each sample, split as `data.dialogs` says; dialogs are dealt to the parts anew in each epoch."""

    def __init__(self, source, tokenizer, cfg: EVLMConfig):
        super().__init__()
        self._source, self._tokenizer, self._cfg = source, tokenizer, cfg
        self._ends = np.cumsum([part_count(count, cfg.data.dialogs) for count in source.dialog_counts()])

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
    """Another order in each epoch, by a table. Grain's own needs none, but walks through 2**16 numbers: milliseconds for a short source."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(parent)))

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> Document:
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(self._order(epoch)[place])]


class Mixture(grain.transforms.DatasetSelectionMap):
    """Stream index -> (source, index in it). Each lane sees the sources in one periodic pattern with exactly their weights."""

    def __init__(self, weights: Sequence[float], lanes: int):
        if min(weights) <= 0:
            raise ValueError(f"config: data.weights {tuple(weights)} must be positive")
        exact = [Fraction(weight).limit_denominator(1000) for weight in weights]
        counts = [int(weight * lcm(*(w.denominator for w in exact))) for weight in exact]
        # The k-th of a source's c turns stands at (k + 1/2) / c of the period: as even as can be.
        turns = sorted(((2 * k + 1) / (2 * c), source, k) for source, c in enumerate(counts) for k in range(c))
        self._turns = [(source, k) for _, source, k in turns]
        self._counts, self._lanes = counts, lanes

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn, lane = divmod(index, self._lanes)
        period, place = divmod(turn, len(self._turns))
        source, k = self._turns[place]
        return source, (period * self._counts[source] + k) * self._lanes + lane


class Prefetch(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's thread, stopped before the interpreter is taken down: a thread at work then would abort the process."""

    def __init__(self, parent: grain.DatasetIterator, size: int):
        super().__init__(parent, size)
        self._open = True
        atexit.register(self.close)

    def close(self) -> None:
        """Stops the thread; may be called again."""
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            super().close()


class Ready(NamedTuple):
    """Packed rows whose pictures are being decoded."""

    rows: list[list[Document]]
    drops: list[Drop]
    pictures: Iterator[np.ndarray | image.ImageError]


class RowsIterator(grain.DatasetIterator):
    """Packed batches of some lanes: see `batches`. The next rows are packed while the pictures of these are decoded."""

    def __init__(self, documents: grain.MapDataset, cfg: EVLMConfig, lanes: Sequence[int], features: FeatureStore | None):
        super().__init__()
        self._cfg, self._features = cfg, features
        self._used, self._lost = 0, Counter()
        self._packers = {lane: Packer(documents, cfg.data, lane, cfg.train.batch) for lane in lanes}
        self._ahead: Ready | Exception | None = None
        self._position = self._positions()  # without what is ahead

    def __next__(self) -> tuple[Batch, dict]:
        ready = self._ahead or self._start()
        if isinstance(ready, Exception):
            raise ready
        self._position = self._positions()
        try:
            self._ahead = self._start()
        except Exception as error:  # of the next batch: this one is whole
            self._ahead = error
        rows, drops, pictures = ready
        batch, damaged = collate(rows, self._cfg, pictures)
        self._budget(sum(map(len, rows)) - len(damaged), drops + damaged)
        cut = sum(document.parts > 1 for row in rows for document in row)
        keys = [[f"{document.source}/{document.key}" for document in row] for row in rows]
        return batch, {"keys": keys, "fill": fill(rows, self._cfg.data), "drops": drops + damaged, "cut": cut}

    def _start(self) -> Ready:
        """The next row of every lane."""
        rows = [[document for _, document in packer.row()] for packer in self._packers.values()]
        drops = [drop for packer in self._packers.values() for drop in packer.drops]
        for packer in self._packers.values():
            packer.drops = []
        return Ready(rows, drops, _pictures(rows, self._cfg, self._features))

    def _budget(self, used: int, drops: Sequence[Drop]) -> None:
        """Stops a run that loses more than `data.most_drops` of its documents, once a thousand were seen."""
        self._used += used
        self._lost.update(drop.cause for drop in drops)
        lost, share = self._lost.total(), self._cfg.data.most_drops
        if lost + self._used >= ENOUGH and lost > share * (lost + self._used):
            causes = ", ".join(f"{cause} {count}" for cause, count in self._lost.most_common())
            raise ValueError(
                f"{lost} of {lost + self._used} documents were left out ({causes}), more than data.most_drops = {share:g}; "
                f"the last: {drops[-1].message if drops else ''}"
            )

    def get_state(self) -> dict:
        """The position of every lane of this process."""
        return self._position

    def _positions(self) -> dict:
        return {"lanes": {str(lane): packer.state for lane, packer in self._packers.items()}}

    def set_state(self, state: dict) -> None:
        """Takes this process's lanes from a state. Raises ValueError where it lacks one."""
        if missing := [lane for lane in self._packers if str(lane) not in state["lanes"]]:
            raise ValueError(f"the saved data position has no lanes {missing}: train.batch must stay what it was when it was saved")
        for lane, packer in self._packers.items():
            packer.restore(state["lanes"][str(lane)])
        self._ahead, self._position = None, self._positions()


def rows_in_order(
    documents: Sequence[Document], cfg: EVLMConfig, rows: int, features: FeatureStore | None = None
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Packs a finite list of documents for evaluation; the last batch is padded with empty rows.

    Yields:
      (Batch, document [rows, M], dialog [rows, M]): each target's document (index into `documents`) and dialog in it; -1 at padding.
    Raises:
      ValueError: a document that fits no row; ImageError: an image that cannot be read.
    """
    if misfits := [drop for document in documents if (drop := unfit(document, cfg.data))]:
        raise ValueError(f"{len(misfits)} documents do not fit a row; the first: {misfits[0].message}")
    if features is not None:
        features.fill(ref for document in documents for ref in document.refs)
    packer, packed = Packer(documents, cfg.data), []
    while row := packer.row():
        packed.append(row)
    for first in range(0, len(packed), rows):
        chunk = packed[first : first + rows] + [[]] * max(0, first + rows - len(packed))
        laid = [[document for _, document in row] for row in chunk]
        batch, damaged = collate(laid, cfg, _pictures(laid, cfg, features))
        if damaged:
            raise image.ImageError(damaged[0].message)
        owner, dialog = np.full((2, rows, cfg.data.targets), -1, np.int32)
        for b, row in enumerate(chunk):
            owners = [np.full(len(document.targets), index, np.int32) for index, document in row]
            count = sum(map(len, owners))
            owner[b, :count] = np.concatenate(owners or [[]])
            dialog[b, :count] = np.concatenate([document.dialog for _, document in row] or [[]])
        yield batch, owner, dialog


def collate(
    rows: Sequence[Sequence[Document]], cfg: EVLMConfig, loaded: Iterator[np.ndarray | image.ImageError]
) -> tuple[Batch, list[Drop]]:
    """Rows of documents as a Batch, with the pictures of each document, in order.

    A document with an unreadable image keeps its place, but no targets, and is reported.
    """
    spec = Batch.spec(cfg, len(rows))
    name, shape, dtype = ("pixels", spec.pixels.shape, np.uint8) if spec.taps is None else ("taps", spec.taps.shape, ml_dtypes.bfloat16)
    pictures, kept, drops = np.zeros(shape, dtype), [], []
    for b, row in enumerate(rows):
        kept.append([])
        slot = 0
        for document, picture in zip(row, loaded):
            if isinstance(picture, image.ImageError):
                drops.append(Drop("unreadable image", f"{picture}, sample {document.source}/{document.key}"))
                document = document._replace(targets=np.full_like(document.targets, -1))
            else:
                pictures[b, slot : slot + len(picture)] = picture
            slot += len(document.refs)
            kept[-1].append(document)
    other = {"pixels": None, "taps": None} | {name: pictures}
    return Batch(**assemble(kept, cfg), **other), drops


def _pictures(
    rows: Sequence[Sequence[Document]], cfg: EVLMConfig, features: FeatureStore | None
) -> Iterator[np.ndarray | image.ImageError]:
    """Pixels or taps of each document, or what is wrong with them; pixels are in work at once."""
    documents = [document for row in rows for document in row]

    def load(document: Document) -> np.ndarray | image.ImageError:
        try:
            return image.pixels(document.refs, cfg) if features is None else features.get(document.refs)
        except image.ImageError as error:
            return error

    return map(load, documents) if features is not None else _threads().map(load, documents)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Decoding and resizing let other threads run; one pool serves all iterators of the process."""
    return ThreadPoolExecutor(os.cpu_count())
