"""safetensors files and folders of them, read and written one tensor at a time.

Files are sharded as Hugging Face has them; a shard appears under its name when it is complete, with
the hashes of its tensors beside it, so that a writing that was cut off goes on with the first shard
that is missing."""

import json
import math
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from evlm_jax import paths
from evlm_jax.checkpoint.lazy_tensors import (
    Chunk,
    Tensor,
    Tensors,
    begin_digest,
    block_boxes,
    blocks,
    content,
    read_json,
)

SHARD = 2**30  # bytes of one file; a tensor is never cut
TYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "i8",
    "I32": "i4",
    "U8": "u1",
    "BOOL": "?",
}
FLOATS = {np.dtype(TYPES[name]): name for name in ("F32", "F16", "BF16")}  # weights
WRITTEN = FLOATS | {np.dtype(TYPES["U8"]): "U8"}  # also the bytes of quantised ones
INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # its bits; those of NaN are larger
# bytes of a header, its entries and their axes, at most: a hostile one takes no more memory
HEADER, TENSORS, AXES = 25_000_000, 2**17, 32
NAME, INDEX, HASHES = "model.safetensors", "model.safetensors.index.json", ".digests.json"


class Hashes(NamedTuple):
    """What a tensor is told by, as `digest`."""

    whole: str
    chunks: list  # [start, shape, hash] of each of its blocks, where it has several


def read_safetensors(path: epath.Path) -> dict[str, Tensor]:
    """Reads one file: 8 bytes of header length, a JSON header, then the bytes of the tensors in
    order.

    Raises:
      ValueError: whatever the safetensors library refuses: a truncated file, trailing bytes,
        tensors that overlap, leave gaps, are listed twice or have another size than their shape and
        dtype; a dtype that is not supported; another kind of file, which is named.
    """
    path = paths.place(path)
    size = paths.size(path)
    with path.open("rb") as file:
        begin = file.read(32)
        length = int.from_bytes(begin[:8], "little")
        if len(begin) < 8 or length > size - 8 or begin[8:9] != b"{":
            what = content(begin)
            raise ValueError(
                f"{path} is {what}"
                if what
                else f"{path}: not a complete safetensors file; copy it again"
            )
        if length > HEADER:
            raise ValueError(f"{path}: its header is {length} bytes long; read are up to {HEADER}")
        file.seek(8)
        text = file.read(length)
    try:
        header = _header_of(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header, copy it again: {error}") from error
    tensors, stop = {}, 0
    header.pop("__metadata__", None)
    found = [(name, *_facts(path, name, facts)) for name, facts in header.items()]
    for name, dtype, shape, start, end in sorted(found, key=lambda one: one[3:]):
        if start != stop or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: {name} lies at {start}..{end}, where {math.prod(shape) * dtype.itemsize}"
                f" bytes behind {stop} must be"
            )
        stop = end
        read = partial(_read_rows, path, dtype, shape, 8 + length + start)
        chunks = tuple(
            Chunk(begin, part, partial(read, begin[0], part))
            for begin, part in block_boxes(shape, dtype)
        )
        tensors[name] = Tensor(shape, dtype, partial(read, 0, shape), chunks)
    if 8 + length + stop != size:
        raise ValueError(
            f"{path}: has {size} bytes, but its tensors end at byte {8 + length + stop}; copy it"
            " again"
        )
    return {name: tensors[name] for name in header}


def _header_of(text: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no JSON to the letter, a name that stands twice, metadata that
    are no texts, and too many entries.
    """
    seen = 0
    if minus := re.search(rb"[\[,:]\s*-0\s*[,\]}]", text):
        _refuse(minus[0].decode())  # which Python reads as 0

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if max(seen, len(pairs)) > TENSORS or len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"a name stands twice, or there are more than {TENSORS} entries")
        return found

    header = json.loads(
        text.decode(), object_pairs_hook=entries, parse_constant=_refuse, parse_float=_refuse
    )
    about = header.get("__metadata__") or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("__metadata__ must hold texts")
    "".join([*header, *about, *about.values()]).encode()  # half of a surrogate pair is no text
    return header


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no whole number")


def _facts(path: epath.Path, name: str, facts: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, start and end of an entry of the header.

    Raises ValueError naming the tensor.
    """

    def whole(value):
        return (
            isinstance(value, list)
            and len(value) <= AXES
            and all(type(n) is int and 0 <= n < 2**63 for n in value)
        )

    known = isinstance(facts, dict) and facts.keys() == {"dtype", "shape", "data_offsets"}
    if (
        not known
        or not whole(facts["shape"])
        or not whole(facts["data_offsets"])
        or len(facts["data_offsets"]) != 2
    ):
        raise ValueError(
            f"{path}: {name} must have dtype, shape and data_offsets, in whole numbers; copy the"
            " file again"
        )
    if not isinstance(facts["dtype"], str) or facts["dtype"] not in TYPES:
        kind = (
            " (quantised weights)"
            if str(facts["dtype"]).startswith(("F8", "F6", "F4", "I8", "U16", "U32"))
            else ""
        )
        raise ValueError(
            f"{path}: {name} has dtype {facts['dtype']}{kind}; read are {', '.join(TYPES)}"
        )
    return np.dtype(TYPES[facts["dtype"]]), tuple(facts["shape"]), *facts["data_offsets"]


def _read_rows(
    path: epath.Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    start: int,
    first: int,
    part: tuple[int, ...],
) -> np.ndarray:
    """The rows of `part`'s shape that begin with row `first` of the tensor at byte `start`."""
    row = math.prod(shape[1:]) * dtype.itemsize
    with path.open("rb") as file:
        file.seek(start + first * row)
        return np.frombuffer(file.read(math.prod(part) * dtype.itemsize), dtype).reshape(part)


def read_folder(
    folder: epath.Path, name: str = NAME, read: Callable = read_safetensors
) -> dict[str, Tensor] | None:
    """The tensors of `folder/name`, or of the shards of its index where there is no such file; None
    where neither exists.

    A file beside an index wins, as it does in transformers.

    Raises:
      FileNotFoundError: a shard that the index names is missing.
      ValueError: a tensor of the index is not in its shard, or a shard has others; the index names
        a file outside the folder.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        return {one: _of(tensor, one, name) for one, tensor in read(folder / name).items()}
    if not index.exists():
        return None
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values()
    ):
        raise ValueError(f"{index}: its weight_map must hold names of files beside it")
    if missing := sorted({shard for shard in shard_of.values() if not (folder / shard).exists()}):
        raise FileNotFoundError(
            f"{folder}: {index.name} names shards that are not there: {', '.join(missing)}; copy"
            " them again"
        )
    shards = {shard: read(folder / shard) for shard in sorted(set(shard_of.values()))}
    if lost := sorted(name for name, shard in shard_of.items() if name not in shards[shard]):
        raise ValueError(f"{folder}: not in the shard that {index.name} names: {', '.join(lost)}")
    if more := [
        f"{name} in {shard}"
        for shard, held in shards.items()
        for name in held
        if shard_of.get(name) != shard
    ]:
        raise ValueError(
            f"{folder}: {index.name} does not name {', '.join(more[:3])} and knows of other files:"
            " copy the model again"
        )
    return {name: _of(shards[shard][name], name, shard) for name, shard in shard_of.items()}


def _of(tensor: Tensor, name: str, file: str) -> Tensor:
    return tensor._replace(origin=f"{name} of {file}")


def write_folder(
    folder: epath.Path, tensors: Tensors, written: Callable[[int], None] = lambda _: None
) -> dict[str, Hashes]:
    """Writes model.safetensors, or numbered shards and model.safetensors.index.json; shards that
    exist already are kept.

    Args:
      written: called with the number of bytes of each piece that was written.
    Returns:
      {name: hashes of the tensor}
    Raises:
      ValueError: names a tensor that is neither floating-point nor bytes, has another shape or
        dtype than declared, or contains NaN or infinity.
    """
    shards = [[]]
    for name, tensor in tensors.items():
        if tensor.dtype not in WRITTEN:
            raise ValueError(
                f"{name} is {tensor.dtype}; weights are {', '.join(map(str, WRITTEN))}"
            )
        if shards[-1] and sum(tensors[name].size for name in shards[-1]) + tensor.size > SHARD:
            shards.append([])
        shards[-1].append(name)
    files = (
        [NAME]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    hashes = {}
    for file, names in zip(files, shards, strict=True):
        hashes |= _write_shard(folder / file, {name: tensors[name] for name in names}, written)
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        size = sum(tensor.size for tensor in tensors.values())
        paths.write(
            folder / INDEX,
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2),
        )
    for file in files:
        (folder / (file + HASHES)).unlink()
    return hashes


def write_safetensors(path: epath.Path, tensors: Tensors) -> None:
    """Writes one file. Raises ValueError as `write_folder`."""
    _write_shard(path, tensors, lambda _: None)
    path.with_name(path.name + HASHES).unlink()


def _write_shard(
    path: epath.Path, tensors: Tensors, written: Callable[[int], None]
) -> dict[str, Hashes]:
    """One file and its hashes, unless they are there."""
    done = path.with_name(path.name + HASHES)
    if (
        path.exists()
        and done.exists()
        and tensors.keys() == (hashes := json.loads(done.read_text())).keys()
    ):
        written(sum(tensor.size for tensor in tensors.values()))
        return {name: Hashes(*found) for name, found in hashes.items()}
    hashes = {}
    tensors = dict(
        sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    )  # so each begins at a multiple of its item size
    with paths.writing(path) as file:
        file.write(_header(tensors))
        for name, tensor in tensors.items():
            hashes[name] = write_tensor(file, name, tensor, written)
        done.write_text(json.dumps(hashes))
    return hashes


def _header(tensors: Tensors) -> bytes:
    facts, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [offset, offset + tensor.size]
        facts[name] = {
            "dtype": WRITTEN[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        offset = offsets[1]
    text = json.dumps(facts).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text


def write_tensor(
    file: IO[bytes], name: str, tensor: Tensor, written: Callable[[int], None]
) -> Hashes:
    """Writes a tensor's bytes, little-endian and in C order, to an open file and returns its
    hashes.

    Raises ValueError as `write_folder`.
    """
    array, content, chunks = tensor.read(), begin_digest(tensor.dtype, tensor.shape), []
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected {tensor.dtype} {tensor.shape}"
        )
    boxes = block_boxes(tensor.shape, tensor.dtype)
    for number, bits in enumerate(blocks(array)):
        if not_finite(bits, array.dtype):
            raise ValueError(
                f"{name} holds NaN or infinity; mend the checkpoint that it comes from"
            )
        content.update(bits)
        file.write(bits)
        written(bits.nbytes)
        if boxes:
            start, part = boxes[number]
            own = begin_digest(tensor.dtype, part)
            own.update(bits)
            chunks.append([list(start), list(part), own.hexdigest()])
    return Hashes(content.hexdigest(), chunks)


def not_finite(bits: np.ndarray, dtype: np.dtype) -> int:
    """How many numbers of one of an array's `blocks` are NaN or infinity."""
    infinity = INFINITY.get(WRITTEN[dtype], np.inf)
    unsigned = bits & bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)
    return int((unsigned >= infinity).sum()) if unsigned.max(initial=0) >= infinity else 0


def finite(path: epath.Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a foreign file, read whole. Its `read` raises ValueError where it holds NaN or
    infinity: no weight does, and what they do to an answer is not seen.
    """

    def read() -> np.ndarray:
        array = tensor.read()
        if count := sum(not_finite(bits, array.dtype) for bits in blocks(array)):
            raise ValueError(
                f"{path}: {tensor.origin or name} holds NaN or infinity, {count} of its"
                f" {array.size} numbers: copy or save it again"
            )
        return array

    return Tensor(tensor.shape, tensor.dtype, read, origin=tensor.origin)
