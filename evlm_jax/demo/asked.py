"""What the demo asks its model, and what came of it."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import NamedTuple, TypeVar

from evlm_jax.asset_packages import AssetError
from evlm_jax.config import EVLMConfig
from evlm_jax.data.samples import Sample
from evlm_jax.data.sources import open_source
from evlm_jax.evals import score, tasks
from evlm_jax.evals.runner import Answerer, evaluate
from evlm_jax.evals.statistics import accuracy_table
from evlm_jax.evals.task import Question, draw, first
from evlm_jax.evals.tasks.demo import EASY_VQA, from_samples
from evlm_jax.evals.text_metrics import words
from evlm_jax.report import page as report

Made = TypeVar("Made")


class Asked(NamedTuple):
    """Questions of a benchmark."""

    task: str
    split: str | None = None


HELD_OUT, KNOWN, STYLE = "held out", "known", "style"  # drawings of scenes
RESULTS = {
    HELD_OUT: Asked("scenes", "test"),
    KNOWN: Asked("scenes", "known"),
    STYLE: Asked("scenes", "style"),
    "words": Asked("scenes-words", "test"),
    "chinese": Asked("scenes-zh", "test"),
    "vqa": Asked("easy-vqa-choice"),
    "greedy": Asked("easy-vqa"),
    "emoji": Asked("emoji"),
    "emoji style": Asked("emoji-style"),
    "photographs": Asked("photographs"),
    "photos": Asked("photos"),
}
SCENES = (HELD_OUT, KNOWN, STYLE)
WHICH = "where/which"  # one of two objects that are named: half is right by chance
# How many questions each form asks, of what it does not ask as a whole; of pictures all questions.
SIZES = {
    "": {
        **dict.fromkeys((HELD_OUT, KNOWN), 400),
        **dict.fromkeys((STYLE, "chinese", "greedy", "emoji"), 100),
        **dict.fromkeys(("words", "emoji style"), 60),
        "vqa": 1000,
    },
    "fast": {
        **dict.fromkeys((*SCENES, "chinese", "words", "greedy"), 6),
        **dict.fromkeys(("emoji", "emoji style", "photographs"), 6),
        "vqa": 100,
    },
    "full": {"greedy": 1000},
}
SIZES["moe"] = SIZES[""]
TAUGHT = 3  # samples in the report of each source that was trained on


def there(name: str, make: Callable[[], Made]) -> Made | None:
    """What `make` returns; where an asset is missing, which only those of the group `scenes` may
    be, None: it is told.
    """
    try:
        return make()
    except AssetError as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return None


def questions(sizes: dict[str, int]) -> dict[str, list[Question]]:
    """What is asked, by the name of its result, of which the assets are there."""
    asked = {}
    for name, (task, split) in RESULTS.items():
        found = there(name, partial(tasks.find(task).questions, None, split))
        if found is not None:
            asked[name] = first(found, sizes.get(name))
    return asked | {"greedy": draw(asked["vqa"], sizes.get("greedy"))}


def answered(name: str, asked: Sequence[Question], answer: Answerer) -> dict:
    """One result with scores, and with what the report shows of it: "shown" and, of easy-vqa,
    "accuracy".
    """
    task = RESULTS[name].task
    result = score.scored(evaluate(tasks.find(task), asked, answer, {}))
    shown = []
    for row in result["examples"]:
        right = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        line = {
            "image": row["cluster"],
            "question": row["prompt"],
            "answer": right,
            "prediction": row["prediction"],
        }
        shown.append(line | {"correct": words(row["prediction"]) == words(right)})
    return (
        result
        | {"shown": shown}
        | ({"accuracy": accuracy_table(shown, EASY_VQA)} if "vqa" in task else {})
    )


def _has_many(pair: tuple[Sample, Question]) -> bool:
    """Whether a question is about several pictures."""
    return len(pair[0].refs) > 1


def unseen(asked: Sequence[Question]) -> list[Question]:
    """The same questions without their pictures: what can be guessed."""
    return [replace(question, visuals=()) for question in asked]


def family_rows(found: dict[str, dict], guessed: dict) -> list[dict]:
    """Accuracy of the questions about scenes, as shares: a row for each kind of question, and the
    mean of the five families as "mean".

    Args:
      found: results of SCENES, answered freely.
      guessed: the result of HELD_OUT's questions without pictures.
    """
    answers = open_source("scenes-en-test").scenes.speaker.answers
    rows = found[HELD_OUT]["examples"]
    table = []
    for label in dict.fromkeys(sorted(row["label"] for row in rows)):
        right = [row["answer"] for row in rows if row["label"] == label]
        (_, most), *_ = Counter(right).most_common(1)
        table.append(
            {
                "kind": label,
                "count": len(right),
                "chance": 0.5 if label == WHICH else 1 / len(answers(label)),
                "majority": most / len(right),
                "guessed": _share(guessed, label),
                **{name: _share(found.get(name, {}), label) for name in SCENES},
            }
        )
    names = ("chance", "majority", "guessed", *SCENES)
    return [*table, {"kind": "mean", "count": len(rows)} | {n: _mean(table, n) for n in names}]


def _share(result: dict, label: str) -> float | None:
    """Accuracy of a kind of question; None where it was not asked."""
    value = {row["metric"]: row["value"] / 100 for row in result.get("scores", ())}
    return value.get(f"accuracy, {label}")


def _mean(table: Sequence[dict], name: str) -> float | None:
    """Over the five families, each the mean of its kinds of question by how often they stand; None
    where none was asked.
    """
    families: dict[str, list[tuple[float, int]]] = {}
    for row in table:
        if row[name] is not None:
            families.setdefault(row["kind"].partition("/")[0], []).append((row[name], row["count"]))
    if not families:
        return None
    return fmean(
        sum(value * count for value, count in kinds) / sum(count for _, count in kinds)
        for kinds in families.values()
    )


def taught(cfg: EVLMConfig, answer: Answerer) -> list[dict]:
    """The report's section of training data: answers to the first question of some samples of each
    source; documents have none.
    """
    pairs = []
    for source in map(open_source, cfg.data.sources):
        samples = [source[i] for i in range(min(TAUGHT, len(source)))]
        pairs += [(sample, asked[0]) for sample in samples if (asked := from_samples([sample]))]
    pairs.sort(key=_has_many)
    answers = [  # apart: all of a batch have room for as many pictures as the largest prompt
        said
        for _, alike in groupby(pairs, _has_many)
        for said in answer([asked for _, asked in alike])
    ]
    examples = []
    for (sample, asked), said in zip(pairs, answers, strict=True):
        line = {"source": sample.source, "question": asked.text, "answer": asked.answer, **said}
        examples.append(line | {"correct": words(said["prediction"]) == words(asked.answer)})
    return report.sources_section(examples, [sample.refs[0] for sample, _ in pairs])
