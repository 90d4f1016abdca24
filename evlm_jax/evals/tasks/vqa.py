"""VQAv2, VizWiz, TextVQA, GQA: questions about photographs with short answers.

vqav2     v2_OpenEnded_mscoco_SPLIT_questions.json, v2_mscoco_SPLIT_annotations.json (not for test),
          SPLIT/COCO_SPLIT_000000000042.jpg
vizwiz    Annotations/SPLIT.json, SPLIT/*.jpg
textvqa   TextVQA_0.5.1_SPLIT.json, train_images/; textvqa-ocr adds the words of
          TextVQA_Rosetta_OCR_v0.2_SPLIT.json to the prompt
gqa       SPLIT_questions.json, images/
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evlm_jax.evals.scorers import vqa
from evlm_jax.evals.task import SHORT, Question, Scores, Task, column, percent, short
from evlm_jax.evals.tasks.official import json_rows

ANNOTATORS = 10
UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
)


def read_vqav2(data: Path, split: str, style: str) -> list[Question]:
    """Test splits have no annotations: their questions have the answer None."""
    given = {}
    if not split.startswith("test"):
        for row in json_rows(data / f"v2_mscoco_{split}_annotations.json", "annotations"):
            given[row["question_id"]] = row.answers(
                (a["answer"] for a in row["answers"]), ANNOTATORS
            )
    questions, folder = [], split.replace("-dev", "")
    for row in json_rows(data / f"v2_OpenEnded_mscoco_{split}_questions.json", "questions"):
        if given and row["question_id"] not in given:
            raise row.error(f"question {row['question_id']} has no annotation")
        image = row.image(data / folder / f"COCO_{folder}_{row['image_id']:012d}.jpg")
        answer = given.get(row["question_id"])
        questions.append(
            Question(
                str(row["question_id"]),
                short(row["question"], style),
                image,
                answer,
                str(row["image_id"]),
            )
        )
    return questions


def read_vizwiz(data: Path, split: str, style: str) -> list[Question]:
    """One question an image, by its name."""
    questions = []
    for row in json_rows(data / "Annotations" / f"{split}.json"):
        answers = (
            None
            if split == "test"
            else row.answers((a["answer"] for a in row["answers"]), ANNOTATORS)
        )
        text = short(row["question"].capitalize(), style, UNANSWERABLE)
        questions.append(
            Question(
                row["image"], text, row.image(data / split / row["image"]), answers, row["image"]
            )
        )
    return questions


def read_textvqa(data: Path, split: str, style: str, ocr: bool) -> list[Question]:
    """`ocr`: the prompt names the words that were read on the image."""
    read = {}
    if ocr:
        read = {
            row["image_id"]: row["ocr_tokens"]
            for row in json_rows(data / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", "data")
        }
    questions = []
    for row in json_rows(data / f"TextVQA_0.5.1_{split}.json", "data"):
        text, image = row["question"].capitalize(), row["image_id"]
        if ocr and image not in read:
            raise row.error(f"image {image} has no OCR tokens")
        text += f"\nReference OCR token: {', '.join(read[image])}" if ocr else ""
        answers = None if split == "test" else row.answers(row["answers"], ANNOTATORS)
        photo = row.image(
            data / ("test_images" if split == "test" else "train_images") / f"{image}.jpg"
        )
        questions.append(
            Question(str(row["question_id"]), short(text, style), photo, answers, image)
        )
    return questions


def read_gqa(data: Path, split: str, style: str) -> list[Question]:
    """Questions of the balanced sets."""
    questions = []
    for row in json_rows(data / f"{split}_questions.json"):
        image = row.image(data / "images" / f"{row['imageId']}.jpg")
        questions.append(
            Question(
                str(row.number), short(row["question"], style), image, row["answer"], row["imageId"]
            )
        )
    return questions


def score_vqa(rows: Sequence[dict], rules: tuple[str, ...]) -> Scores:
    """VQA accuracy by each rule."""
    accuracy = partial(vqa.vqa_accuracy, column(rows, "prediction"), column(rows, "answer"))
    return Scores({f"accuracy ({rule})": percent(accuracy(rule)) for rule in rules}, {})


def score_gqa(rows: Sequence[dict]) -> Scores:
    """Exact match by both rules."""
    match = partial(vqa.gqa, column(rows, "prediction"), column(rows, "answer"))
    return Scores(
        {f"accuracy ({rule})": percent(match(rule)) for rule in ("lmms-eval", "llava")}, {}
    )


EVALAI = partial(score_vqa, rules=("evalai",))
TASKS = (
    Task(
        "vqav2",
        read_vqav2,
        partial(score_vqa, rules=("official", "lmms-eval")),
        ("val2014", "test-dev2015", "test2015", "train2014"),
    ),
    Task("vizwiz", read_vizwiz, EVALAI, ("val", "test", "train")),
    Task("textvqa", partial(read_textvqa, ocr=False), EVALAI, ("val", "test", "train")),
    Task("textvqa-ocr", partial(read_textvqa, ocr=True), EVALAI, ("val", "test", "train")),
    Task("gqa", read_gqa, score_gqa, ("testdev_balanced", "val_balanced")),
)
