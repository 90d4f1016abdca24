"""Pictures and videos with captions."""

import os
from collections.abc import Sequence

from evlm_jax.checkpoint.lazy_tensors import distinct
from evlm_jax.data import video
from evlm_jax.data.containers import files, text
from evlm_jax.data.containers.lines import load
from evlm_jax.data.formats.fields import IMAGES, VIDEOS, facts, has, member, words
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal, question
from evlm_jax.data.source import Source, by_id, key_of, taken

DESCRIBE, DESCRIBE_VIDEO = "Describe this image.", "Describe this video."
FRAMES = "16"  # of a video (the paper shows 16), as in video.sample


def captioned(
    name: str,
    key: str,
    file: str,
    captions: Sequence[str],
    prompt: str,
    frames: str = FRAMES,
    scores: Sequence[float] = (),
) -> Sample:
    """A dialog for each caption: the prompt and the caption as its answer; without a prompt, the
    caption alone.
    """
    moving = file.partition("::")[0].lower().endswith(VIDEOS)
    visual = video.sample(file, frames) if moving else (ImageRef(file),)
    if moving and prompt == DESCRIBE:
        prompt = DESCRIBE_VIDEO

    def alone(text):
        return (Turn("assistant", MARKER + text),)

    dialogs = tuple(
        question(MARKER + prompt, text) if prompt else alone(text)
        for text in map(literal, captions)
    )
    key = key.encode(errors="backslashreplace").decode()  # a file's name may not be UTF-8
    return Sample(key, name, (visual,), dialogs, tuple(scores))


def img2dataset(
    name: str, root: str, row: dict, *, prompt: str = "", frames: str = FRAMES
) -> Sample:
    """A row of img2dataset or video2dataset, as tar or parquet: jpg (or another kind), txt or
    caption, json with `similarity` maybe.
    """
    told = facts(row)
    file = member(row, root, (*IMAGES, *VIDEOS))
    given = row.get("txt") if row.get("txt") is not None else told.get("caption")
    if given is None:
        raise ValueError(f"no caption: neither txt nor caption; {has(row)}")
    caption, score = words(given, "caption"), told.get("similarity")
    if not caption.strip():
        raise ValueError("the caption is empty")
    return captioned(
        name, key_of(row), file, [caption], prompt, frames, () if score is None else (float(score),)
    )


def coco(name: str, path: str, *, images: str = "", prompt: str = DESCRIBE) -> Source:
    """COCO's captions_{split}.json: {"images": [{"id", "file_name"}], "annotations":
    [{"image_id", "caption"}]}.

    Args:
      images: their folder; by default COCO's own: {split} beside the folder of annotations.
    """
    content = load(path)
    folder = images or files.join(
        files.parent(path, 2),
        os.path.basename(path).removesuffix(".json").removeprefix("captions_"),
    )
    captions: dict[int, list[str]] = {}

    def caption(annotation: dict) -> None:
        captions.setdefault(annotation["image_id"], []).append(
            words(annotation["caption"], "caption").strip()
        )

    _, bad = taken(content["annotations"], "annotation", lambda annotation: [caption(annotation)])
    pictures, worse = taken(
        content["images"],
        "image",
        lambda image: [(image["id"], image["file_name"])] if image["id"] in captions else [],
    )
    by_id(path, [{"id": number} for number, _ in pictures], "id")  # two would share captions
    rows = [(number, file, captions[number]) for number, file in pictures]
    return _captions(name, path, [*rows, *bad, *worse], folder, prompt)


def karpathy(
    name: str, path: str, *, split: str = "train", images: str = "", prompt: str = DESCRIBE
) -> Source:
    """Karpathy's dataset_{coco,flickr30k}.json: {"images": [{"filename", "filepath", "split",
    "sentences": [{"raw"}]}]}.

    Args:
      split: "train" includes "restval", as is usual.
      images: the folder of `filepath`; by default the one of the file.
    """
    splits = ("train", "restval") if split == "train" else (split,)

    def row(image: dict) -> list[tuple]:
        if image["split"] not in splits:
            return []
        file = files.join(image.get("filepath", ""), image["filename"])
        return [
            (
                image.get("cocoid", image["imgid"]),
                file,
                [words(s["raw"], "raw") for s in image["sentences"]],
            )
        ]

    rows, bad = taken(load(path)["images"], "image", row)
    return _captions(name, path, [*rows, *bad], images or files.parent(path), prompt)


def _captions(name: str, path: str, rows: list[tuple], folder: str, prompt: str) -> Source:
    """Rows are (key, file, captions)."""

    def sample(row):
        return captioned(name, str(row[0]), files.inside(folder, row[1]), row[2], prompt)

    return Source(name, rows, sample, dialogs=lambda row: len(row[2]), where=path)


def folder(name: str, path: str, *, prompt: str = DESCRIBE, frames: str = FRAMES) -> Source:
    """Images and videos anywhere below a folder, each with its caption in a .txt beside it."""
    path = path if files.remote(path) else os.path.abspath(path)
    kinds = tuple(f".{kind}" for kind in (*IMAGES, *VIDEOS))

    def stem(file):
        return os.path.splitext(file)[0]

    found = files.find(path, (*kinds, ".txt"))
    texts = distinct([(stem(f), f) for f in found if f.lower().endswith(".txt")], "caption file of")
    rows = [file for file in found if file.lower().endswith(kinds)]
    if bare := [file for file in rows if stem(file) not in texts]:
        raise ValueError(
            f"data source {name!r}: {len(bare)} images have no caption file, the first is"
            f" {stem(bare[0])}.txt"
        )

    def sample(file: str) -> Sample:
        with files.open_file(texts[stem(file)]) as opened:
            caption = text.decode(opened.read()).strip()
        if not caption:
            raise ValueError(f"{texts[stem(file)]} is empty")
        return captioned(name, file[len(path) :].lstrip("/"), file, [caption], prompt, frames)

    return Source(name, rows, sample, where=path, beside=[*rows, *texts.values()])
