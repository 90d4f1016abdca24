"""Frozen stores: parameters that no step changes, in safetensors files under the hash of their
content."""

import hashlib
import json
from collections.abc import Callable
from functools import partial

import numpy as np
from etils import epath

from evlm_jax import paths
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, digest
from evlm_jax.checkpoint.run_layout import (
    CHUNKS,
    FROZEN,
    INCOMPLETE,
    MANIFEST,
    finished,
    read_object,
)
from evlm_jax.checkpoint.safetensors_file import read_folder, write_folder


def write_store(
    root: epath.Path, tensors: Tensors, written: Callable[[int], None] = lambda _: None
) -> str:
    """Writes a frozen store tensor by tensor and returns its hash; an incomplete one under the same
    root is continued.

    Args:
      written: called with the number of bytes of each piece that was written.
    """
    aside = root / FROZEN / f"new{INCOMPLETE}"
    paths.make(aside)
    hashes = write_folder(aside, tensors, written)
    manifest = {name: found.whole for name, found in hashes.items()}
    chunks = {name: found.chunks for name, found in hashes.items() if found.chunks}
    if chunks:
        paths.write(aside / CHUNKS, json.dumps(chunks))
    store = root / FROZEN / store_name(manifest)
    if finished(store):  # a writer that was cut off behind this line has left it
        aside.rmtree()
    elif paths.remote(root):  # object by object, inside the store; with the manifest it is finished
        for path in paths.children(aside):
            paths.copy(path, store / path.name)
        paths.write(store / MANIFEST, json.dumps(manifest, indent=0))
        aside.rmtree()
    else:
        paths.write(aside / MANIFEST, json.dumps(manifest, indent=0))
        aside.rename(store)
    return store.name


def read_store(root: epath.Path, store: str) -> dict[str, Tensor]:
    """Returns the tensors of a store, lazily; each is compared with the manifest when it is read, a
    chunk of a large one with its own digest.

    Raises ValueError where the store is missing, another one or damaged, with the mend.
    """
    path = root / FROZEN / store
    if not finished(path):
        present = ", ".join(p.name for p in paths.children(root / FROZEN)) or "none"
        raise ValueError(
            f"the checkpoint needs the frozen store {store}, {root / FROZEN} has {present}: copy"
            f" {store} there"
        )
    manifest = manifest_of(root, store)
    if (found := store_name(manifest)) != store:
        raise ValueError(
            f"the checkpoint needs the frozen store {store}, the content of {path} has hash"
            f" {found}: copy the original there"
        )
    try:
        tensors = read_folder(path) or {}
        chunks = _chunk_digests(path)
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read: {str(error).splitlines()[0]}: copy the original store there"
        ) from error
    if lost := sorted(manifest.keys() - tensors.keys()):
        raise ValueError(
            f"{path}: {len(lost)} tensors are not there, first of them {', '.join(lost[:3])}: copy"
            " the original store there"
        )

    def checked(name: str, read: Callable[[], np.ndarray], found: str) -> np.ndarray:
        if digest(array := read()) != found:
            raise ValueError(
                f"{path}: {name} is not what was written there (its hash differs): copy the"
                " original store there"
            )
        return array

    def opened(name: str, tensor: Tensor) -> Tensor:
        told = chunks.get(name, {})
        parts = tensor.chunks if {chunk[:2] for chunk in tensor.chunks} <= told.keys() else ()
        return tensor._replace(
            read=partial(checked, name, tensor.read, manifest[name]),
            chunks=tuple(
                part._replace(read=partial(checked, name, part.read, told[part[:2]]))
                for part in parts
            ),
        )

    return {name: opened(name, tensors[name]) for name in manifest}


def _chunk_digests(path: epath.Path) -> dict[str, dict[tuple, str]]:
    """{name: {(start, shape): digest}} of large tensors; former stores have none."""
    if not (path / CHUNKS).exists():
        return {}
    return {
        name: {(tuple(start), tuple(shape)): found for start, shape, found in told}
        for name, told in read_object(path / CHUNKS).items()
    }


def manifest_of(root: epath.Path, store: str) -> dict[str, str]:
    """{name: hash of its tensor} of a frozen store."""
    return read_object(root / FROZEN / store / MANIFEST)


def store_name(manifest: dict[str, str]) -> str:
    """Name of a store: the hash of its content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
