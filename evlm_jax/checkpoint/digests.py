"""Digests of what a step of a run holds, chunk by chunk, so that a damaged step is found when it is
read.

    {"meta": sha256 of the step's meta,
     "params": {name: [[start, shape, sha256 of the chunk], ...]}, "groups": likewise}

A chunk is what one device held when the array was saved: a process that reads only some of them can
check those. They stand in the step as JSON of their own and say nothing about how orbax lays the
arrays out."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from evlm_jax.checkpoint.lazy_tensors import digest
from evlm_jax.parallel.distributed import allgather_json

Chunks = dict[str, list]  # name of an array: [start, shape, sha256] of each of its chunks


def step_digests(meta: dict, **items: Mapping[str, jax.Array | np.ndarray]) -> dict:
    """Returns the digests of a step. Every process hashes the shards of its own devices."""
    chunks = [
        (item, name, *chunk)
        for item, arrays in items.items()
        for name, array in arrays.items()
        for chunk in _own(array)
    ]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        sums = list(pool.map(lambda chunk: digest(np.asarray(chunk[-1])), chunks))
    own = {item: {} for item in items}
    for (item, name, start, data), found in zip(chunks, sums):
        own[item].setdefault(name, []).append([start, list(data.shape), found])
    whole = {item: {name: [] for name in arrays} for item, arrays in items.items()}
    for part in allgather_json(own):
        for item, arrays in part.items():
            for name, found in arrays.items():
                whole[item][name] += found
    return {"meta": json_digest(meta)} | whole


def json_digest(value: Any) -> str:
    """sha256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(
        json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()
    ).hexdigest()


def check(name: str, chunk: np.ndarray, found: str) -> np.ndarray:
    """Returns `chunk`. Raises ValueError where it is not what was saved."""
    if digest(chunk) != found:
        raise ValueError(f"{name} is not what was saved there (its digest differs)")
    return chunk


def _own(array: jax.Array | np.ndarray) -> list[tuple[list[int], Any]]:
    """(start, data) of each chunk that this process writes."""
    if not isinstance(array, jax.Array):
        return [([0] * np.ndim(array), array)]
    return [
        ([axis.start or 0 for axis in s.index], s.data)
        for s in array.addressable_shards
        if s.replica_id == 0
    ]
