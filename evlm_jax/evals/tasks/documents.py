"""DocVQA and ChartQA: answers that are read off the image.

docvqa    SPLIT_v1.0.json or SPLIT_v1.0_withQT.json, with the images' paths in it (documents/*.png)
chartqa   SPLIT/SPLIT_human.json, SPLIT/SPLIT_augmented.json, SPLIT/png/
"""

from collections.abc import Sequence
from pathlib import Path

from evlm_jax.evals.scorers import documents
from evlm_jax.evals.task import Question, Scores, Task, column, percent, short
from evlm_jax.evals.tasks.official import json_rows

PARTS = ("human", "augmented")


def read_docvqa(data: Path, split: str, style: str) -> list[Question]:
    """The test split has no answers."""
    questions, typed = [], data / f"{split}_v1.0_withQT.json"
    for row in json_rows(typed if typed.is_file() else data / f"{split}_v1.0.json", "data"):
        answers = None if split == "test" else row["answers"]
        if answers == []:
            raise row.error("0 answers, there must be at least one")
        questions.append(
            Question(
                str(row["questionId"]),
                short(row["question"], style),
                row.image(data / row["image"]),
                answers,
                row["image"],
            )
        )
    return questions


def read_chartqa(data: Path, split: str, style: str) -> list[Question]:
    """Questions of both halves, distinguished by row["part"]."""
    questions = []
    for part in PARTS:
        for row in json_rows(data / split / f"{split}_{part}.json"):
            text = short(row["query"], style, "\nAnswer the question with a single word.")
            image = row.image(data / split / "png" / row["imgname"])
            questions.append(
                Question(
                    f"{part}-{row.number}",
                    text,
                    image,
                    str(row["label"]),
                    row["imgname"],
                    {"part": part},
                )
            )
    return questions


def score_docvqa(rows: Sequence[dict]) -> Scores:
    """ANLS."""
    return Scores(
        {"anls": percent(documents.anls(column(rows, "prediction"), column(rows, "answer")))}, {}
    )


def score_chartqa(rows: Sequence[dict]) -> Scores:
    """Relaxed accuracy of all and of each half, by both rules."""
    each, parts = {}, column(rows, "part")
    for rule in ("lmms-eval", "qwen-vl"):
        right = percent(
            documents.relaxed_accuracy(column(rows, "prediction"), column(rows, "answer"), rule)
        )
        each[f"relaxed accuracy ({rule})"] = right
        for part in PARTS:
            each[f"{part} ({rule})"] = [
                value if of == part else None for value, of in zip(right, parts)
            ]
    return Scores(each, {})


TASKS = (
    Task("docvqa", read_docvqa, score_docvqa, ("val", "test", "train"), tokens=32),
    Task("chartqa", read_chartqa, score_chartqa, ("test", "val", "train")),
)
