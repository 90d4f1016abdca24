"""MMBench, English and Chinese: multiple choice where every rotation of the options must be answered rightly.

PATH is the official .tsv itself: index, question, hint, A to D, answer, category, image (base64), split.
"""

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evlm_jax import assets
from evlm_jax.evals.scorers.choices import LETTERS, ROTATION, circular
from evlm_jax.evals.task import ANSWER, LETTER, Question, Scores, Task, column, lettered, percent
from evlm_jax.evals.tasks.choices import right
from evlm_jax.evals.tasks.official import Row, tsv_rows

CN_LETTER = {"lmms-eval": "\n请直接使用所提供的选项字母作为答案回答。", "llava": "\n请直接回答选项字母。"}
SEVERAL = "There are several options:\n"


def read(data: Path, split: str, style: str, letter: dict[str, str]) -> list[Question]:
    """Every rotation is a question; they are scored together."""
    rows, questions = tsv_rows(data, ("index", "question", "hint", "A", "B", "answer", "category", "image", "split")), []
    cells = {row["index"]: row["image"] for row in rows}
    for row in rows:
        if row["split"] != split:
            continue
        options = {name: row[name] for name in LETTERS if row.get(name) not in (None, "", "nan")}
        if not row["index"].isdigit() or row["answer"] not in options:
            raise row.error(f"index {row['index']!r} with the answer {row['answer']!r}; need a number and one of {', '.join(options)}")
        hint = row["hint"] if row["hint"] != "nan" else ""
        if style == "lmms-eval":
            text = f"{hint} " * bool(hint) + f"{row['question']} {SEVERAL}{lettered(options)}\n" + letter[style]
        else:
            text = f"{hint}\n" * bool(hint) + f"{row['question']}\n{lettered(options)}" + letter.get(style, ANSWER)
        facts = {"options": options, "index": int(row["index"]), "category": row["category"]}
        image = row.image(_stored(row, cells.get(row["image"], row["image"])))  # a cell may name the row that has the image
        questions.append(Question(row["index"], text, image, row["answer"], str(facts["index"] % ROTATION), facts))
    if not questions:
        raise ValueError(f"{data}: no row of split {split!r}")
    return questions


def _stored(row: Row, cell: str) -> Path:
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


def score(rows: Sequence[dict]) -> Scores:
    """CircularEval as lmms-eval's static mode has it and without guesses; the first rounds alone, as LLaVA asks them."""
    each, indices = {}, column(rows, "index")
    for name, rule in (("lmms-eval", "mmbench-static"), ("strict", "mmbench")):
        each[f"circular ({name})"] = percent(circular(right(rows, rule), indices))
    first = [value if index < ROTATION else None for value, index in zip(right(rows, "mmbench"), indices)]
    return Scores(each | {"one round (strict)": percent(first)}, {})


EN = {"lmms-eval": LETTER, "llava": LETTER}
TASKS = tuple(
    Task(name, partial(read, letter=letter), score, ("dev",), tokens=256)
    for name, letter in (("mmbench-en", EN), ("mmbench-cn", CN_LETTER))
)
