"""One run of an ablation: trained to each of its two budgets, read there, and written down. Each
part is taken up where it was cut off.

DIR/VARIANT/SEED/213.json      what was read behind update 213
DIR/VARIANT/SEED/result.json   the whole run, once it has been read at both budgets
DIR/VARIANT/SEED/metrics.jsonl and, until then or where they are kept, the checkpoints
"""

import fcntl
import math
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from evlm_jax.ablate import finished
from evlm_jax.ablate.budget import budgets
from evlm_jax.ablate.measure import measure
from evlm_jax.ablate.study import BASE, Study, saved
from evlm_jax.checkpoint import store
from evlm_jax.config import EVLMConfig, to_dict, to_saved
from evlm_jax.convert import upcycle
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.evals import results
from evlm_jax.launch import train_run
from evlm_jax.metrics import training_lines
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from evlm_jax.runs import load_trained

LAST = 4  # lines of metrics.jsonl whose mean is a run's loss


class Order(NamedTuple):
    """What the runs of an ablation have in common."""

    load: Callable[[str], EVLMConfig]  # variant -> its config
    study: Study
    out: Path
    questions: int  # the budget
    limit: int | None = None  # questions of the first task that are asked; None: all
    init: str | None = None  # the run to start from; None: the towers alone
    branch: str | None = None  # an earlier --out: each seed starts from its base's run of that seed
    keep: bool = False  # the checkpoints stay

    def begin(self, seed: int) -> str | None:
        """The run that those of a seed start from."""
        return f"{self.branch}/{BASE}/{seed}" if self.branch else self.init


def check(order: Order, variant: str, init: str | None) -> None:
    """Raises ValueError where there is no such variant, where what it changes cannot count, or
    experts cannot be made of `init`.
    """
    cfg = order.load(variant)
    if makes_experts(cfg, init):
        upcycle.check(cfg.moe)
    elif "moe.upcycle" in changes(order.load(BASE), cfg):
        raise ValueError(
            f"{variant}: moe.upcycle counts where experts are made of a dense run's FFNs: give that"
            " run with --init"
        )


def run(order: Order, variant: str, seed: int) -> None:
    """Trains, evaluates and saves result.json; nothing is done where that exists.

    Raises:
      ValueError: an unfinished run in the folder began elsewhere.
      Stopped: a signal came while training; what was trained is saved.
    """
    folder = order.out / variant / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that was left behind may still be saving
        if (folder / "result.json").exists():
            return
        base, cfg = (seeded(order.load(name), seed) for name in (BASE, variant))
        init = order.begin(seed)
        begun = results.weights_hash(store.load_params(init)[0]) if init else None
        _begun(folder / "begun.json", begun)
        cuts = budgets(base, cfg, order.questions)
        steps = {step for cut in cuts.values() for step in order.study.steps(cut.step)}
        begin, readings = start(cfg, init, folder), {}
        for step in sorted(steps):
            file = folder / f"{step}.json"
            if not file.exists():
                reached = replace(cfg, train=replace(cfg.train, steps=step))
                results.save(file, read(reached, begin, folder, order))
            readings[str(step)] = results.load(file)
        whole = {
            "variant": variant,
            "seed": seed,
            "changes": changes(order.load(BASE), order.load(variant)),
            "trained": trained_parameters(cfg),
            "settings": settings(order, begun),
            "budgets": {name: cut._asdict() for name, cut in cuts.items()},
        }
        whole |= {"begun": begun} if order.branch else {}
        finished.save(folder / "result.json", whole | {"readings": readings})
        for name in () if order.keep else ("steps", "frozen", "start"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _begun(file: Path, init: str | None) -> None:
    if file.exists() and results.load(file)["init"] != init:
        raise ValueError(
            f"{file}: the run that was cut off here began elsewhere; give its --init or"
            f" --branch-from, another --out, or remove {file.parent}"
        )
    results.save(file, {"init": init})


def seeded(cfg: EVLMConfig, seed: int) -> EVLMConfig:
    """The seed decides new parameters and the order of the data; what the experiment says is added
    to it.
    """
    data, train = cfg.data, cfg.train
    return replace(
        cfg,
        data=replace(data, seed=data.seed + seed),
        train=replace(train, seed=train.seed + seed),
    )


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


def settings(order: Order, begun: str | None) -> dict:
    """What runs must have in common to be compared.

    Args:
      begun: hash of the weights that the run started from.
    """
    common = {
        "questions": order.questions,
        "limit": order.limit,
        "base": to_saved(order.load(BASE)),
    }
    common |= {"branched": True} if order.branch else {"init": begun} if begun else {}
    return common | saved(order.study)


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


def read(cfg: EVLMConfig, begin: str | None, folder: Path, order: Order) -> dict:
    """Trains from `begin` to the end of `cfg` and reads the model there."""
    train_run(cfg, str(folder), begin)
    memory, trained = peak_memory(), load_trained(str(folder), cfg.train.steps)
    weights = results.weights_hash(trained.params)
    lines = [
        line for line in training_lines(folder / "metrics.jsonl") if line["step"] <= cfg.train.steps
    ]
    return measure(order.study, order.limit, trained, folder, weights) | {
        "loss": float(np.mean([line["loss"] for line in lines[-LAST:]])),
        "step_seconds": float(np.median([line["step_seconds"] for line in lines])),
        "peak_bytes": memory,
        "weights_sha256": weights,
        "device": results.device(),
    }


def peak_memory() -> int:
    """Most bytes of the device, or of the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return (
        stats["peak_bytes_in_use"]
        if stats
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
