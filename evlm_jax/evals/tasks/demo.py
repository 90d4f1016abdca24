"""The demo's data as benchmarks: easy-vqa's official test questions and the names of unseen emoji.
No --data; `evlm fetch` brings them.

easy-vqa          answered freely
easy-vqa-choice   answered by the one of the 13 answers with the lowest loss
emoji, photos     captions
emoji-style       known emoji in a hand that no other source has; `evlm fetch scenes`
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from evlm_jax.data.samples import MARKER, Sample
from evlm_jax.data.sources import open_source
from evlm_jax.evals.task import Question, Scores, Task, column, percent
from evlm_jax.evals.tasks.captions import score_words
from evlm_jax.evals.text_metrics import exact_match, words

EASY_VQA = {  # answer type -> answers
    "yes / no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
ANSWERS = tuple(answer for answers in EASY_VQA.values() for answer in answers)


def from_samples(
    samples: Iterable[Sample],
    captions: bool = False,
    answers: Callable[[str], Sequence[str] | None] = {}.get,
) -> list[Question]:
    """A question for each dialog of the samples that asks one, as captions do not, in the words of
    the source. Its label, where the source has labels, is a fact of it.

    Args:
      captions: the answers are captions, lists of one.
      answers: label -> all answers that there are, where one is to be chosen.
    """
    questions = []
    for sample in samples:
        for i, dialog in enumerate(sample.dialogs):
            if len(dialog) != 2:
                continue
            asked, answer = dialog
            text, right = (
                asked.text.removeprefix(MARKER),
                ([answer.text] if captions else answer.text),
            )
            label = sample.labels[i] if sample.labels else ""
            questions.append(
                Question(
                    f"{sample.key}-{i}",
                    text,
                    sample.visuals,
                    right,
                    sample.key,
                    {"label": label} if label else {},
                    tuple(answers(label) or ()),
                )
            )
    return questions


def read(data: Path, split: str, style: str, source: str, **how) -> list[Question]:
    """The questions of a source; `how` as in `from_samples`."""
    return from_samples(open_source(source), **how)


def score_vqa(rows: Sequence[dict]) -> Scores:
    """Accuracy of all and by type of the answer; words count, case and punctuation do not."""
    said = [words(text) for text in column(rows, "prediction")]
    right = percent(exact_match(said, [[words(answer)] for answer in column(rows, "answer")]))
    kind = {answer: kind for kind, answers in EASY_VQA.items() for answer in answers}
    of = [kind[row["answer"]] for row in rows]
    by_type = {
        f"accuracy, {name}": [value if k == name else None for value, k in zip(right, of)]
        for name in EASY_VQA
        if name in of
    }
    return Scores({"accuracy": right} | by_type, {})


choose = partial(
    Task, read=partial(read, source="easy-vqa-test"), score=score_vqa, splits=("test",), data=False
)
caption = partial(Task, score=score_words, splits=("test",), data=False)
TASKS = (
    choose("easy-vqa"),
    choose("easy-vqa-choice", candidates=lambda _: list(ANSWERS)),
    caption("emoji", read=partial(read, source="emoji-en-test", captions=True)),
    caption("emoji-style", read=partial(read, source="emoji-style-en", captions=True)),
    caption("photos", read=partial(read, source="photos-test", captions=True)),
)
