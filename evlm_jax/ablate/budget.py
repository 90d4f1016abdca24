"""Where a run is read: behind the update that has seen so many questions, and behind the one that
has cost so many FLOPs.

Both are known before anything is trained: which documents make a row depends on lengths alone, and
nothing is decoded here."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.data.mixture import tasks
from evlm_jax.data.pack import assemble
from evlm_jax.data.pipeline import Lane
from evlm_jax.data.sources import open_source
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.flops import train_flops
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase

QUESTIONS, FLOPS = "questions", "flops"  # the two budgets, by name


class Cut(NamedTuple):
    """A run up to an update."""

    step: int
    questions: int  # dialogs of all sources
    flops: (
        float  # that training needed (flops.py); the ViT's count where its features are not cached
    )


def course(cfg: EVLMConfig) -> Iterator[Cut]:
    """The run of `cfg` up to its 1st, 2nd, ... update; endless."""
    made = tasks(
        [open_source(name) for name in cfg.data.sources], load_tokenizer(cfg.init.llm), cfg
    )
    lanes = [Lane(made, cfg, number) for number in range(cfg.image_groups)]
    trained = TrainPhase(cfg, 0, make_layout(cfg)).trained
    questions, flops = 0, 0.0
    for step in itertools.count(1):
        rows = [row for lane in lanes for row in lane.rows()]
        batch = Batch(
            **assemble(rows, cfg),
            pixels=None if cfg.data.cache_features else np.zeros(0),
            taps=None,
        )
        questions += sum(len(np.unique(document.dialog)) for row in rows for document in row)
        flops += train_flops(cfg, trained, batch)
        yield Cut(step, questions, flops)


def budgets(base: EVLMConfig, cfg: EVLMConfig, questions: int) -> dict[str, Cut]:
    """Where the run of `cfg` is read: by QUESTIONS at `questions`, by FLOPS where it has cost what
    `base` costs at as many questions.

    Raises:
      ValueError: the run cannot be read before its end, because its rate or what it trains depends
        on train.steps.
    """
    if cfg.optim.min_lr != cfg.optim.lr or len(cfg.optim.phases) > 1:
        raise ValueError(
            f"{cfg.name}: a run is read at two budgets, so its rate must stay what it is behind the"
            " warm-up: set optim.min_lr = optim.lr and one phase"
        )
    price, cuts = next(cut.flops for cut in course(base) if cut.questions >= questions), {}
    for cut in course(cfg):
        for name, reached in ((QUESTIONS, cut.questions >= questions), (FLOPS, cut.flops >= price)):
            if reached:
                cuts.setdefault(name, cut)
        if len(cuts) == 2:
            return cuts
