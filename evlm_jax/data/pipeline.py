"""Batches: documents packed in lanes, with pictures; the saved position makes every run repeatable.

The unit of determinism is a lane: image group j of every batch, `data.image_group` rows, comes from
lane j of as many as a batch has groups, whatever number of processes shares the lanes. Lane j reads
the documents n * lanes + j, n = 0, 1, ... of each task's endless stream (data/mixture.py), with the
parts that a long one is cut into, so its position is a number and the few indices that wait in its
packing window, for each task."""

import atexit
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import grain
import ml_dtypes
import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.identity import identity
from evlm_jax.data.mixture import Task, tasks
from evlm_jax.data.pack import (
    Drop,
    Packer,
    assemble,
    fill,
    first_slots,
    pack_image_group,
    unfit,
    used_of,
)
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import Document

PREFETCH = 2  # batches made ahead, in a thread
ENOUGH = 1000  # documents, before their share of drops is judged
CHANCE = 1e-5  # that all documents so far are lost though no more than the allowed share is


def batches(
    cfg: EVLMConfig,
    tokenizer,
    features: FeatureStore | None = None,
    lanes: Sequence[int] | None = None,
) -> grain.DatasetIterator[tuple[Batch, dict]]:
    """An endless iterator of (Batch of numpy arrays, info) with `get_state()` and
    `set_state(state)`, both about what was consumed. `close()` stops its thread.

    The info of a batch has "keys" (the samples of each row), "fill" (used share of each budget),
    "drops" (list of Drop since the last batch), "cut" (parts of longer documents among them).

    A state is {"lanes": {lane number: [{"next", "pending"} of each task]}, "of": number of all
    lanes, "sources": {name: identity}}, JSON-able; the states of several processes are merged by
    merging "lanes", and any number of processes restores from that. From a state of another number
    of lanes (train.batch or data.image_group was another) each task goes on behind as many
    documents as were used, dealt to the lanes in turn: the number is exact, but those that waited
    in windows may be left out and those that a lane was ahead by may come again.

    Args:
      features: where the taps come from if `data.cache_features`; what it lacks is computed when a
        batch needs it.
      lanes: numbers of the image groups that this process makes, ascending
        (mesh.Layout.own_groups); all where left out.
    """
    if cfg.data.cache_features != (features is not None):
        raise ValueError(
            f"config: data.cache_features is {cfg.data.cache_features}; a feature store is needed"
            " exactly when it is true"
        )
    sources = [open_source(name) for name in cfg.data.sources]
    told = {name: identity(source) for name, source in zip(cfg.data.sources, sources)}
    return Prefetch(
        RowsIterator(
            tasks(sources, tokenizer, cfg), cfg, lanes or range(cfg.image_groups), features, told
        ),
        PREFETCH,
    )


class Lane:
    """Rows of one lane, an image group at a time, each row of one task.

    Whose turn it is, is drawn, so that lanes differ; by how far each task is behind its weight, so
    that shares of documents stay exact: a task is at most a window and a group ahead. For a group
    of p rows p * p times all its tasks are drawn, and those are taken whose images come nearest to
    the group's slots."""

    def __init__(self, made: Sequence[Task], cfg: EVLMConfig, number: int):
        self._packers = [
            Packer(task.documents, cfg.data, number, cfg.image_groups) for task in made
        ]
        self._weights = np.array([task.weight for task in made])
        self._data, self._seed = cfg.data, (cfg.data.seed, number)

    def rows(self) -> list[list[Document]]:
        """The documents of the next image group's rows."""
        taken, rows = np.array([packer.taken for packer in self._packers]), self._data.image_group
        due = np.maximum(self._weights * (taken.sum() + self._data.window) - taken, 0)
        drawn = np.random.default_rng((*self._seed, int(taken.sum()))).choice(
            len(due), (rows**2, rows), p=due / due.sum()
        )
        wanted = np.array([packer.wanted() for packer in self._packers])
        nearest = drawn[np.abs(wanted[drawn].sum(1) - self._data.slots).argmin()]
        packed = pack_image_group([self._packers[task] for task in nearest], self._data)
        return [[document for _, document in row] for row in packed]

    def drops(self) -> list[Drop]:
        """What was left out since the last call."""
        found = [drop for packer in self._packers for drop in packer.drops]
        for packer in self._packers:
            packer.drops = []
        return found

    @property
    def state(self) -> list[dict]:
        """JSON-able position: of each task's packer."""
        return [packer.state for packer in self._packers]

    def restore(self, state: Sequence[dict]) -> None:
        """Moves to a position. Raises ValueError where it is that of another number of tasks."""
        if len(state) != len(self._packers):
            raise ValueError(
                f"the saved data position has {len(state)} tasks, data.tasks has"
                f" {len(self._packers)}: they must stay the same"
            )
        for packer, own in zip(self._packers, state):
            packer.restore(own)


def redealt(state: dict, lanes: int) -> dict:
    """A state for another number of lanes, behind as many documents of each task (see
    `batches`).
    """
    of = state["of"]
    if len(state["lanes"]) != of:
        raise ValueError(
            f"the saved data position has {len(state['lanes'])} of {of} lanes: merge the positions"
            " of all processes"
        )
    taken = [
        sum(map(partial(used_of, of=of), tasks))
        for tasks in zip(*state["lanes"].values(), strict=True)
    ]

    def begin(used, lane):
        return {
            "next": lane + lanes * (used // lanes + (lane < used % lanes)),
            "pending": [],
        }

    return {
        "lanes": {str(lane): [begin(used, lane) for used in taken] for lane in range(lanes)},
        "of": lanes,
    }


class Prefetch(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's prefetching thread, stopped before the interpreter exits: a running thread would
    abort the process.
    """

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
    """Packed batches of some lanes: see `batches`.

    The next rows are packed while the pictures of these are decoded.
    """

    def __init__(
        self,
        made: Sequence[Task],
        cfg: EVLMConfig,
        lanes: Sequence[int],
        features: FeatureStore | None,
        sources: dict | None = None,
    ):
        super().__init__()
        self._cfg, self._features, self._sources = cfg, features, sources or {}
        self._used, self._lost, self._examples = 0, Counter(), {}
        self._lanes = {number: Lane(made, cfg, number) for number in lanes}
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
        return batch, {
            "keys": keys,
            "fill": fill(rows, self._cfg.data),
            "drops": drops + damaged,
            "cut": cut,
        }

    def _start(self) -> Ready:
        """The next rows of every lane."""
        rows = [row for lane in self._lanes.values() for row in lane.rows()]
        drops = [drop for lane in self._lanes.values() for drop in lane.drops()]
        return Ready(rows, drops, load_pictures(rows, self._cfg, self._features))

    def _budget(self, used: int, drops: Sequence[Drop]) -> None:
        """Stops a run that loses more than `data.most_drops` of its documents, once a thousand were
        seen, or before where all that was seen is lost and that can be no chance.
        """
        self._used += used
        self._lost.update(drop.cause for drop in drops)
        for drop in drops:
            self._examples.setdefault(drop.cause, drop.message)
        lost, share = self._lost.total(), self._cfg.data.most_drops
        enough = lost + self._used >= ENOUGH or not self._used and share**lost < CHANCE
        if enough and lost > share * (lost + self._used):
            causes = "".join(
                f"\n  {cause}: {count}, the first: {self._examples[cause]}"
                for cause, count in self._lost.most_common()
            )
            raise ValueError(
                f"{lost} of {lost + self._used} documents were left out, more than data.most_drops"
                f" = {share:g}:{causes}"
            )

    def get_state(self) -> dict:
        """The position of every lane of this process."""
        return self._position

    def _positions(self) -> dict:
        lanes = {str(number): lane.state for number, lane in self._lanes.items()}
        return {"lanes": lanes, "of": self._cfg.image_groups, "sources": self._sources}

    def set_state(self, state: dict) -> None:
        """Takes this process's lanes from a state.

        Raises ValueError where it lacks one, or is of other tasks.
        """
        if state["of"] != self._cfg.image_groups:
            state = redealt(state, self._cfg.image_groups)
        if missing := [number for number in self._lanes if str(number) not in state["lanes"]]:
            raise ValueError(
                f"the saved data position has no lanes {missing}: merge the positions of all"
                " processes"
            )
        for number, lane in self._lanes.items():
            lane.restore(state["lanes"][str(number)])
        self._ahead, self._position = None, self._positions()


def rows_in_order(
    documents: Sequence[Document], cfg: EVLMConfig, rows: int, features: FeatureStore | None = None
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Packs a finite list of documents for evaluation, each row with its own image slots; the last
    batch is padded with empty rows.

    Yields:
      (Batch, document [rows, M], dialog [rows, M]): each target's document (index into `documents`)
      and dialog in it; -1 at padding.
    Raises:
      ValueError: a document that fits no row; ImageError: an image that cannot be read.
    """
    cfg = cfg.ungrouped
    if misfits := [drop for document in documents if (drop := unfit(document, cfg.data))]:
        raise ValueError(
            f"{len(misfits)} documents do not fit a row; the first: {misfits[0].message}: shorten"
            " it, or raise that field"
        )
    if features is not None:
        features.fill(ref for document in documents for ref in document.refs)
    packer, packed = Packer(documents, cfg.data), []
    while row := pack_image_group([packer], cfg.data)[0]:
        packed.append(row)
    for first in range(0, len(packed), rows):
        chunk = packed[first : first + rows] + [[]] * max(0, first + rows - len(packed))
        laid = [[document for _, document in row] for row in chunk]
        batch, damaged = collate(laid, cfg, load_pictures(laid, cfg, features))
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
    rows: Sequence[Sequence[Document]],
    cfg: EVLMConfig,
    loaded: Iterator[np.ndarray | image.ImageError],
) -> tuple[Batch, list[Drop]]:
    """Rows of documents, of whole image groups, as a Batch, with the pictures of each document, in
    order.

    A document with an unreadable image keeps its place, but no targets, and is reported.
    """
    spec = Batch.spec(cfg, len(rows))
    name, shape, dtype = (
        ("pixels", spec.pixels.shape, np.uint8)
        if spec.taps is None
        else ("taps", spec.taps.shape, ml_dtypes.bfloat16)
    )
    pictures, kept, drops = np.zeros(shape, dtype), [], []
    for b, (row, slot) in enumerate(zip(rows, first_slots(rows, cfg.data))):
        kept.append([])
        for document, picture in zip(row, loaded):
            if isinstance(picture, image.ImageError):
                drops.append(
                    Drop("unreadable image", f"{picture}, sample {document.source}/{document.key}")
                )
                document = document._replace(targets=np.full_like(document.targets, -1))
            else:
                pictures[b // cfg.data.image_group, slot : slot + len(picture)] = picture
            slot += len(document.refs)
            kept[-1].append(document)
    other = {"pixels": None, "taps": None} | {name: pictures}
    return Batch(**assemble(kept, cfg), **other), drops


def load_pictures(
    rows: Sequence[Sequence[Document]], cfg: EVLMConfig, features: FeatureStore | None
) -> Iterator[np.ndarray | image.ImageError]:
    """Pixels or taps of each document, or what is wrong with them; pixels are in work at once,
    missing taps are computed together.
    """
    documents = [document for row in rows for document in row]
    if features is not None:
        features.fill((ref for document in documents for ref in document.refs), progress=False)

    def load(document: Document) -> np.ndarray | image.ImageError:
        try:
            return (
                image.pixels(document.refs, cfg)
                if features is None
                else features.get(document.refs)
            )
        except image.ImageError as error:
            return error

    return map(load, documents) if features is not None else _threads().map(load, documents)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Decoding and resizing let other threads run; one pool serves all iterators of the process."""
    return ThreadPoolExecutor(os.cpu_count())
