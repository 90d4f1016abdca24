"""MME and POPE: questions with the answer yes or no.

mme    a folder a category, with images/ and questions_answers_YN/, or with images and .txt files
       side by side; a line of those is question TAB answer
pope   coco_pope_{random,popular,adversarial}.json, one object a line, and val2014/
"""

from collections.abc import Sequence
from pathlib import Path

from evlm_jax.evals.scorers import yes_no
from evlm_jax.evals.task import ANSWER, SHORT, Question, Scores, Task, column, percent, short
from evlm_jax.evals.tasks.official import SUFFIXES, Entry, json_lines, text_lines

ASKED = " Please answer yes or no."  # how MME's questions end; the prompts replace it


def read_mme(data: Path, split: str, style: str) -> list[Question]:
    """The categories that are there."""
    questions = []
    for category in (*yes_no.PERCEPTION, *yes_no.COGNITION):
        nested = data / category / "questions_answers_YN"
        images = data / category / "images" if nested.is_dir() else data / category
        for file in sorted((nested if nested.is_dir() else images).glob("*.txt")):
            for number, line in enumerate(text_lines(file), 1):
                row = Entry(file, number, dict(zip(("question", "answer"), line.split("\t"))))
                answer = row["answer"].strip().lower()
                if answer not in ("yes", "no"):
                    raise row.error(f"the answer is {row['answer']!r}, it must be Yes or No")
                text = row["question"].strip().replace(ASKED, "") + (
                    ANSWER if style == "qwen-vl" else SHORT
                )
                image, name = (
                    row.image(*(images / (file.stem + suffix) for suffix in SUFFIXES)),
                    f"{category}/{file.stem}",
                )
                questions.append(
                    Question(f"{name}-{number}", text, image, answer, name, {"category": category})
                )
    if not questions:
        raise ValueError(
            f"mme: {data} has none of the folders"
            f" {', '.join((*yes_no.PERCEPTION, *yes_no.COGNITION))}"
        )
    return questions


def read_pope(data: Path, split: str, style: str) -> list[Question]:
    """Questions of one of POPE's three ways to draw objects, or of all of them."""
    questions = []
    for part in ("random", "popular", "adversarial") if split == "all" else (split,):
        for row in json_lines(data / f"coco_pope_{part}.json"):
            if row["label"] not in ("yes", "no"):
                raise row.error(f"the label is {row['label']!r}, it must be yes or no")
            image = row.image(data / "val2014" / row["image"], data / "images" / row["image"])
            text = short(row["text"].strip(), style)
            questions.append(
                Question(
                    f"{part}-{row['question_id']}",
                    text,
                    image,
                    row["label"],
                    row["image"],
                    {"part": part},
                )
            )
    return questions


def score_mme(rows: Sequence[dict]) -> Scores:
    """The two sums and the categories; the accuracy over all questions has an error."""
    predictions, answers = column(rows, "prediction"), column(rows, "answer")
    right = [float(yes_no.mme_answer(text) == answer) for text, answer in zip(predictions, answers)]
    return Scores(
        {"accuracy": percent(right)},
        yes_no.mme(predictions, answers, column(rows, "category"), column(rows, "cluster")),
    )


def score_pope(rows: Sequence[dict]) -> Scores:
    """Five figures by both rules, of all rows and of each part."""
    each, whole, parts = {}, {}, dict.fromkeys(column(rows, "part"))
    for rule in ("lmms-eval", "llava"):
        right = [
            100.0 * (yes_no.pope_answer(row["prediction"], rule) == row["answer"]) for row in rows
        ]
        each[f"accuracy ({rule})"] = right
        for part in ("all", *parts) if len(parts) > 1 else parts:
            chosen = [row for row in rows if part in ("all", row["part"])]
            figures = yes_no.pope(column(chosen, "prediction"), column(chosen, "answer"), rule)
            whole |= {f"{part} {name} ({rule})": 100 * value for name, value in figures.items()}
    return Scores(each, whole)


TASKS = (
    Task("mme", read_mme, score_mme, ("test",)),
    Task("pope", read_pope, score_pope, ("all", "random", "popular", "adversarial")),
)
