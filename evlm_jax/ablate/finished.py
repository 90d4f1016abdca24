"""A finished run on disk: result.json, a line for each part, with an outcome for every question.

Formats of the file so far:
  0  no number; every reading holds the sizes of its clusters, and scores that nothing reads
  1  the clusters once, as bits
In memory a run is {"variant", "seed", "changes", "trained", "settings", "clusters": {task:
[questions of each image]}, "budgets", "readings": {step: what `job.read` returns less clusters}}.
"""

import base64
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from evlm_jax.evals import results

FORMAT = 1
PARTS = ("variant", "seed", "changes", "trained", "settings", "budgets", "readings")


def save(file: os.PathLike | str, run: dict) -> epath.Path:
    """Writes a run, atomically; its readings may have clusters, as `job.read` returns them."""
    run = _clusters_once(run)
    clusters = {name: _pack_clusters(sizes) for name, sizes in run["clusters"].items()}
    return results.save(file, {"format": FORMAT} | run | {"clusters": clusters})


def load(file: os.PathLike | str) -> dict:
    """Reads what `save` wrote, in any format so far.

    Raises ValueError where the file is something else, or of a format that came later.
    """
    run = results.load(file)
    number = run.pop("format", 0)
    if number not in range(FORMAT + 1) or isinstance(number, bool):
        raise ValueError(
            f"{file}: a finished run of format {number}, this version reads 0 to {FORMAT}: update"
        )
    parts = PARTS if number == 0 else (*PARTS, "clusters")
    if missing := [name for name in parts if name not in run]:
        raise ValueError(f"{file}: not a finished run of `evlm ablate`: no {', '.join(missing)}")
    try:
        if number == 0:
            run = _clusters_once(run)
        else:
            run["clusters"] = {
                name: _unpack_clusters(packed) for name, packed in run["clusters"].items()
            }
        for reading in run["readings"].values():
            for metric, packed in reading["measured"].items():
                unpack(packed, sum(run["clusters"][metric.partition("/")[0]]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not what `evlm ablate` writes: {error!r}; remove it") from error
    return run


def _clusters_once(run: dict) -> dict:
    """`run` with the clusters of its readings beside them, and without their scores."""
    if "clusters" in run:
        return run
    each = [reading["clusters"] for reading in run["readings"].values()]
    if any(clusters != each[0] for clusters in each):
        raise ValueError("its test questions differ between its readings")
    readings = {
        step: {name: part for name, part in reading.items() if name not in ("clusters", "scores")}
        for step, reading in run["readings"].items()
    }
    return run | {"clusters": each[0], "readings": readings}


def _pack_clusters(sizes: Sequence[int]) -> dict:
    """Sizes of clusters as one bit for each question: whether it is the first of its cluster."""
    first = np.zeros(sum(sizes))
    first[np.cumsum([0, *sizes[:-1]])] = 100.0
    return {"questions": len(first), "first of an image": pack(first)}


def _unpack_clusters(packed: dict) -> list[int]:
    """Inverse of `_pack_clusters`."""
    count = packed["questions"]
    first = np.flatnonzero(unpack(packed["first of an image"], count))
    return np.diff(first, append=count).tolist()


def pack(values: Sequence[float]) -> str | dict | list[float]:
    """Values of all questions, compactly: right and wrong (100 and 0) as base64 of bits, others
    rounded, and by question where most are 0.
    """
    if set(values) <= {0.0, 100.0}:
        return base64.b64encode(np.packbits(np.array(values) > 0).tobytes()).decode()
    rounded = [round(float(value), 4) for value in values]
    others = {str(i): value for i, value in enumerate(rounded) if value}
    return others if 2 * len(others) < len(rounded) else rounded


def unpack(packed: str | dict | list[float], count: int) -> np.ndarray:
    """Inverse of `pack`, float64 [count]. Raises ValueError where there are more or fewer."""
    if isinstance(packed, str):
        content = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8)
        if len(content) != -(-count // 8):
            raise ValueError(f"{len(content)} bytes hold no outcomes of {count} questions")
        return 100.0 * np.unpackbits(content, count=count)
    if isinstance(packed, dict):
        values = np.zeros(count)
        values[[int(i) for i in packed]] = list(packed.values())
        return values
    if len(packed) != count:
        raise ValueError(f"{len(packed)} outcomes of {count} questions")
    return np.array(packed, np.float64)
