"""Tensors onto the mesh: every byte is read once, by one process, and a process keeps what its
devices hold.

A tensor is read in its chunks, for its digests are theirs (lazy_tensors.Chunk). A chunk that the
devices of one process alone hold is read there. One that several hold, as on another mesh than the
one that saved it, is read by one of them, so that all read the same number of bytes; it goes to the
others in rounds, a block of each process in every round. What is read ahead and what is under way
are bounded, whatever the size of the model."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from evlm_jax.checkpoint.lazy_tensors import Chunk, Stack, Tensor, aligned
from evlm_jax.parallel.distributed import allgather_json

AHEAD = 2**26  # bytes that a process reads ahead; a larger chunk is read by itself
ROUND = 2**25  # bytes of a round, of all processes together
THREADS = 8  # that read

Place = Callable[
    [Any], Any
]  # a tree of parameters or moments, or of their shapes -> a tree of their shardings
Box = tuple[tuple[int, int], ...]  # first and stop along each axis of a tensor


class Leaf:
    """An array on its way to the mesh: the shards of this process's devices, in memory."""

    def __init__(self, stack: Stack, sharding: jax.sharding.Sharding):
        self.stack, self._sharding = stack, sharding
        self._held: dict[int, set[Box]] = {}  # by process; layers of a stack are never split
        for device, index in sharding.devices_indices_map(stack.shape).items():
            self._held.setdefault(device.process_index, set()).add(self._box(index))
        self._holders: dict[Box, list[int]] = {}
        self._shards = {  # pages that nothing has written to take no memory yet
            box: aligned((len(stack.tensors), *(stop - first for first, stop in box)), stack.dtype)
            for box in self._held.get(jax.process_index(), ())
        }
        self.left = 0  # parts that this process still lacks

    def holders(self, box: Box) -> list[int]:
        """Processes whose devices hold something of a box, ascending."""
        if box not in self._holders:
            self._holders[box] = sorted(
                process
                for process, held in self._held.items()
                if any(_common(box, own) is not None for own in held)
            )
        return self._holders[box]

    def put(self, layer: int, box: Box, array: np.ndarray) -> None:
        """Copies a box of a layer into the shards of this process."""
        for own, shard in self._shards.items():
            if (common := _common(box, own)) is not None:
                shard[(layer, *_within(common, own))] = array[_within(common, box)]

    def array(self) -> jax.Array:
        """The array, when all of it is there; its memory goes over to it."""
        shards, self._shards = self._shards, {}

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            held = shards[self._box(index)]
            return held if self.stack.stacked else held[0]

        return jax.make_array_from_callback(self.stack.shape, self._sharding, shard)

    def _box(self, index: tuple[slice, ...]) -> Box:
        axes = zip(index, self.stack.shape)
        return tuple(axis.indices(n)[:2] for axis, n in axes)[self.stack.stacked :]


class Part(NamedTuple):
    """A chunk and where it goes."""

    leaf: Leaf
    layer: int
    chunk: Chunk
    dtype: np.dtype

    @property
    def box(self) -> Box:
        """Where it lies in its tensor."""
        return tuple((first, first + n) for first, n in zip(self.chunk.start, self.chunk.shape))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.chunk.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of its first axis."""
        return self.chunk.shape[0] if self.chunk.shape else 1

    def put(self, first: int, stop: int, rows: np.ndarray) -> None:
        """Copies some of its rows to where they go."""
        box = self.box
        if box:
            box = ((box[0][0] + first, box[0][0] + stop), *box[1:])
        self.leaf.put(self.layer, box, rows.reshape([stop - first for first, stop in box]))

    def load(self) -> None:
        """Reads it to where it goes."""
        self.put(0, self.rows, self.chunk.read())


class Piece(NamedTuple):
    """Rows of a part, from `begin` on in the block of a round."""

    part: Part
    first: int
    stop: int
    begin: int

    @property
    def bytes(self) -> slice:
        """Its place in the block."""
        size = (self.stop - self.first) * (self.part.size // self.part.rows)
        return slice(self.begin, self.begin + size)

    def put(self, block: np.ndarray) -> None:
        """Copies it from a block to where it goes."""
        self.part.put(self.first, self.stop, block[self.bytes].view(self.part.dtype))


def put_tensors(tree: Any, place: Place) -> Any:
    """Reads a tree of `Stack`s, or of NumPy arrays, onto the devices.

    Raises, on all processes, what went wrong in reading on any of them.
    """
    stacks, structure = jax.tree.flatten(tree)
    stacks = [s if isinstance(s, Stack) else Stack((Tensor.of(s),), False) for s in stacks]
    leaves = [Leaf(s, where) for s, where in zip(stacks, jax.tree.leaves(place(tree)), strict=True)]
    own, streams = _plan(leaves)
    arrays: dict[Leaf, jax.Array] = {}

    def arrived(part: Part) -> None:
        part.leaf.left -= 1
        if not part.leaf.left:
            arrays[part.leaf] = part.leaf.array()

    failed = None
    try:
        for part, _ in _ahead(own, Part.load):
            arrived(part)
    except Exception as error:  # of any reader: the others wait for this process
        failed = error
    failed = _exchange(streams, arrived, failed)
    refusals = [text for text in allgather_json(failed and str(failed)) if text is not None]
    if refusals:
        raise failed or ValueError(refusals[0])
    return jax.tree.unflatten(structure, [arrays[leaf] for leaf in leaves])


def _plan(leaves: list[Leaf]) -> tuple[list[Part], list[list[Part]]]:
    """(parts that this process reads for itself, those that each process reads for several), the
    same on all processes; their bytes are as equal as can be.
    """
    me, own, shared, loads = jax.process_index(), [], [], [0] * jax.process_count()
    for leaf in leaves:
        for layer, tensor in enumerate(leaf.stack.tensors):
            for part in (Part(leaf, layer, chunk, tensor.dtype) for chunk in tensor.boxes):
                holders = leaf.holders(part.box)
                leaf.left += me in holders
                if len(holders) > 1:
                    shared.append(part)
                    continue
                loads[holders[0]] += part.size
                own += [part] if holders == [me] else []
    streams = [[] for _ in loads]
    for number in sorted(range(len(shared)), key=lambda number: -shared[number].size):
        part = shared[number]
        reader = min(part.leaf.holders(part.box), key=lambda process: loads[process])
        loads[reader] += part.size
        streams[reader].append(number)
    return own, [[shared[number] for number in sorted(stream)] for stream in streams]


def _exchange(
    streams: list[list[Part]], arrived: Callable[[Part], None], failed: Exception | None
) -> Exception | None:
    """Reads this process's stream and puts what it needs of all of them; returns what went wrong
    here.
    """
    if not any(streams):
        return failed
    me, parts = jax.process_index(), [part for stream in streams for part in stream]
    room = min(ROUND // len(streams), max(sum(part.size for part in stream) for stream in streams))
    room = max(room, *(part.size // part.rows for part in parts), 1)
    rounds = [_rounds(stream, room) for stream in streams]
    mine = _ahead(streams[me], lambda part: part.chunk.read())
    part, rows = None, None
    for number in range(max(map(len, rounds))):
        block = np.zeros(room + 1, np.uint8)
        try:
            for piece in [] if failed else _pieces(rounds[me], number):
                if piece.part is not part:
                    part, rows = next(mine)
                sent = np.ascontiguousarray(rows.reshape(part.rows, -1)[piece.first : piece.stop])
                block[piece.bytes] = sent.reshape(-1).view(np.uint8)
        except Exception as error:  # of any reader: the others wait for this process
            failed = error
        block[room] = failed is not None
        blocks = multihost_utils.process_allgather(block)
        if blocks[:, room].any():
            break
        for sender, told in enumerate(rounds):
            for piece in _pieces(told, number):
                if me in piece.part.leaf.holders(piece.part.box):
                    piece.put(blocks[sender])
                    if piece.stop == piece.part.rows:
                        arrived(piece.part)
        del blocks  # before the next ones come
    mine.close()
    return failed


def _rounds(stream: list[Part], room: int) -> list[list[Piece]]:
    """The rows of a stream in order, in blocks of `room` bytes."""
    rounds, begin = [[]], 0
    for part in stream:
        row, first = part.size // part.rows, 0
        while first < part.rows:
            if begin + row > room:
                rounds.append([])
                begin = 0
            stop = min(part.rows, first + (room - begin) // row)
            rounds[-1].append(Piece(part, first, stop, begin))
            first, begin = stop, begin + (stop - first) * row
    return rounds


def _pieces(rounds: list[list[Piece]], number: int) -> list[Piece]:
    return rounds[number] if number < len(rounds) else []


def _ahead(parts: Iterable[Part], job: Callable[[Part], Any]) -> Iterator[tuple[Part, Any]]:
    """(part, what `job` made of it), in order; threads work on the next ones, up to AHEAD bytes."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting, held = deque(), 0
        for part in parts:
            while waiting and held + part.size > AHEAD:
                held -= waiting[0][0].size
                yield _done(waiting)
            waiting.append((part, pool.submit(job, part)))
            held += part.size
        while waiting:
            yield _done(waiting)


def _done(waiting: deque) -> tuple[Part, Any]:
    part, future = waiting.popleft()
    return part, future.result()


def _common(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; () of two scalars, None where it is nothing."""
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b))
    return common if all(first < stop for first, stop in common) else None


def _within(box: Box, around: Box) -> tuple[slice, ...]:
    """Where a box lies within a larger one."""
    return tuple(slice(p[0] - q[0], p[1] - q[0]) for p, q in zip(box, around))
