"""How a model answers questions: free generation, or the candidate of lowest loss."""

from collections.abc import Sequence

import numpy as np

from evlm_jax.data.features import FeatureStore
from evlm_jax.data.samples import MARKER, Sample, Turn, question
from evlm_jax.data.tokenizer import Tokenizer
from evlm_jax.evals.choice import own_candidate_losses
from evlm_jax.evals.runner import Answerer
from evlm_jax.evals.task import ANSWER, Question, Task
from evlm_jax.generate import Generator
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.mesh import Layout

BEST = 5  # candidates that a row keeps
# characters: prompts whose lengths differ by less are answered together, those about one image side
# by side
SIMILAR = 64


class Generated:
    """Answers by generation. An answer is a row's {"prediction": the text, stripped}."""

    method = "greedy"

    def __init__(self, generator: Generator, tokens: int, **sampling: float):
        """`tokens`: most new ones of an answer; `generator.rows` questions are answered together.
        Greedy without `sampling`.
        """
        self.generator, self.tokens, self.chunk, self.sampling = (
            generator,
            tokens,
            generator.rows,
            sampling,
        )

    def order(self, asked: Question) -> tuple:
        """Questions are answered in the order of this."""
        return similar(asked)

    def __call__(self, questions: Sequence[Question]) -> list[dict]:
        """The answers, in the order of the questions."""
        template = self.generator.cfg.data.template
        prompts = [
            self.generator.prompt([Turn("user", prompt_text(q, template))], q.visuals)
            for q in questions
        ]
        answers = self.generator.generate(prompts, max_new_tokens=self.tokens, **self.sampling)
        return [{"prediction": answer.text.strip()} for answer in answers]


class LowestLoss:
    """Chooses. An answer is {"prediction": a candidate, "ranking": the best candidates, "losses":
    theirs in nats}, and of a question with candidates of its own "loss", that of the right one.
    """

    method, tokens, chunk = "lowest loss", 0, 512

    def __init__(
        self,
        model: EVLM,
        tokenizer: Tokenizer,
        candidates: Sequence[str],
        features: FeatureStore | None = None,
        rows: int = 2,
        layout: Layout | None = None,
    ):
        """`rows`: of a batch; `layout`: of the mesh that holds the model, None where one device
        does.
        """
        self.model, self.tokenizer, self.candidates = model, tokenizer, list(candidates)
        self.how = {"features": features, "rows": rows, "layout": layout}

    def order(self, asked: Question) -> tuple:
        """Questions about one image share it."""
        return (asked.cluster,)

    def __call__(self, questions: Sequence[Question]) -> list[dict]:
        """The answers, in the order of the questions."""
        about: dict[tuple, list[int]] = {}
        for i, asked in enumerate(questions):
            about.setdefault(asked.visuals, []).append(i)
        template, samples = self.model.cfg.data.template, []
        for visuals, places in about.items():
            dialogs = tuple(question(prompt_text(questions[i], template), "") for i in places)
            samples.append(Sample(questions[places[0]].cluster, self.method, visuals, dialogs))
        own = [
            [questions[i].candidates or tuple(self.candidates) for i in places]
            for places in about.values()
        ]
        losses = own_candidate_losses(self.model, self.tokenizer, samples, own, **self.how)
        rows: list[dict] = [{}] * len(questions)
        for places, of_image in zip(about.values(), losses, strict=True):
            for i, loss in zip(places, of_image, strict=True):
                rows[i] = self._row(questions[i], loss)
        return rows

    def _row(self, asked: Question, loss: np.ndarray) -> dict:
        candidates = asked.candidates or self.candidates
        best = np.argsort(loss, kind="stable")[:BEST]
        row = {
            "prediction": candidates[best[0]],
            "ranking": [candidates[k] for k in best],
            "losses": [round(float(loss[k]), 4) for k in best],
        }
        if asked.candidates:
            row["loss"] = round(float(loss[candidates.index(asked.answer)]), 4)
        return row


def answerer(
    task: Task,
    every: Sequence[Question],
    model: EVLM,
    tokenizer: Tokenizer,
    features: FeatureStore | None = None,
    rows: int = 8,
    layout: Layout | None = None,
) -> Answerer:
    """Returns LowestLoss where the task has candidates, else Generated.

    Args:
      every: all questions of the split, which candidates are made of.
      rows: of a batch.
      layout: of the mesh of the model; None: one device.
    """
    if task.candidates:
        return LowestLoss(model, tokenizer, task.candidates(every), features, rows, layout)
    look = features.get if features else None
    return Generated(
        Generator(model, tokenizer, features=look, rows=rows, layout=layout), task.tokens
    )


def similar(asked: Question) -> tuple[int, str]:
    """Sorts questions by length, roughly, and within that by image."""
    return len(asked.text) // SIMILAR, asked.cluster


def prompt_text(asked: Question, template: str) -> str:
    """The user's turn: the text, with the images in front of it or at its markers. " Answer:" is
    said by the plain template itself.
    """
    text = asked.text.removesuffix(ANSWER) if template == "plain" else asked.text
    return text if MARKER in text else MARKER * len(asked.visuals) + text
