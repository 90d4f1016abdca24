"""Rows that `evlm data build` writes: all of a sample, with its pictures inside.

A row is {"json": {"key", "visuals": fields of the frames of each, "dialogs": [[[role, text], ...],
...], "scores", "labels"}, "0.jpg": picture,
...}: in a tar a member each, in an ArrayRecord file a msgpack map.
"""

from collections.abc import Sequence

from evlm_jax.data.containers.files import Ref
from evlm_jax.data.samples import ImageRef, Sample, Turn


def row_of(sample: Sample, pictures: Sequence[tuple[str, bytes]]) -> dict:
    """A sample as a row. `pictures`: suffix and bytes of each of `sample.refs`."""
    fields = [f"{number}.{suffix}" for number, (suffix, _) in enumerate(pictures)]
    names = iter(fields)
    facts = {
        "key": sample.key,
        "visuals": [[next(names) for _ in visual] for visual in sample.visuals],
        "dialogs": [[[turn.role, turn.text] for turn in dialog] for dialog in sample.dialogs],
        "scores": [float(score) for score in sample.scores],
        "labels": list(sample.labels),
    }
    return {"json": facts} | {field: content for field, (_, content) in zip(fields, pictures)}


def built(name: str, root: str, row: dict) -> Sample:
    """The sample of a row."""
    facts = row["json"]
    visuals = tuple(
        tuple(ImageRef(_held(row, field)) for field in visual) for visual in facts["visuals"]
    )
    dialogs = tuple(tuple(Turn(role, text) for role, text in dialog) for dialog in facts["dialogs"])
    labels = tuple(facts.get("labels", ()))  # shards of before have none
    return Sample(facts["key"], name, visuals, dialogs, tuple(facts["scores"]), labels)


def _held(row: dict, field: str) -> Ref:
    """A picture of the row itself: its json names no other file."""
    if not isinstance(row[field], Ref):
        raise ValueError(f"{field!r} is no picture of the row")
    return row[field]
