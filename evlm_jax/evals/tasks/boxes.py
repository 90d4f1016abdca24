"""RefCOCO, RefCOCO+, RefCOCOg: the box of what a phrase names.

refcoco, refcoco+  refs(unc).p, instances.json, and the images in images/ or train2014/
refcocog           refs(umd).p and the same
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evlm_jax.data.formats.fields import number, pixels
from evlm_jax.data.formats.grounding import unpickle
from evlm_jax.data.source import by_id
from evlm_jax.evals.scorers import boxes
from evlm_jax.evals.task import Question, Scores, Task, column, percent
from evlm_jax.evals.tasks.official import Entry, read_json

ASK = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x,"
    " bottom-right y). All values are floating point numbers bounded between 0 and 1. Please"
    " provide the bounding box coordinate of the region this sentence describes: "
)
RIGHT = 0.5  # IoU


def read_refs(file: Path) -> list[Entry]:
    """The entries of a refs(...).p file."""
    if not file.is_file():
        raise ValueError(f"no file {file}")
    return [Entry(file, number, ref) for number, ref in enumerate(unpickle(str(file)), 1)]


def read(data: Path, split: str, style: str, refs: str) -> list[Question]:
    """A question for each sentence. Its answer is the box, from 0 to 1 of the image."""
    file = data / "instances.json"
    images, annotations = (
        by_id(str(file), read_json(file, kind), "id") for kind in ("images", "annotations")
    )
    questions = []
    for row in read_refs(data / refs):
        if row["split"] != split:
            continue
        if row["image_id"] not in images or row["ann_id"] not in annotations:
            raise row.error(
                f"image {row['image_id']} or annotation {row['ann_id']} is not in {file}"
            )
        image = images[row["image_id"]]
        try:
            across, down = pixels(image)
            left, top, width, height = (
                number(value, "bbox") for value in annotations[row["ann_id"]]["bbox"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise row.error(
                f"image {row['image_id']} or annotation {row['ann_id']} of {file} is not COCO's:"
                f" {error}"
            ) from error
        box = [left / across, top / down, (left + width) / across, (top + height) / down]
        seen = row.image(
            *(data / folder / image["file_name"] for folder in ("images", "train2014"))
        )
        for sentence in row["sentences"]:
            text = (
                f"<ref>{sentence['sent']}</ref><box>"
                if style == "qwen-vl"
                else ASK + sentence["sent"]
            )
            questions.append(
                Question(str(sentence["sent_id"]), text, seen, box, str(row["image_id"]))
            )
    if not questions:
        raise ValueError(f"{data / refs}: no row of split {split!r}")
    return questions


def score(rows: Sequence[dict]) -> Scores:
    """Share of boxes with an IoU of at least 0.5, and the mean IoU, by both ways to write a box."""
    each = {}
    for rule in ("lmms-eval", "qwen-vl"):
        overlap = boxes.overlaps(column(rows, "prediction"), column(rows, "answer"), rule)
        each |= {
            f"accuracy at 0.5 ({rule})": percent([float(x >= RIGHT) for x in overlap]),
            f"IoU ({rule})": percent(overlap),
        }
    return Scores(each, {})


UNC, UMD = ("val", "testA", "testB"), ("val", "test")
TASKS = (
    Task("refcoco", partial(read, refs="refs(unc).p"), score, UNC, tokens=64),
    Task("refcoco+", partial(read, refs="refs(unc).p"), score, UNC, tokens=64),
    Task("refcocog", partial(read, refs="refs(umd).p"), score, UMD, tokens=64),
)
