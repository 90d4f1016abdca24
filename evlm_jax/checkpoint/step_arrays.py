"""The arrays of one item of a step, as orbax saved them, read chunk by chunk and held against their
digests."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from evlm_jax import paths
from evlm_jax.checkpoint import digests
from evlm_jax.checkpoint.lazy_tensors import Chunk, Tensor

CACHE = 2**25  # bytes of an item's own index that are kept; arrays are not


def open_arrays(
    path: epath.Path,
    sums: digests.Chunks | None,
    blamed: Callable[[], AbstractContextManager],
) -> dict[str, Tensor]:
    """What orbax saved at `path`, lazily; nothing where there is no such item.

    An array is read in the chunks in which it was saved, each compared with its digest; in one
    piece and unverified where there are none.

    Args:
      blamed: makes a context that names the step in the errors of what is done within it.
    """
    if not path.exists():
        check_names(path, {}, sums)
        return {}
    saved = flatten_dict(ocp.PyTreeCheckpointHandler().metadata(path).tree, sep="/")
    check_names(path, saved, sums)
    context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": CACHE}})

    def box(name: str, start: list[int], shape: list[int], found: str | None) -> np.ndarray:
        with blamed():
            array = _stored(path, name, context)
            box = tuple(slice(first, first + size) for first, size in zip(start, shape))
            read = np.asarray(array[box].read().result())
            return read if found is None else digests.check(f"{path.name}/{name}", read, found)

    def whole(name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple) -> np.ndarray:
        if not chunks:
            return box(name, [0] * len(shape), list(shape), None)
        out = np.empty(shape, dtype)
        for chunk in chunks:
            place = zip(chunk.start, chunk.shape)
            out[tuple(slice(first, first + size) for first, size in place)] = chunk.read()
        return out

    tensors = {}
    for name, about in saved.items():
        shape, dtype = tuple(about.shape), np.dtype(about.dtype)
        chunks = tuple(
            Chunk(tuple(start), tuple(part), partial(box, name, start, part, found))
            for start, part, found in (sums[name] if sums else ())
        )
        if sums and math.prod(shape) != sum(math.prod(chunk.shape) for chunk in chunks):
            raise ValueError(f"{path.name}/{name} has another size than what was saved there")
        tensors[name] = Tensor(shape, dtype, partial(whole, name, shape, dtype, chunks), chunks)
    return tensors


def _stored(path: epath.Path, name: str, context: tensorstore.Context) -> tensorstore.TensorStore:
    """The array in orbax's layout: zarr in one OCDBT database an item, keys joined by dots."""
    base = f"{path}/" if paths.remote(path) else {"driver": "file", "path": f"{path}/"}
    database = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}
    spec = {
        "driver": "zarr",
        "kvstore": database | {"path": f"{name.replace('/', '.')}/"},
        "fill_missing_data_reads": False,
    }
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def check_names(path: epath.Path, found: dict, sums: digests.Chunks | None) -> None:
    """Raises ValueError where an item has other arrays than were saved."""
    if sums is not None and (wrong := sorted(found.keys() ^ sums.keys())):
        raise ValueError(
            f"{path.name} has other arrays than were saved there, first of them {wrong[0]}"
        )


def nest(arrays: dict) -> dict:
    """Nested dicts by the parts of the names, the form that orbax expects."""
    return unflatten_dict(arrays, sep="/")
