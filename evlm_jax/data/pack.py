"""Documents into rows of static size: on costs, over a window, before any image is decoded; never
splitting a document.

Rows are packed an image group at a time: `data.image_group` neighbouring rows share image slots and
block pairs (docs/decisions.md, D-ROW-7 to D-ROW-12).
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evlm_jax.config import DataConfig, EVLMConfig
from evlm_jax.data.samples import SampleError
from evlm_jax.data.text import Document
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan

MOST_DROPS = 1000  # in a row, without one document that fits: the configuration must be wrong


class Budget(NamedTuple):
    """What a row may have, or a document needs."""

    tokens: int
    images: int
    targets: int
    block_pairs: int

    @classmethod
    def of(cls, data: DataConfig) -> "Budget":
        """Budget of the first row of an image group: what a document may need at most."""
        return cls(data.packed, data.images, data.targets, data.block_pairs)

    @classmethod
    def needed(cls, document: Document, data: DataConfig | None = None) -> "Budget":
        """What a document needs; with `data` as packing counts it (data.pack_media)."""
        tokens, media = len(document.tokens), document.media_slot
        if data and data.pack_media:
            tokens += data.pack_media * int((media == 0).sum()) - int((media >= 0).sum())
        return cls(tokens, len(document.refs), len(document.targets), document.block_pairs)


class Drop(NamedTuple):
    """A document that was left out, or whose targets were: counted by cause, shown by message."""

    cause: str
    message: str


def unfit(document: Document, data: DataConfig) -> Drop | None:
    """Why no row can ever contain the document, or None."""
    name = f"sample {document.source}/{document.key}"
    if not len(document.targets):
        return Drop("nothing supervised", f"nothing supervised: {name}")
    causes = ("too long", "too many images", "too many targets", "too many block pairs")
    fields = ("length", "images", "targets", "block_pairs")
    for cause, field, unit, need, room in zip(
        causes, fields, Budget._fields, Budget.needed(document, data), Budget.of(data)
    ):
        if need > room:
            mend = " (data.dialogs splits it)" if document.dialog.max() > 0 else ""
            return Drop(cause, f"{cause}: {need} {unit} > data.{field} {room}, {name}{mend}")
    return None


class Packer:
    """Packs rows from every `step`-th document of a stream, beginning at `start`.

    A row begins with the oldest document of the window that fits; the first of an image group may
    be any, so every document is used in the end. Then the one is added that leaves tokens and
    images most even, as shares of what the row aims at: all tokens, and its images
    (`pack_image_group`). The window is refilled, until none fits. So rows use up both, and none is
    crowded with the pictures that others lack. Where the data are shorter than the window
    (`_spread`), a document that its group has already is postponed while another one fits.

    Which documents make a row depends on the stream alone, so a position is `next` and the indices
    (and parts, of documents that were cut) in the window.
    """

    def __init__(self, stream: Sequence[Document], data: DataConfig, start: int = 0, step: int = 1):
        self.stream, self.data, self.step = stream, data, step
        self.next, self.drops = start, []
        self._pending: list[tuple[int, int, Document]] = []  # stream index, part, document
        self._costs = np.zeros((data.window, len(Budget._fields)), np.int64)
        self._same: list[
            int
        ] = []  # of each pending document, the same number as of one that is equal
        self._counts: Counter[int] = Counter()  # of these numbers
        self._used: Counter[int] = Counter()  # of those in the group
        self._again = False  # whether the window has one that the group has

    @property
    def taken(self) -> int:
        """Documents of the stream that are used or left out, with at least one of their parts gone
        from the window.
        """
        return used_of(self.state, self.step)

    @property
    def state(self) -> dict:
        """JSON-able position, the argument of `restore`."""
        return {"next": self.next, "pending": [[index, part] for index, part, _ in self._pending]}

    def restore(self, state: dict) -> None:
        """Moves to a position. Where the data are other ones, documents of the window that no
        longer exist or fit are left out.
        """
        self.next, self.drops = state["next"], []
        self._pending, self._same, self._counts = [], [], Counter()
        documents: dict[int, tuple[Document, ...]] = {}
        for index, part in state["pending"]:
            if index not in documents:
                documents[index] = self._read(index)
            if part < len(documents[index]) and not self._unfit(documents[index][part]):
                self._add(index, part, documents[index][part])

    def wanted(self) -> int:
        """Images of a row that is full and has the window's mixture."""
        self._refill()
        tokens, images = self._costs[: len(self._pending), :2].sum(0)
        return int(min(-(-images * self.data.packed // max(tokens, 1)), self.data.images))

    def row(self, room: Budget, images: float, seen: Counter) -> list[tuple[int, Document]]:
        """The next row's documents with their stream indices; what can never fit goes to `drops`.

        Args:
          room: what the row has.
          images: how many of its images the row aims at.
          seen: how often each document is in the group already; grows.
        """
        chosen, room = [], np.array(room)
        self._refill()
        self._used, self._again = seen, not self._counts.keys().isdisjoint(seen.keys())
        left = np.array([self.data.packed, images])
        scale = np.maximum(left, 1)
        while self._pending:
            costs = self._costs[: len(self._pending)]
            fits = (costs <= room).all(1)
            if not fits.any():
                break
            self._spread(fits)
            rest = np.where(fits, ((left - costs[:, :2]) / scale).max(1), np.inf)
            best = int((rest if chosen else ~fits).argmin())  # of equals the oldest
            self._use(best)
            room, left = room - costs[best], left - costs[best, :2]
            costs[best:-1] = costs[best + 1 :]
            index, _, document = self._pending.pop(best)
            chosen.append((index, document))
            self._refill()
        return chosen

    def _refill(self) -> None:
        unfits = 0
        while len(self._pending) < self.data.window and self.next < len(self.stream):
            parts = self._read(self.next)
            unfits += not parts
            for part, document in enumerate(parts):
                if self._unfit(document):
                    unfits += 1
                else:
                    unfits = 0
                    self._add(self.next, part, document)
            if unfits >= MOST_DROPS:
                raise ValueError(
                    f"{MOST_DROPS} documents in a row cannot be used; the last:"
                    f" {self.drops[-1].message}"
                )
            self.next += self.step

    def _read(self, index: int) -> tuple[Document, ...]:
        """The parts of a document; none of a row that is no sample."""
        try:
            document = self.stream[index]
        except SampleError as error:
            self.drops.append(Drop("bad row", str(error)))
            return ()
        return document, *document.rest

    def _spread(self, fits: np.ndarray) -> None:
        """Where documents come again in the window or the group, keeps of those that fit the least
        often used ones, and of these the ones in front of the first that comes again: in one epoch
        no two lanes have the same document.
        """
        if self._again:
            times = np.array([self._used[same] for same in self._same])
            fits &= times == times[fits].min()
        if len(self._counts) < len(self._same):
            known: set[int] = set()
            again = next(
                place for place, same in enumerate(self._same) if same in known or known.add(same)
            )
            if fits[:again].any():
                fits[again:] = False

    def _use(self, place: int) -> None:
        """Takes a document's number out of the window's, into the group's."""
        same = self._same.pop(place)
        self._used[same] += 1
        self._counts[same] -= 1
        if self._counts[same]:
            self._again = True
        else:
            del self._counts[same]

    def _unfit(self, document: Document) -> bool:
        """Whether no row can take it; such a one goes to `drops`."""
        drop = unfit(document, self.data)
        self.drops += [drop] if drop else []
        return bool(drop)

    def _add(self, index: int, part: int, document: Document) -> None:
        if len(self._pending) == len(
            self._costs
        ):  # the parts of one document may exceed the window
            self._costs = np.concatenate([self._costs, np.zeros_like(self._costs)])
        self._costs[len(self._pending)] = Budget.needed(document, self.data)
        self._same.append(
            same := hash(
                (
                    document.source,
                    document.key,
                    document.refs,
                    document.tokens.tobytes(),
                    document.targets.tobytes(),
                )
            )
        )
        self._counts[same] += 1
        self._again |= same in self._used
        self._pending.append((index, part, document))


def used_of(state: dict, of: int) -> int:
    """Documents that a position of one of `of` packers has used or left out, with at least one of
    their parts gone from the window.
    """
    return state["next"] // of - len({index for index, _ in state["pending"]})


def pack_image_group(
    packers: Sequence[Packer], data: DataConfig
) -> list[list[tuple[int, Document]]]:
    """The rows of an image group, one of each packer in turn; all are empty where the streams have
    ended.

    Each aims at the images that its packer wants, or at as large a share of the slots that are left
    as that is of what this row and the later ones want. So where slots are scarce all rows have a
    little less, instead of the last one next to none."""
    slots, pairs, rows, seen = data.slots, data.block_pairs, [], Counter()
    for number, packer in enumerate(packers):
        wanted = [other.wanted() for other in packers[number:]]
        aim = min(wanted[0], wanted[0] * slots / max(sum(wanted), 1))
        row = packer.row(
            Budget(data.packed, min(data.images, slots), data.targets, pairs), aim, seen
        )
        needed = [Budget.needed(document, data) for _, document in row]
        slots, pairs = (
            slots - sum(need.images for need in needed),
            pairs - sum(need.block_pairs for need in needed),
        )
        rows.append(row)
    return rows


def first_slots(rows: Sequence[Sequence[Document]], data: DataConfig) -> list[int]:
    """First image slot of each row within its image group."""
    counts = np.array([sum(len(document.refs) for document in row) for row in rows]).reshape(
        -1, data.image_group
    )
    return (counts.cumsum(1) - counts).ravel().tolist()


def assemble(rows: Sequence[Sequence[Document]], cfg: EVLMConfig) -> dict[str, np.ndarray]:
    """All fields of Batch but the pictures, int32, of documents that fit, in rows of whole groups.

    Offsets are added, padding is as in Batch. `isolate=False`: what a document's end can see stays
    visible to the end of the row, and positions continue. target_source is the index into
    data.sources (0 for documents of other sources, as in evaluation).
    """
    data, count, length = cfg.data, len(rows), cfg.data.length
    fields = {
        name: np.zeros((count, length), np.int32)
        for name in ("tokens", "positions", "visible_start", "visible_stop")
    }
    fields |= {
        name: np.zeros((count, data.targets), np.int32)
        for name in ("target_positions", "target_source")
    }
    fields["visible_until"] = np.tile(np.arange(1, length + 1, dtype=np.int32), (count, 1))
    fields["media_slot"] = np.full((count, length), -1, np.int32)
    fields["targets"] = np.full((count, data.targets), -1, np.int32)
    for b, (documents, image) in enumerate(zip(rows, first_slots(rows, data))):
        token = target = position = 0
        for document in documents:
            n, m = len(document.tokens), len(document.targets)
            here, there = (b, slice(token, token + n)), (b, slice(target, target + m))
            for name in ("tokens", "media_slot"):
                fields[name][here] = getattr(document, name)
            fields["positions"][here] = document.positions + position
            fields["visible_until"][here] = document.visible_until + token
            for name in ("visible_start", "visible_stop"):
                fields[name][here] = getattr(document, name) + image
            fields["target_positions"][there] = document.target_positions + token
            fields["targets"][there] = document.targets
            fields["target_source"][there] = (
                data.sources.index(document.source) if document.source in data.sources else 0
            )
            if not data.isolate:
                fields["visible_until"][here][document.visible_until == n] = length
                position += int(document.positions[-1]) + 1
            token, image, target = token + n, image + len(document.refs), target + m
    if not cfg.query_block:
        return fields | dict.fromkeys(AttentionPlan._fields)
    seen = np.stack([fields["visible_start"], fields["visible_stop"]]).reshape(
        2, -1, data.image_group * length
    )
    plans = [
        attention_plan(start, stop, cfg.query_block, data.block_pairs) for start, stop in zip(*seen)
    ]
    return fields | {name: np.stack([p[name] for p in plans]) for name in AttentionPlan._fields}


def fill(rows: Sequence[Sequence[Document]], data: DataConfig) -> dict[str, float]:
    """Used share of each budget, over all rows of whole groups; of images that is the share of the
    slots.
    """
    room = len(rows) * np.array(
        [
            data.length,
            data.slots / data.image_group,
            data.targets,
            data.block_pairs / data.image_group,
        ]
    )
    return dict(zip(Budget._fields, (used(rows) / np.maximum(room, 1)).tolist()))


def used(rows: Sequence[Sequence[Document]]) -> np.ndarray:
    """What all rows together need, in the order of Budget."""
    return np.sum(
        [Budget.needed(document) for row in rows for document in row] or [Budget(0, 0, 0, 0)], 0
    )
