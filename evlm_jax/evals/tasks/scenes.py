"""Questions about scenes that no training has seen, by family. No --data; `evlm fetch scenes`
brings what they are made of.

scenes, scenes-zh                  answered freely
scenes-choice, scenes-zh-choice    answered by the possible answer of lowest loss
scenes-words                       twenty words that training does not write, freely
photographs                        what scenes have names for, on photographs, freely
needle                             the disc and the texts of one frame of a clip, freely; a split is
                                   a number of frames, or `blind`: the questions alone

Splits: `test` shows drawings that were held out, `known` those of training, `style` those of
another hand; in all three on grounds and in fonts of their own."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from evlm_jax.data.sources import open_source
from evlm_jax.evals.task import Question, Scores, Task, column, percent
from evlm_jax.evals.tasks.demo import from_samples
from evlm_jax.evals.text_metrics import exact_match, words

SPLITS = ("test", "known", "style", "validation")
NEEDLE = "scenes:assets?split=test&scenes=400&ask=colour,text&frames={}"
BLIND, FRAMES = "blind", ("16", "2", "4", "64", "256", "1024")
UNSEEN_WORDS = "scenes:assets?split={}&words=unseen&ask=text&scenes=1000"


def read(data: Path, split: str, style: str, source: str, choose: bool = False) -> list[Question]:
    """The questions of a source of scenes with their labels.

    Args:
      source: with {} where the split is named.
      choose: with all possible answers of each.
    """
    scenes = open_source(source.format(split))
    answers = scenes.scenes.speaker.answers if choose else {}.get
    return from_samples(scenes, answers=answers)


def read_needle(data: Path, split: str, style: str) -> list[Question]:
    """Questions about one frame of clips, labelled by the part of the clip where it stands."""
    blind = split == BLIND
    questions = from_samples(open_source(NEEDLE.format(FRAMES[0] if blind else split)))
    return [replace(asked, visuals=()) for asked in questions] if blind else questions


def score(rows: Sequence[dict]) -> Scores:
    """Accuracy of all, by family and by label, in percent, and the mean of the families; in nats
    the loss of the right answer, where it was chosen by losses. Words count, case does not.
    """
    said = [words(text) for text in column(rows, "prediction")]
    right = percent(exact_match(said, [[words(answer)] for answer in column(rows, "answer")]))
    labels = column(rows, "label")
    each, losses = {"accuracy": right}, [row.get("loss") for row in rows]
    known = any(loss is not None for loss in losses)
    for name, here in _groups(labels).items():
        each[f"accuracy, {name}"] = [v if h else None for v, h in zip(right, here)]
        if known:
            each[f"loss, {name}"] = [v if h else None for v, h in zip(losses, here)]
    families = dict.fromkeys(label.partition("/")[0] for label in labels)

    def mean(measure: str) -> float:
        return fmean(
            fmean(v for v in each[f"{measure}, {family}"] if v is not None) for family in families
        )

    whole = {"accuracy, mean of families": mean("accuracy")}
    return Scores(each, whole | ({"loss, mean of families": mean("loss")} if known else {}))


def _groups(labels: Sequence[str]) -> dict[str, list[bool]]:
    """Which rows belong to each family, and to each label of a family that has several."""
    found = {}
    for label in sorted(set(labels)):
        family = label.partition("/")[0]
        found[family] = [one.partition("/")[0] == family for one in labels]
        if label != family:
            found[label] = [one == label for one in labels]
    return found


def of_questions(questions: Sequence[Question]) -> list[str]:
    """No candidates for all: every question brings its own."""
    return []


scenes = partial(Task, score=score, splits=SPLITS, data=False)
choice = partial(scenes, candidates=of_questions)
TASKS = (
    scenes("scenes", read=partial(read, source="scenes-en-{}")),
    scenes("scenes-zh", read=partial(read, source="scenes-zh-{}")),
    choice("scenes-choice", read=partial(read, source="scenes-en-{}", choose=True)),
    choice("scenes-zh-choice", read=partial(read, source="scenes-zh-{}", choose=True)),
    scenes(
        "photographs", read=lambda *_: from_samples(open_source("photographs-en")), splits=("test",)
    ),
    scenes("scenes-words", read=partial(read, source=UNSEEN_WORDS)),
    scenes("needle", read=read_needle, splits=(*FRAMES, BLIND)),
)
