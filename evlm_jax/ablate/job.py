"""One run of an ablation: trained to each of its two budgets, read there, and written down. Each
part is taken up where it was cut off.

DIR/VARIANT/SEED/213.json      what was read behind update 213
DIR/VARIANT/SEED/result.json   the whole run, once it has been read at both budgets
DIR/VARIANT/SEED/metrics.jsonl and, until then or where they are kept, the checkpoints
"""

import fcntl
import itertools
import math
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from evlm_jax.ablate import finished
from evlm_jax.ablate.budget import budgets
from evlm_jax.checkpoint import store
from evlm_jax.config import EVLMConfig, to_dict, to_saved
from evlm_jax.convert import upcycle
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.samples import Sample, question
from evlm_jax.evals import results, tasks
from evlm_jax.evals.answer import answerer, prompt_text
from evlm_jax.evals.choice import answer_losses
from evlm_jax.evals.runner import evaluate
from evlm_jax.evals.task import Question, first
from evlm_jax.launch import train_run
from evlm_jax.metrics import training_lines
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from evlm_jax.runs import Trained, features_of, load_trained

CHOICE, CAPTION = "easy-vqa-choice", "emoji"
ROWS = {CHOICE: 4, CAPTION: 32}  # of an evaluation's batch
LAST = 4  # lines of metrics.jsonl whose mean is a run's loss
BASE = "base"


def check(load: Callable[[str], EVLMConfig], variant: str, init: str | None) -> None:
    """Raises ValueError where there is no such variant, where what it changes cannot count, or
    experts cannot be made of `init`.
    """
    cfg = load(variant)
    if makes_experts(cfg, init):
        upcycle.check(cfg.moe)
    elif "moe.upcycle" in changes(load(BASE), cfg):
        raise ValueError(
            f"{variant}: moe.upcycle counts where experts are made of a dense run's FFNs: give that"
            " run with --init"
        )


def run(
    load: Callable[[str], EVLMConfig],
    variant: str,
    seed: int,
    questions: int,
    limit: int | None,
    init: str | None,
    out: Path,
    keep: bool,
) -> None:
    """Trains, evaluates and saves result.json; nothing is done where that exists.

    Args:
      load: variant -> its config.
      questions: the budget.
      limit: questions of the official test that are used; None: all.
      init: the run to start from; None: the towers alone.
      keep: the checkpoints stay.
    Raises:
      ValueError: an unfinished run in the folder began elsewhere.
      Stopped: a signal came while training; what was trained is saved.
    """
    folder = out / variant / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that was left behind may still be saving
        if (folder / "result.json").exists():
            return
        plain, (base, cfg) = load(BASE), (seeded(load(name), seed) for name in (BASE, variant))
        common = settings(plain, questions, limit, init)
        _begun(folder / "begun.json", common.get("init"))
        cuts, begin = budgets(base, cfg, questions), start(cfg, init, folder)
        readings = {}
        for step in sorted({cut.step for cut in cuts.values()}):
            file = folder / f"{step}.json"
            if not file.exists():
                results.save(
                    file,
                    read(replace(cfg, train=replace(cfg.train, steps=step)), begin, folder, limit),
                )
            readings[str(step)] = results.load(file)
        whole = {
            "variant": variant,
            "seed": seed,
            "changes": changes(plain, load(variant)),
            "trained": trained_parameters(cfg),
        }
        whole |= {
            "settings": common,
            "budgets": {name: cut._asdict() for name, cut in cuts.items()},
        }
        finished.save(folder / "result.json", whole | {"readings": readings})
        for name in () if keep else ("steps", "frozen", "start"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _begun(file: Path, init: str | None) -> None:
    if file.exists() and results.load(file)["init"] != init:
        raise ValueError(
            f"{file}: the run that was cut off here began elsewhere; give its --init, another"
            f" --out, or remove {file.parent}"
        )
    results.save(file, {"init": init})


def seeded(cfg: EVLMConfig, seed: int) -> EVLMConfig:
    """The seed decides new parameters and the order of the data."""
    return replace(cfg, data=replace(cfg.data, seed=seed), train=replace(cfg.train, seed=seed))


def makes_experts(cfg: EVLMConfig, init: str | None) -> bool:
    """Whether `cfg` has experts and the run that it starts from a dense FFN."""
    return bool(init and cfg.moe.copies) and not store.open_params(init)[1].moe.copies


def start(cfg: EVLMConfig, init: str | None, folder: Path) -> str | None:
    """Where `cfg` starts: `init`, or in `folder` the same with experts."""
    if not makes_experts(cfg, init):
        return init
    made = folder / "start"
    if not made.exists():
        upcycle.upcycle_run(init, cfg, str(made))
    return str(made)


def settings(base: EVLMConfig, questions: int, limit: int | None, init: str | None) -> dict:
    """What runs must have in common to be compared."""
    begun = {"init": results.weights_hash(store.load_params(init)[0])} if init else {}
    return {"questions": questions, "limit": limit, "base": to_saved(base)} | begun


def changes(base: EVLMConfig, cfg: EVLMConfig) -> dict:
    """{full name of a field: its value in `cfg`} where that is not the base's; the name does not
    count.
    """
    old, new = (flatten_dict(to_dict(c), sep=".") for c in (base, cfg))
    return {key: value for key, value in new.items() if value != old[key] and key != "name"}


def trained_parameters(cfg: EVLMConfig) -> int:
    """How many numbers train."""
    trained = TrainPhase(cfg, 0, make_layout(cfg)).trained
    return sum(math.prod(shape) for name, shape in parameter_shapes(cfg).items() if name in trained)


def read(cfg: EVLMConfig, begin: str | None, folder: Path, limit: int | None) -> dict:
    """Trains from `begin` to the end of `cfg` and reads the model there."""
    train_run(cfg, str(folder), begin)
    memory, trained = peak_memory(), load_trained(str(folder), cfg.train.steps)
    features, weights = features_of(trained), results.weights_hash(trained.params)
    measured, clusters = {}, {}
    for name, most in ((CHOICE, limit), (CAPTION, None)):
        progress = folder / "evals" / f"{name}-{cfg.train.steps}.jsonl"
        result, questions = answered(
            name, trained, features, most, progress, {"weights_sha256": weights}
        )
        each = {
            metric: values
            for metric, values in tasks.find(name).score(result["examples"]).each.items()
            if None not in values
        }
        if name == CAPTION:
            each["loss"] = caption_losses(trained, features, questions)
        measured |= {f"{name}/{metric}": finished.pack(values) for metric, values in each.items()}
        clusters[name] = [
            len(list(group))
            for _, group in itertools.groupby(row["cluster"] for row in result["examples"])
        ]
    lines = [
        line for line in training_lines(folder / "metrics.jsonl") if line["step"] <= cfg.train.steps
    ]
    return {
        "measured": measured,
        "clusters": clusters,
        "loss": float(np.mean([line["loss"] for line in lines[-LAST:]])),
        "step_seconds": float(np.median([line["step_seconds"] for line in lines])),
        "peak_bytes": memory,
        "weights_sha256": weights,
        "device": results.device(),
    }


def answered(
    name: str,
    trained: Trained,
    features: FeatureStore | None,
    limit: int | None,
    progress: Path,
    about: dict,
) -> tuple[dict, list[Question]]:
    """A task's result as evals/runner.py makes it, and its questions."""
    task = tasks.find(name)
    every = task.questions(None, None)
    questions = first(every, limit)
    answer = answerer(task, every, trained.model, trained.tokenizer, features, ROWS[name])
    return evaluate(task, questions, answer, about, progress), questions


def caption_losses(
    trained: Trained, features: FeatureStore | None, questions: Sequence[Question]
) -> list[float]:
    """Nats of each question's right answer, the token that ends it included."""
    template = trained.model.cfg.data.template
    samples = [
        Sample(q.id, CAPTION, q.visuals, (question(prompt_text(q, template), q.answer[0]),))
        for q in questions
    ]
    return [
        float(loss.sum())
        for loss, _ in answer_losses(
            trained.model, trained.tokenizer, samples, features, ROWS[CHOICE]
        )
    ]


def peak_memory() -> int:
    """Most bytes of the device, or of the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return (
        stats["peak_bytes_in_use"]
        if stats
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
