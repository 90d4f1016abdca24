"""A checkpoint of ours under lmms-eval: the same prompts, batches and generation as `evlm eval`."""

from collections.abc import Sequence

from evlm_jax.data.samples import Sample, question
from evlm_jax.evals.answer import Generated, prompt_text
from evlm_jax.evals.choice import answer_losses
from evlm_jax.evals.lmms.requests import Requests
from evlm_jax.evals.task import Question
from evlm_jax.generate import ROWS, Generator
from evlm_jax.runs import features_of, load_trained


class EvlmJax(Requests):
    """The newest checkpoint of a run. `--model evlm_jax --model_args checkpoint=DIR,frames=16`."""

    def __init__(
        self,
        checkpoint: str,
        frames: int = 16,
        batch_size: int | str = ROWS,
        device: str | None = None,
        max_batch_size=None,
    ):
        """`device` and `max_batch_size` are lmms-eval's; JAX takes the devices that it finds."""
        super().__init__(frames, batch_size)
        self.trained = load_trained(checkpoint)
        self.features = features_of(self.trained)
        look = self.features.get if self.features else None
        self.generator = Generator(
            self.trained.model, self.trained.tokenizer, features=look, rows=self.chunk
        )

    def answer(
        self, questions: Sequence[Question], tokens: int, temperature: float, top_p: float
    ) -> list[str]:
        """See `Requests.answer`."""
        rows = Generated(self.generator, tokens, temperature=temperature, top_p=top_p)(questions)
        return [row["prediction"] for row in rows]

    def losses(self, asked: Sequence[tuple[Question, str]]) -> list[tuple[float, bool]]:
        """See `Requests.losses`."""
        model, tokenizer, template = (
            self.trained.model,
            self.trained.tokenizer,
            self.generator.cfg.data.template,
        )
        dialogs = [(q, (question(prompt_text(q, template), answer),)) for q, answer in asked]
        samples = [Sample(q.id, "lmms-eval", q.visuals, dialog) for q, dialog in dialogs]
        found = answer_losses(model, tokenizer, samples, self.features, self.chunk, end=False)
        return [(float(loss[0]), bool(greedy[0])) for loss, greedy in found]
