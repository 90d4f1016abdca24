"""Boxes as text: `<ref>the cat</ref><box>(x1,y1),(x2,y2)</box>` on a grid of 0 to 999, as Qwen-VL
writes them.
"""

import pickle
from collections.abc import Iterable, Sequence

from evlm_jax.data.containers import files
from evlm_jax.data.containers.lines import load
from evlm_jax.data.formats.fields import facts, listed, member, number, pixels, words
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal, question
from evlm_jax.data.source import Source, by_id, taken

GRID, SLACK = 1000, 0.01  # boxes may stick out by rounding
LOCATE = "Locate: "


def box(corners: Sequence[float]) -> str:
    """`<box>(x1,y1),(x2,y2)</box>` of x1, y1, x2, y2 as shares of width and height.

    Raises ValueError for a box that is none.
    """
    x1, y1, x2, y2 = corners
    if not (-SLACK <= x1 <= x2 <= 1 + SLACK and -SLACK <= y1 <= y2 <= 1 + SLACK):
        raise ValueError(f"box {tuple(corners)} is not within the picture")
    a, b, c, d = (min(max(int(GRID * value), 0), GRID - 1) for value in (x1, y1, x2, y2))
    return f"<box>({a},{b}),({c},{d})</box>"


def refcoco(
    name: str,
    path: str,
    *,
    instances: str = "instances.json",
    images: str = "",
    split: str = "train",
) -> Source:
    """RefCOCO, RefCOCO+ and RefCOCOg: refs(unc).p = [{"ann_id", "image_id", "split", "sentences":
    [{"sent"}]}] beside instances.json.

    One sample a picture, one dialog a sentence: from what is said to its box.

    Args:
      images: folder of COCO's train2014; by default images/mscoco/images/train2014 two folders
        above the file, as in the refer toolkit.
    """
    beside = files.join(files.parent(path), instances)
    content = load(beside)
    pictures = by_id(beside, content["images"], "id")
    boxes = by_id(beside, content["annotations"], "id", "bbox")
    folder = images or files.join(files.parent(path, 3), "images/mscoco/images/train2014")
    said: dict[int, list[tuple[str, int]]] = {}

    def take(ref: dict) -> list:
        if ref["split"] == split:
            sentences = [
                (words(sentence["sent"], "sent"), ref["ann_id"]) for sentence in ref["sentences"]
            ]
            said.setdefault(ref["image_id"], []).extend(sentences)
        return [None]

    _, bad = taken(unpickle(path), "entry", take)

    def sample(row) -> Sample:
        picture, sentences = pictures[row[0]], row[1]
        dialogs = [_located(text, picture, boxes[number]) for text, number in sentences]
        return Sample(
            str(row[0]),
            name,
            ((ImageRef(files.inside(folder, picture["file_name"])),),),
            tuple(dialogs),
        )

    return Source(
        name,
        [*said.items(), *bad],
        sample,
        dialogs=lambda row: len(row[1]),
        where=path,
        beside=[beside],
    )


def _located(text: str, picture: dict, where: Sequence[float]):
    """The dialog that asks for what `text` says; `where`: its [x, y, w, h] in pixels."""
    (x, y, w, h), (across, down) = (number(value, "bbox") for value in where), pixels(picture)
    place = box((x / across, y / down, (x + w) / across, (y + h) / down))
    return question(f"{MARKER}{LOCATE}{literal(text)}", f"<ref>{literal(text)}</ref>{place}")


def grit(
    name: str, root: str, row: dict, *, images: str = "images", spans: str = "ref_exps"
) -> Sample:
    """GRIT: "caption" with "ref_exps" or "noun_chunks" = [[start, end, x1, y1, x2, y2, score]],
    shares of width and height.

    From img2dataset's tars with these columns in the json, or from the published parquet with
    pictures {key}.jpg in `images`. Boxes of one span follow each other; a span that overlaps an
    earlier one is left out."""
    told = facts(row)
    published = "jpg" not in row and "json" not in row
    file = (
        files.inside(files.join(root, images), f"{told['key']}.jpg")
        if published
        else member(row, root)
    )
    score = told.get("clip_similarity_vitl14", told.get("clip_similarity_vitb32"))
    text = grounded(words(told["caption"], "caption"), listed(told[spans], spans))
    return Sample(
        str(told["key"]),
        name,
        ((ImageRef(file),),),
        ((Turn("assistant", MARKER + text),),),
        () if score is None else (float(score),),
    )


def grounded(caption: str, spans: Iterable[Sequence[float]]) -> str:
    """The caption with <ref> and <box> in it.

    Raises ValueError for a span outside of the text, or a box outside of the picture.
    """
    boxes: dict[tuple[int, int], list[str]] = {}
    for start, end, *corners in spans:
        if not 0 <= start < end <= len(caption):
            raise ValueError(f"span {start:g} to {end:g} in a text of {len(caption)} characters")
        boxes.setdefault((int(start), int(end)), []).append(box(corners[:4]))
    made, at = "", 0
    for start, end in sorted(boxes, key=lambda span: (span[0], -span[1])):
        if start >= at:
            made += (
                f"{literal(caption[at:start])}<ref>{literal(caption[start:end])}</ref>"
                f"{''.join(boxes[start, end])}"
            )
            at = end
    return made + literal(caption[at:])


class _Plain(pickle.Unpickler):
    """Unpickles lists, dicts, texts and numbers: nothing is imported, so nothing can be run."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, only plain values are read"
        )


def unpickle(path: str) -> list[dict]:
    """A pickle of plain values.

    Raises ValueError naming the file where it is damaged, or would run code.
    """
    try:
        with files.open_file(path) as file:
            return _Plain(file, encoding="utf-8").load()
    except OSError:
        raise
    except Exception as error:  # of damaged files it raises errors of any kind
        raise ValueError(f"{path}: {error}") from error
