"""ScienceQA-IMG and AI2D: the answer is the letter of an option.

scienceqa-img   problems.json, pid_splits.json, images/SPLIT/PID/image.png; the questions with an
                image
ai2d            questions/*.json, images/, abc_images/ (where labels are letters), ai2d_test_ids.csv
                for the split "test"
"""

from collections.abc import Sequence
from pathlib import Path

from evlm_jax.evals.scorers.choices import LETTERS, letter
from evlm_jax.evals.scorers.vqa import exact_match
from evlm_jax.evals.task import ANSWER, LETTER, Question, Scores, Task, column, lettered, percent
from evlm_jax.evals.tasks.official import json_rows, read_json, text_lines


def read_scienceqa(data: Path, split: str, style: str) -> list[Question]:
    """Qwen-VL's form names the parts of the question."""
    problems = {row.number: row for row in json_rows(data / "problems.json")}
    questions = []
    for number in read_json(data / "pid_splits.json", split):
        if number not in problems:
            raise ValueError(
                f"{data / 'pid_splits.json'}: row {number}: no such problem in problems.json"
            )
        row = problems[number]
        if not row["image"]:
            continue
        options = dict(zip(LETTERS, row["choices"]))
        if not 0 <= row["answer"] < len(options):
            raise row.error(f"answer {row['answer']} of {len(options)} choices")
        hint, image = row["hint"], row.image(data / "images" / split / number / row["image"])
        if style == "qwen-vl":
            text = (
                f"Context: {hint or 'N/A'}\nQuestion: {row['question']}\nOptions:"
                f" {lettered(options)}\nAnswer:"
            )
        else:
            text = (
                f"Context: {hint}\n" * bool(hint)
                + f"{row['question']}\n{lettered(options)}"
                + LETTER
            )
        questions.append(
            Question(
                number, text, image, list(options)[row["answer"]], number, {"options": options}
            )
        )
    return questions


def read_ai2d(data: Path, split: str, style: str) -> list[Question]:
    """Questions are keyed by their text; those with abcLabel are about the drawing whose labels are
    letters.
    """
    files, questions = sorted((data / "questions").glob("*.json")), []
    if not files:
        raise ValueError(f"ai2d: no files {data / 'questions' / '*.json'}")
    ids = data / "ai2d_test_ids.csv"
    if split == "test" and not ids.is_file():
        raise ValueError(
            f"ai2d: no file {ids}; it lists the images of the test split (--split all takes every"
            " image)"
        )
    chosen = set(" ".join(text_lines(ids)).split()) if split == "test" else None
    for file in files:
        name = read_json(file, "imageName")
        if chosen is not None and Path(name).stem not in chosen:
            continue
        for row in json_rows(file, "questions"):
            options = dict(zip(LETTERS, row["answerTexts"]))
            if not 0 <= row["correctAnswer"] < len(options):
                raise row.error(f"answer {row['correctAnswer']} of {len(options)} texts")
            text = f"{row.number}\n{lettered(options)}" + LETTER
            if style == "qwen-vl":
                text = str(row.number) + "\n".join(options.values()) + ANSWER
            image = row.image(data / ("abc_images" if row["abcLabel"] else "images") / name)
            questions.append(
                Question(
                    row["questionId"],
                    text,
                    image,
                    list(options)[row["correctAnswer"]],
                    name,
                    {"options": options},
                )
            )
    return questions


def right(rows: Sequence[dict], rule: str) -> list[float]:
    """1 where the letter that is meant, by a rule of scorers/choices.py, is the answer."""
    return [float(letter(row["prediction"], row["options"], rule) == row["answer"]) for row in rows]


def score_scienceqa(rows: Sequence[dict]) -> Scores:
    """Accuracy by both rules."""
    return Scores(
        {f"accuracy ({name})": percent(right(rows, rule)) for name, rule in RULES.items()}, {}
    )


def score_ai2d(rows: Sequence[dict]) -> Scores:
    """Accuracy by letter, and by the text of the option, as in Qwen-VL's prompt."""
    texts = exact_match(column(rows, "prediction"), [row["options"][row["answer"]] for row in rows])
    return Scores(
        {
            "accuracy (lmms-eval)": percent(right(rows, "ai2d")),
            "accuracy (qwen-vl)": percent(texts),
        },
        {},
    )


RULES = {"lmms-eval": "scienceqa", "llava": "scienceqa-llava"}
TASKS = (
    Task(
        "scienceqa-img",
        read_scienceqa,
        score_scienceqa,
        ("test", "val", "minitest", "minival", "train"),
    ),
    Task("ai2d", read_ai2d, score_ai2d, ("test", "all")),
)
