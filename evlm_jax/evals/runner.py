"""Predictions, written to disk as they come, so that what was cut off goes on; and the result that
keeps them.

The predictions stand in a .jsonl beside the result: first what they are of (task, weights,
prompts), then a row each. Chunks are the same in every run of the same questions, so a run that was
cut off and taken up gives the same bits as one that was not."""

import json
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Protocol

from tqdm import tqdm

from evlm_jax.evals.judge import Judge, judges
from evlm_jax.evals.task import Question, Task
from evlm_jax.journal import Journal, read_lines
from evlm_jax.parallel.distributed import barrier, is_first


class Answerer(Protocol):
    """Protocol of what answers questions, as in evals/answer.py."""

    method: str  # for people
    tokens: int  # most new ones
    chunk: int  # questions answered together

    def order(self, asked: Question) -> tuple:
        """Sorts questions so that similar ones are neighbours."""

    def __call__(self, questions: Sequence[Question]) -> list[dict]:
        """{"prediction", ...} of each."""


def evaluate(
    task: Task,
    questions: Sequence[Question],
    answer: Answerer,
    about: dict,
    progress: PathLike | None = None,
    judge: Judge | None = None,
) -> dict:
    """Answers the questions; answers in `progress` are reused.

    Args:
      about: what the predictions depend on, by name; it becomes part of the result.
      progress: .jsonl file (journal.py); None keeps nothing.
      judge: for tasks that have one; without it the rows stay without judgement.
    Returns:
      {"task", "method", "max_new_tokens", **about, "examples": rows}, without scores
        (evals/score.py).
    Raises:
      ValueError: `progress` is of something else, or of another judge.
    """
    head = {"task": task.name, "method": answer.method, "max_new_tokens": answer.tokens, **about}
    with Log(progress, head) as log:
        rows = _rows(questions, log.known)
        todo = [
            [i for i in chunk if "prediction" not in rows[i]] for chunk in chunks(questions, answer)
        ]
        for chunk in _bar(todo, len(rows), task.name):
            log.write([rows[i] for i in chunk], answer([questions[i] for i in chunk]))
        if task.judge and judge:
            for (i,) in _bar([[i] for i in unjudged(task, rows, judge)], len(rows), "judge"):
                log.write([rows[i]], [judge(task.judge(rows[i]))])
    return head | {"examples": rows}


def unjudged(task: Task, rows: Sequence[dict], judge: Judge) -> list[int]:
    """Places of the rows that still need the judge.

    Raises ValueError where another one has judged some.
    """
    if (former := judges(rows)) and former != [judge.name]:
        raise ValueError(
            f"answers were judged by {former[0]} before, not by {judge.name}: ask that one, or"
            " answer into a new --out"
        )
    return [
        i for i, row in enumerate(rows) if "judgement" not in row and task.judge and task.judge(row)
    ]


def chunks(questions: Sequence[Question], answer: Answerer) -> list[list[int]]:
    """Places of the questions that are answered together: neighbours in the answerer's order."""
    order = sorted(range(len(questions)), key=lambda i: answer.order(questions[i]))
    return [order[i : i + answer.chunk] for i in range(0, len(order), answer.chunk)]


def _entries(path: PathLike) -> list[dict]:
    """The lines of predictions that are there. Raises ValueError where they are something else."""
    try:
        found = [json.loads(line) for line in read_lines(path)]
    except (RecursionError, ValueError) as error:
        text = f"{path}: no predictions: {error}; remove it, or give another --out"
        raise ValueError(text) from error
    for number, line in enumerate(found, 1):
        texts = {"id": None, "prompt": None, "prediction": ""} if number > 1 else {}
        if not isinstance(line, dict) or not all(
            isinstance(line.get(name, default), str) for name, default in texts.items()
        ):
            raise ValueError(
                f"{path}: line {number} is no prediction; remove the file, or give another --out"
            )
    return found


class Log:
    """Known entries of rows by id, and a journal where new ones go.

    A line that a kill cut is dropped; one process writes.
    """

    def __init__(self, path: PathLike | None, head: dict):
        self.known: dict[str, dict] = {}
        self._journal = None
        if path is None:
            return
        first, *lines = _entries(path) or [None]
        barrier("predictions are read")
        if is_first():
            self._journal = Journal(path)
        if first is None:
            self._append([head])
        elif other := [
            name
            for name in {**first, **head}
            if first.get(name) != json.loads(json.dumps(head)).get(name)
        ]:
            raise ValueError(
                f"{path} holds predictions of something else: {', '.join(other)} differ; give"
                " another --out, or remove it"
            )
        for line in lines:
            self.known.setdefault(line.pop("id"), {}).update(line)

    def write(self, rows: Sequence[dict], entries: Sequence[dict]) -> None:
        """New entries of rows: into the rows, and into the file at one go."""
        for row, entry in zip(rows, entries, strict=True):
            row.update(entry)
        self._append(
            [
                {"id": row["id"], "prompt": row["prompt"]} | entry
                for row, entry in zip(rows, entries)
            ]
        )

    def _append(self, lines: Sequence[dict]) -> None:
        if self._journal:
            self._journal.append([json.dumps(line, ensure_ascii=False) for line in lines])

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self._journal:
            self._journal.flush()


def _rows(questions: Sequence[Question], known: dict[str, dict]) -> list[dict]:
    rows = []
    for asked in questions:
        row = {
            "id": asked.id,
            "cluster": asked.cluster,
            "prompt": asked.text,
            "answer": asked.answer,
        } | asked.facts
        saved = known.get(asked.id, {"prompt": asked.text})
        if saved["prompt"] != asked.text:
            raise ValueError(
                f"question {asked.id} was answered with another prompt, {saved['prompt']!r}; give"
                " another --out"
            )
        rows.append(row | saved)
    return rows


def _bar(chunks: Sequence[list[int]], total: int, name: str) -> Iterator[list[int]]:
    """The chunks that hold something, with a progress bar over questions."""
    missing = sum(map(len, chunks))
    hidden = not missing or not is_first()
    with tqdm(
        total=total,
        initial=total - missing,
        desc=name,
        unit="question",
        dynamic_ncols=True,
        disable=hidden,
    ) as bar:
        for chunk in filter(None, chunks):
            yield chunk
            bar.update(len(chunk))
