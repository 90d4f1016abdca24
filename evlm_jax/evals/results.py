"""Scores on disk: what was measured, on which weights, with which prompt, preprocessing and
versions.

A result is a plain dict that JSON can hold: {"task", "scores", "examples", "provenance", ...}. The
examples keep the raw generations, so that a score can be computed again, by another rule, without
the model."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform

import jax
import numpy as np
from etils import epath

from evlm_jax.config import EVLMConfig, to_saved
from evlm_jax.data.source import by_id
from evlm_jax.paths import place, write

PACKAGES = ("evlm-jax", "jax", "flax", "numpy", "tokenizers", "pillow")
TEXTS = ("id", "cluster", "prediction")  # of an example
LINE = 800  # characters that a part of a result takes before its entries have lines of their own


def weights_hash(arrays: dict[str, jax.Array]) -> str:
    """sha256 over names, dtypes, shapes and bytes of {canonical name: array}: the same in any
    checkpoint layout.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def provenance(cfg: EVLMConfig, weights: str, checkpoint: str = "") -> dict:
    """What every result carries.

    Args:
      weights: `weights_hash` of all parameters.
      checkpoint: name and step of the checkpoint, for people.
    """
    return {
        "checkpoint": checkpoint,
        "weights_sha256": weights,
        "config": to_saved(cfg),
        "preprocessing": {
            "image_size": cfg.vit.image_size,
            "resize": cfg.data.resize,
            "mean": cfg.vit.mean,
            "std": cfg.vit.std,
        },
        "versions": (
            {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
        ),
        "device": device(),
    }


def device() -> str:
    """What the run used, for people."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"


def save(path: os.PathLike | str, result: dict) -> epath.Path:
    """Writes JSON, atomically: small, with a line for each part that people would compare.

    Raises ValueError where a number is not finite (name the key and mend the score).
    """
    return write(path, _lines(_plain(result, "")) + "\n")


def load(path: os.PathLike | str) -> dict:
    """Reads what `save` wrote. Raises ValueError where the file is something else, OSError where
    there is none.
    """
    if place(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the result file of `evlm eval` in it")
    try:
        result = json.loads(place(path).read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not a result of `evlm eval`: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: not a result of `evlm eval`: it holds no JSON object")
    return result


def load_answers(path: os.PathLike | str) -> dict:
    """A result with its answers. Raises ValueError where the file is something else."""
    result = load(path)
    rows = result.get("examples")
    if not isinstance(result.get("task"), str) or not isinstance(rows, list):
        raise ValueError(f"{path}: not a result of `evlm eval`: it has no 'task' and 'examples'")
    for number, row in enumerate(rows, 1):
        told = row if isinstance(row, dict) else {}
        if wrong := [name for name in TEXTS if not isinstance(told.get(name), str)]:
            raise ValueError(f"{path}: example {number}: {wrong[0]!r} must be a text")
        if "answer" not in told:
            raise ValueError(f"{path}: example {number} has no 'answer'")
    by_id(str(path), rows, "id")
    return result


def _lines(value) -> str:
    """JSON on one line; entries of an object, or of a list of objects, on lines of their own where
    it would be longer than LINE.
    """

    def dumped(part):
        return json.dumps(part, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    text = dumped(value)
    if len(text) <= LINE:
        return text
    if isinstance(value, dict):
        entries = [f"{dumped(key)}:{_lines(entry)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return "[\n" + ",\n".join(map(_lines, value)) + "\n]"
    return text


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _plain(value, key: str):
    """Arrays and tuples as lists, numpy scalars as numbers."""
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, (np.ndarray, jax.Array, np.generic)):
        return _plain(np.asarray(value).tolist(), key)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"result: {key} is {value}; a saved score must be finite")
    return value
