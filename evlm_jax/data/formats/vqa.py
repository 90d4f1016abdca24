"""Questions about pictures, from the published files of each set: they differ in their fields
alone.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from evlm_jax.data.containers import files, text
from evlm_jax.data.containers.lines import load
from evlm_jax.data.formats.fields import listed, words
from evlm_jax.data.samples import MARKER, ImageRef, Sample, literal, question
from evlm_jax.data.source import Source, by_id, taken

LETTERS = "ABCDEFGHIJ"
CHOOSE = "Reply with the letter of the right option."


@dataclass(frozen=True)
class Fields:
    """Field names of one data set. Functions are called with an entry of `entries(path, options)`.

    `images`: the folder of pictures, relative to the file's, unless the source has `?images=`.
    """

    entries: Callable[[str, dict[str, str]], Iterable[dict]]
    image: Callable[[dict], str | None]
    question: Callable[[dict], str]
    answer: Callable[[dict], str]
    images: str
    options: tuple[str, ...] = ()


def open_set(fields: Fields, name: str, path: str, **options: str) -> Source:
    """One sample a picture with all its questions; an entry without a picture is a sample of its
    own.

    Raises ValueError naming the file and the number of an entry that lacks a field.
    """
    folder = files.join(
        files.parent(path) if path.endswith(".json") else path, options.get("images", fields.images)
    )
    rows: dict[str | int, list[tuple[str, str]]] = {}

    def take(numbered: tuple[int, dict]) -> list:
        number, entry = numbered
        image = fields.image(entry)
        asked = (
            literal(words(fields.question(entry), "question")),
            literal(words(fields.answer(entry), "answer")),
        )
        rows.setdefault(number if image is None else words(image, "image"), []).append(asked)
        return [number]

    try:
        _, bad = taken(enumerate(fields.entries(path, options)), "entry", take)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        said = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"data source {name!r}: {path}: {said}") from error

    def sample(row) -> Sample:
        image, asked = row
        seen = isinstance(image, str)
        visuals = ((ImageRef(files.inside(folder, image)),),) if seen else ()
        return Sample(
            str(image),
            name,
            visuals,
            tuple(question(MARKER * seen + text, answer) for text, answer in asked),
        )

    return Source(name, [*rows.items(), *bad], sample, dialogs=lambda row: len(row[1]), where=path)


def most_common(answers: Iterable[str]) -> str:
    """What most annotators said; of equals, the first."""
    return Counter(listed(answers, "answers")).most_common(1)[0][0]


def choices(asked: str, options: Iterable[str]) -> str:
    """A question with lettered options."""
    lettered = (
        f"{LETTERS[i]}. {words(option, 'an option')}"
        for i, option in enumerate(listed(options, "options"))
    )
    return "\n".join([words(asked, "question"), *lettered, CHOOSE])


def _vqa(path: str, options: dict[str, str]) -> Iterable[dict]:
    """VQAv2 and OK-VQA: questions with `data_subtype`, joined with annotations by question_id."""
    asked = load(path)
    beside = re.sub(r"OpenEnded_(mscoco_\w+)_questions", r"\1_annotations", os.path.basename(path))
    annotations = files.join(files.parent(path), options.get("annotations", beside))
    told = load(annotations)["annotations"]
    answers = by_id(annotations, told, "question_id", "answers")

    def known(q):
        return {"answers": answers[q["question_id"]]} if q.get("question_id") in answers else {}

    return (
        {"split": asked["data_subtype"], **known(q), **q} if isinstance(q, dict) else q
        for q in asked["questions"]
    )


def _ai2d(path: str, options: dict[str, str]) -> Iterable[dict]:
    """questions/N.png.json of each diagram. "train" is what ai2d_test_ids.csv does not name;
    split=all needs no such file.
    """
    split, held_out = options.get("split", "train"), set()
    if split != "all":
        with files.open_file(files.join(path, "ai2d_test_ids.csv")) as table:
            held_out = set(text.decode(table.read()).split())
    for file in files.find(files.join(path, "questions"), (".json",)):
        facts = load(file)
        if split != "all" and (facts["imageName"].removesuffix(".png") in held_out) != (
            split == "test"
        ):
            continue
        yield from (
            {"image": facts["imageName"], "text": asked, **entry}
            for asked, entry in facts["questions"].items()
        )


def _science(path: str, options: dict[str, str]) -> Iterable[dict]:
    split = options.get("split", "train")
    return (
        {"id": number, **entry} for number, entry in load(path).items() if entry["split"] == split
    )


def _science_question(entry: dict) -> str:
    hint = f"Context: {words(entry['hint'], 'hint')}\n" if entry.get("hint") else ""
    return hint + choices(entry["question"], entry["choices"])


def _fold(entry: dict) -> str | None:
    return f"{entry['split']}/{entry['id']}/{entry['image']}" if entry["image"] else None


_COCO = Fields(
    _vqa,
    image=lambda e: f"{e['split']}/COCO_{e['split']}_{e['image_id']:012d}.jpg",
    question=lambda e: e["question"],
    answer=lambda e: most_common([answer["answer"] for answer in listed(e["answers"], "answers")]),
    images="",
    options=("annotations",),
)
SETS = {
    "vqav2": _COCO,
    "okvqa": _COCO,
    "gqa": Fields(
        lambda path, _: load(path).values(),
        image=lambda e: f"{e['imageId']}.jpg",
        question=lambda e: e["question"],
        answer=lambda e: e["answer"],
        images="images",
    ),
    "textvqa": Fields(
        lambda path, _: load(path)["data"],
        image=lambda e: f"{e['image_id']}.jpg",
        question=lambda e: e["question"],
        answer=lambda e: most_common(e["answers"]),
        images="train_images",
    ),
    "docvqa": Fields(
        lambda path, _: load(path)["data"],
        image=lambda e: e["image"],
        question=lambda e: e["question"],
        answer=lambda e: listed(e["answers"], "answers")[0],
        images="",
    ),
    "chartqa": Fields(
        lambda path, _: load(path),
        image=lambda e: e["imgname"],
        question=lambda e: e["query"],
        answer=lambda e: str(e["label"]) if isinstance(e["label"], (int, float)) else e["label"],
        images="png",
    ),
    "ai2d": Fields(
        _ai2d,
        image=lambda e: e["image"],
        question=lambda e: choices(e["text"], e["answerTexts"]),
        answer=lambda e: LETTERS[e["correctAnswer"]],
        images="images",
        options=("split",),
    ),
    "scienceqa": Fields(
        _science,
        image=_fold,
        question=_science_question,
        answer=lambda e: LETTERS[e["answer"]],
        images="images",
        options=("split",),
    ),
}
