"""Answers of quantised runs beside those of the run that `evlm convert quantize` made them of:

python -m benchmarks.quantised runs/demo runs/demo_int8 runs/demo_nf4

Right answers to a benchmark's questions are read token by token, in float32. KL is that of each
next token from the first run's, in nats: the mean over tokens, and the mean of the worst question.
An answer is right where greedy generation would give it, token by token, with its end; differences
are paired by question, their standard errors clustered by image."""

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parser
from evlm_jax import cli
from evlm_jax.batch import Batch
from evlm_jax.config.ranges import Positive, argument
from evlm_jax.convert.activations import in_float32
from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import Sample, question
from evlm_jax.data.text import Document, score_document
from evlm_jax.evals import tasks
from evlm_jax.evals.answer import prompt_text
from evlm_jax.evals.choice import fit_budget
from evlm_jax.evals.statistics import clustered_error
from evlm_jax.evals.task import Question, first
from evlm_jax.models.evlm import EVLM
from evlm_jax.runs import Trained, features_of, load_trained

GOLDEN = Path("tests/golden/format0_dense")
ROWS = 2  # of a batch
COLUMNS = ("run", "GB", "KL, mean", "KL, worst", "right", "difference", "error", "same tokens")


class Read(NamedTuple):
    """What a run gives for the tokens of right answers."""

    bytes: int  # of its parameters
    logits: np.ndarray  # [tokens, vocab]
    targets: np.ndarray  # [tokens]
    asked: np.ndarray  # [tokens]: the number of the question

    @property
    def right(self) -> np.ndarray:
        """Whether greedy generation gives the right answer, bool [questions]."""
        return np.bincount(self.asked, self.logits.argmax(-1) != self.targets) == 0


def read(where: str, asked: Sequence[Question]) -> Read:
    """What the newest step of a run gives."""
    trained = load_trained(where)
    cfg = in_float32(trained.model).cfg
    documents = [right_answer(trained, one) for one in asked]
    found = []
    for batch, of, _ in rows_in_order(
        documents, fit_budget(cfg, documents), ROWS, features_of(trained)
    ):
        logits = np.asarray(_logits(trained.model, batch))
        found.append((logits[of >= 0], batch.targets[of >= 0], of[of >= 0]))
    size = sum(array.nbytes for array in trained.params.values())
    return Read(size, *map(np.concatenate, zip(*found)))


def right_answer(trained: Trained, asked: Question) -> Document:
    """The question with its right answer, which alone is predicted."""
    cfg = trained.model.cfg
    answer = asked.answer if isinstance(asked.answer, str) else asked.answer[0]
    dialog = question(prompt_text(asked, cfg.data.template), answer)
    sample = Sample(asked.id, "asked", asked.visuals, (dialog,))
    return score_document(sample, trained.tokenizer, cfg)


@jax.jit
def _logits(model: EVLM, batch: Batch) -> jax.Array:
    hidden = model.hidden(batch)
    return model.logits(jnp.take_along_axis(hidden, batch.target_positions[..., None], 1))


@jax.jit
def _divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return (jnp.exp(p) * (p - q)).sum(-1)


def cells(name: str, one: Read, base: Read, images: Sequence[str]) -> list[str]:
    """A run beside the first."""
    kl = np.array([_divergence(*pair) for pair in zip(base.logits, one.logits)])
    worst = (np.bincount(one.asked, kl) / np.bincount(one.asked)).max()
    change = 100.0 * one.right - 100.0 * base.right
    same = one.logits.argmax(-1) == base.logits.argmax(-1)
    return [
        name,
        f"{one.bytes / 1e9:.3f}",
        f"{kl.mean():.5f}",
        f"{worst:.3f}",
        f"{one.right.mean():.2%}",
        f"{change.mean():+.2f}",
        f"{clustered_error(change, images):.2f}",
        f"{same.mean():.2%}",
    ]


def main() -> None:
    """Prints the table."""
    of = parser(__doc__)
    of.add_argument("runs", nargs="*", help="the run as it was, then quantised ones")
    of.add_argument("--task", default="scenes", help="of `evlm eval`, one that needs no --data")
    of.add_argument("--limit", type=argument(Positive), help="its first questions alone")
    args = of.parse_args()
    if len(args.runs) < 2 and not args.smoke:
        of.error("give the run as it was and a quantised one")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if args.smoke:  # the tiny run that the tests keep, whose paths are relative
            args.runs, args.task, args.limit = ["run", "int8"], "easy-vqa", 4
            shutil.copytree(GOLDEN, Path(folder) / "golden")
            stack.enter_context(contextlib.chdir(Path(folder) / "golden"))
            made = "convert quantize --checkpoint run --out int8 --tile 16 --without-logits"
            cli.main(made.split())
        asked = first(tasks.find(args.task).questions(None, None), args.limit)
        base = read(args.runs[0], asked)
        print(f"{args.task}: {len(asked):,} questions, {len(base.targets):,} tokens of answers\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
        for name in args.runs:
            one = base if name == args.runs[0] else read(name, asked)
            line = cells(Path(name).name, one, base, [question.cluster for question in asked])
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
