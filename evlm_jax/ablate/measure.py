"""What a model is measured by at a reading: the tasks of the study, an outcome for each question.

A question with a label, FAMILY or FAMILY/KIND, counts for its family, as "TASK, FAMILY/METRIC".
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from evlm_jax.ablate import finished
from evlm_jax.ablate.study import Study, Task, of_family
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.samples import Sample
from evlm_jax.data.samples import question as dialog
from evlm_jax.evals import tasks
from evlm_jax.evals.answer import answerer, prompt_text
from evlm_jax.evals.choice import answer_losses
from evlm_jax.evals.runner import evaluate
from evlm_jax.evals.task import Question, first
from evlm_jax.runs import Trained, features_of

LOSS_ROWS = 4  # of a batch


def measure(study: Study, limit: int | None, trained: Trained, folder: Path, weights: str) -> dict:
    """{"measured": {TASK/METRIC: packed outcomes}, "clusters": {TASK: questions of each image}}.

    Args:
      limit: questions of the first task; None: all.
      folder: of the run, where answers are kept as they come.
      weights: hash of the model's, which kept answers must be of.
    """
    features, measured, clusters = features_of(trained), {}, {}
    for number, task in enumerate(study.tasks):
        every = tasks.find(task.name).questions(None, None)
        least = [n for n in (task.questions, 0 if number else limit) if n]
        questions, each = first(every, min(least, default=None)), {}
        if task.how != "losses":
            progress = folder / "evals" / f"{task.name}-{trained.model.cfg.train.steps}.jsonl"
            each |= answers(task, trained, features, every, questions, progress, weights)
        if task.how != "answers":
            each |= losses(trained, features, questions, greedy=task.how == "losses")
        for family, places in _families(questions).items():
            name = of_family(task.name, family)
            for metric, values in each.items():
                measured[f"{name}/{metric}"] = finished.pack([values[i] for i in places])
            owners = itertools.groupby(questions[i].cluster for i in places)
            clusters[name] = [len(list(group)) for _, group in owners]
    return {"measured": measured, "clusters": clusters}


def _families(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Places of the questions of each family, by cluster as they came."""
    found: dict[str, list[int]] = {}
    for place, asked in enumerate(questions):
        found.setdefault(asked.facts.get("label", "").partition("/")[0], []).append(place)
    return found


def answers(
    task: Task,
    trained: Trained,
    features: FeatureStore | None,
    every: Sequence[Question],
    questions: Sequence[Question],
    progress: Path,
    weights: str,
) -> dict[str, list[float]]:
    """Each metric of the task that all questions have."""
    known = tasks.find(task.name)
    answer = answerer(known, every, trained.model, trained.tokenizer, features, task.rows)
    result = evaluate(known, questions, answer, {"weights_sha256": weights}, progress)
    each = known.score(result["examples"]).each
    return {metric: values for metric, values in each.items() if None not in values}


def losses(
    trained: Trained, features: FeatureStore | None, questions: Sequence[Question], greedy: bool
) -> dict[str, list[float]]:
    """ "loss": nats of each question's right answer, the token that ends it included; "greedy": 100
    where greedy generation would say just that.
    """
    template, about = trained.model.cfg.data.template, {}
    for place, asked in enumerate(questions):
        about.setdefault(asked.visuals, []).append(place)
    samples = [
        Sample(
            questions[places[0]].id,
            "losses",
            visuals,
            tuple(
                dialog(prompt_text(questions[i], template), _right(questions[i])) for i in places
            ),
        )
        for visuals, places in about.items()
    ]
    found: dict[str, list[float]] = {"loss": [0.0] * len(questions)}
    found |= {"greedy": [0.0] * len(questions)} if greedy else {}
    read = answer_losses(trained.model, trained.tokenizer, samples, features, LOSS_ROWS)
    for places, (loss, said) in zip(about.values(), read, strict=True):
        for place, nats, right in zip(places, loss, said, strict=True):
            found["loss"][place] = float(nats)
            if greedy:
                found["greedy"][place] = 100.0 * bool(right)
    return found


def _right(asked: Question) -> str:
    """The answer, or the first of several."""
    return asked.answer if isinstance(asked.answer, str) else asked.answer[0]
