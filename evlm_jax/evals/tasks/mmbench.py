"""MMBench, English and Chinese: multiple choice where every rotation of the options must be
answered rightly.

PATH is the official .tsv itself: index, question, hint, A to D, answer, category, image (base64),
split."""

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evlm_jax import assets
from evlm_jax.data.samples import ImageRef
from evlm_jax.evals.scorers.choices import LETTERS, ROTATION, circular, letter
from evlm_jax.evals.task import ANSWER, LETTER, Question, Scores, Task, column, lettered, percent
from evlm_jax.evals.tasks.choices import right
from evlm_jax.evals.tasks.official import Entry, tsv_rows

CN_LETTER = {
    "lmms-eval": "\n请直接使用所提供的选项字母作为答案回答。",
    "llava": "\n请直接回答选项字母。",
}
SEVERAL = "There are several options:\n"
JUDGE = """These are the options of a question:
{options}

Somebody answered: {said}

Which option is meant? Reply with its letter alone, or with Z if it is none of them."""


def read(data: Path, split: str, style: str, suffix: dict[str, str]) -> list[Question]:
    """Every rotation is a question; they are scored together."""
    rows, questions = (
        tsv_rows(
            data, ("index", "question", "hint", "A", "B", "answer", "category", "image", "split")
        ),
        [],
    )
    cells = {row["index"]: row["image"] for row in rows}

    def seen(cell):
        return cells.get(cell, cell)  # a cell may name the row that has the image

    for row in rows:
        if row["split"] != split:
            continue
        options = {name: row[name] for name in LETTERS if row.get(name) not in (None, "", "nan")}
        if not row["index"].isdigit() or row["answer"] not in options:
            raise row.error(
                f"index {row['index']!r} with the answer {row['answer']!r}; need a number and one"
                f" of {', '.join(options)}"
            )
        hint = row["hint"] if row["hint"] != "nan" else ""
        if style == "lmms-eval":
            text = (
                f"{hint} " * bool(hint)
                + f"{row['question']} {SEVERAL}{lettered(options)}\n"
                + suffix[style]
            )
        else:
            text = (
                f"{hint}\n" * bool(hint)
                + f"{row['question']}\n{lettered(options)}"
                + suffix.get(style, ANSWER)
            )
        index, image = int(row["index"]), ((ImageRef(str(_stored(row, seen(row["image"])))),),)
        about = hashlib.sha256(
            seen(cells.get(str(index % ROTATION), row["image"])).encode()
        ).hexdigest()[:16]  # the first round's image
        facts = {"options": options, "index": index, "category": row["category"]}
        questions.append(Question(row["index"], text, image, row["answer"], about, facts))
    if not questions:
        raise ValueError(f"{data}: no row of split {split!r}")
    return questions


def _stored(row: Entry, cell: str) -> Path:
    """The image in a cell as a file of the cache, named by its content."""
    try:
        content = base64.b64decode(cell, validate=True)
    except ValueError as error:
        raise row.error(f"column image is not base64: {error}") from error
    file = assets.cache_root() / "mmbench" / f"{hashlib.sha256(content).hexdigest()[:24]}.jpg"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        os.replace(part, file)
    return file


def judge(row: dict) -> str:
    """Prompt for a judge: which option is meant by an answer that the rules cannot read."""
    options = lettered(row["options"])
    return (
        ""
        if letter(row["prediction"], row["options"], "mmbench")
        else JUDGE.format(options=options, said=row["prediction"])
    )


def score(rows: Sequence[dict]) -> Scores:
    """CircularEval as in lmms-eval's static mode, without guesses, and with a judge; the first
    rounds alone, as in LLaVA.
    """
    each, indices = {}, column(rows, "index")
    for name, rule in (("lmms-eval", "mmbench-static"), ("strict", "mmbench")):
        each[f"circular ({name})"] = percent(circular(right(rows, rule), indices))
    waiting = sum(bool(judge(row)) and "judgement" not in row for row in rows)
    if not waiting:

        def read(row):
            return letter(row["prediction"], row["options"], "mmbench") or letter(
                row["judgement"], row["options"], "mmbench"
            )

        each["circular (judge)"] = percent(
            circular([read(row) == row["answer"] for row in rows], indices)
        )
    first = [
        value if index < ROTATION else None for value, index in zip(right(rows, "mmbench"), indices)
    ]
    return Scores(each | {"one round (strict)": percent(first)}, {"not judged": float(waiting)})


EN = {"lmms-eval": LETTER, "llava": LETTER}
TASKS = tuple(
    Task(name, partial(read, suffix=suffix), score, ("dev",), tokens=256, judge=judge)
    for name, suffix in (("mmbench-en", EN), ("mmbench-cn", CN_LETTER))
)
