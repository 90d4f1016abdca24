"""Eval tasks followed in training, each on its first questions, as the paper follows classification
by lowest loss.

The scores of a look come into metrics.jsonl (metrics.py), and so into TensorBoard and the report,
as "monitor/TASK/METRIC"; they are those that `evlm eval --limit` finds for the checkpoint of the
same update."""

import time
from collections.abc import Callable

import jax
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.tokenizer import Tokenizer
from evlm_jax.evals import score, tasks
from evlm_jax.evals.answer import answerer
from evlm_jax.evals.runner import evaluate
from evlm_jax.evals.task import first
from evlm_jax.generate import ROWS
from evlm_jax.metrics import SECONDS
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.mesh import Layout

Look = Callable[[int, Callable[[], EVLM]], dict[str, float] | None]


def monitor(
    cfg: EVLMConfig, tokenizer: Tokenizer, features: FeatureStore | None, layout: Layout
) -> Look | None:
    """What `train` calls behind each update, with its number and the model: scores, or None where
    no look is due. None without monitors.

    `layout`: of the mesh that trains; its devices share the questions. Raises ValueError for an
    unknown task and for files that do not fit."""
    if not cfg.train.monitors:
        return None
    followed, parts = [], layout.parts("rows")
    rows = -(-ROWS // parts) * parts
    for name in cfg.train.monitors:
        task, _, path = name.partition(":")
        task = tasks.find(task)
        if task.name in (other.name for other, _ in followed):
            raise ValueError(
                f"config: train.monitors has {task.name} twice, whose scores have one name"
            )
        followed.append((task, task.questions(path or None, None)))

    def look(step: int, model: Callable[[], EVLM]) -> dict[str, float] | None:
        if step % cfg.train.monitor_every and step != cfg.train.steps:
            return None
        found, current = {}, model()
        jax.block_until_ready(nnx.state(current))  # the updates under way are training's time
        since = time.monotonic()
        for task, every in followed:
            questions = first(every, cfg.train.monitor_questions or None)
            result = score.scored(
                evaluate(
                    task,
                    questions,
                    answerer(task, every, current, tokenizer, features, rows, layout),
                    {},
                )
            )
            found |= {
                f"monitor/{task.name}/{row['metric']}": row["value"] for row in result["scores"]
            }
        return found | {SECONDS: time.monotonic() - since}

    return look
