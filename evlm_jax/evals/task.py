"""What a benchmark is: questions read from its official files, and scores of predictions.
`evals/tasks` has one file a family.

A saved prediction is a row, a plain dict that scores alone need: {"id", "cluster", "prompt",
"answer", "prediction", and what else the family's scorer looks at}. So scores can be computed again
without the model and without the data."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from evlm_jax.data.samples import MARKER, ImageRef
from evlm_jax.paths import local

STYLES = ("lmms-eval", "llava", "qwen-vl")  # whose prompts are used
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
ANSWER = " Answer:"  # how prompts of Qwen-VL's base model end


@dataclass(frozen=True)
class Question:
    """One prompt. Images precede it, or replace its `<image>` markers."""

    id: str  # unique in the task
    text: str
    visuals: tuple[tuple[ImageRef, ...], ...]
    answer: object  # what is right, as JSON holds it; None where only a server knows
    cluster: str  # the image or video: answers about the same one are not independent
    facts: dict = field(default_factory=dict)  # further entries of the row, for the scorer
    candidates: tuple[str, ...] = ()  # its own closed set of answers, where the task's are not it


class Scores(NamedTuple):
    """Scores in the unit that papers print (percent, for accuracies)."""

    each: dict[
        str, list[float | None]
    ]  # of every row; the score is their mean, None is not counted
    whole: dict[str, float]  # of all rows together, where it is no mean


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
      read: (path of the data, split, style) -> questions. Raises ValueError naming file and row for
        what does not fit.
      score: rows -> Scores.
      splits: known names, the usual one first.
      data: whether it needs a path.
      tokens: most new tokens of an answer.
      candidates: closed set of answers, chosen from by lowest loss instead of by generation:
        questions -> texts.
      judge: row -> prompt for a judge, whose reply the scorer finds in row["judgement"]; "" where
        none is needed.
    """

    name: str
    read: Callable[[Path, str, str], list[Question]]
    score: Callable[[Sequence[dict]], Scores]
    splits: tuple[str, ...]
    data: bool = True
    tokens: int = 16
    candidates: Callable[[Sequence[Question]], list[str]] | None = None
    judge: Callable[[dict], str] | None = None

    def questions(
        self, data: Path | str | None, split: str | None, style: str = STYLES[0]
    ) -> list[Question]:
        """All questions of a split, the usual one where it is None.

        Raises ValueError for an unknown split or style, for two questions of the same id, and for
        files that do not fit."""
        if self.data and data is None:
            raise ValueError(f"{self.name}: give --data, the path of its official files")
        split = split or self.splits[0]
        for name, value, known in (("split", split, self.splits), ("prompt", style, STYLES)):
            if value not in known:
                raise ValueError(
                    f"{self.name}: unknown {name} {value!r}; use one of {', '.join(known)}"
                )
        where = local(data or ".", "--data of a benchmark")
        try:
            questions = self.read(where, split, style)
        except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{self.name}: {where}: a field is not as in the official files:"
                f" {type(error).__name__}: {error}"
            ) from error
        if twice := [
            name
            for name, times in Counter(question.id for question in questions).items()
            if times > 1
        ]:
            raise ValueError(f"{self.name}: {data}: question {twice[0]} stands there twice")
        if style == "llava" and self.data:  # there, images are a line of their own
            return [
                replace(question, text=f"{MARKER * len(question.visuals)}\n{question.text}")
                for question in questions
            ]
        return questions


def first(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions, and all others of their clusters: pairs and rotations stay
    whole. None: all.
    """
    clusters = {question.cluster for question in questions[:limit]}
    return [question for question in questions if question.cluster in clusters]


def draw(questions: Sequence[Question], count: int | None, seed: int = 0) -> list[Question]:
    """`count` (or all) of the questions, drawn by a seed without repeats, in their order."""
    chosen = random.Random(seed).sample(range(len(questions)), len(questions))[:count]
    return [questions[i] for i in sorted(chosen)]


def column(rows: Sequence[dict], name: str) -> list:
    """One entry of all rows."""
    return [row[name] for row in rows]


def percent(values: Sequence[float | None]) -> list[float | None]:
    """Shares as percent."""
    return [None if value is None else 100.0 * value for value in values]


def short(question: str, style: str, suffix: str = SHORT) -> str:
    """A question whose answer is to be short."""
    return question + (ANSWER if style == "qwen-vl" else suffix)


def lettered(options: dict[str, str]) -> str:
    """A line "A. text" for each option."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())
