"""The paper's claims, judged from finished runs: "holds", "does not" or "undecided", with interval,
or not at all.

A claim says that one variant beats another. It holds where the 95% interval of the difference, over
seeds and questions, lies above 0, and does not where it lies below. Nothing is judged unless the
runs could have shown a difference: see `obstacles`."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evlm_jax.ablate.budget import QUESTIONS
from evlm_jax.ablate.collect import (
    ACCURACY,
    BUDGETS,
    MEASURES,
    Difference,
    Measure,
    difference,
    values,
    variants,
)
from evlm_jax.ablate.job import BASE

LEAST_ACCURACY, LEAST_QUESTIONS, LEAST_SEEDS = 80.0, 20_000, 2
HOLDS, FAILS, UNDECIDED, UNJUDGED = "holds", "does not", "undecided", "not judged"


class Claim(NamedTuple):
    """The claim that variant `better` beats the best of `than`."""

    text: str
    better: str
    than: tuple[str, ...]


CLAIMS = (
    Claim("Several taps beat the best single one", BASE, ("tap-4", "tap-8", "tap-11", "tap-last")),
    Claim("Several taps beat the last block's", BASE, ("tap-last",)),
    Claim("Routed taps beat fused ones", BASE, ("fused",)),
    Claim(
        "Neighbouring layers share a tap (blocked) beats taps in turn (cyclic)", BASE, ("cyclic",)
    ),
    Claim("16 media tokens beat one", "media-16", ("media-1",)),
    Claim("Experts beat a dense FFN", "moe", (BASE,)),
    Claim("EVLM beats llava", BASE, ("llava",)),
    Claim("EVLM beats flamingo", BASE, ("flamingo",)),
)


class Judgement(NamedTuple):
    """Verdict on a claim, by one measure at one budget."""

    claim: Claim
    budget: str
    measure: Measure
    rival: str
    apart: Difference  # of what is better from what is worse, in the measure's own unit
    verdict: str


def obstacles(found: dict) -> list[str]:
    """Why no claim may be judged from these runs; empty where they may."""
    reasons, limit = [], found["settings"]["limit"]
    if limit is not None:
        reasons.append(f"only {limit} questions of the official test were asked")
    of_base = values(found, BASE, QUESTIONS, ACCURACY)
    reached = float(np.mean([value.mean() for value in of_base.values()])) if of_base else 0.0
    if reached < LEAST_ACCURACY:
        reasons.append(
            f"the base reaches {reached:.1f}% of the official test, {LEAST_ACCURACY:.0f}% are"
            " needed"
        )
    short = [
        run
        for run in found["runs"]
        if max(cut["questions"] for cut in run["budgets"].values()) < LEAST_QUESTIONS
    ]
    if short:
        names = ", ".join(f"{run['variant']}/{run['seed']}" for run in short)
        reasons.append(f"{names} saw fewer than {LEAST_QUESTIONS:,} questions")
    return reasons


def judge(found: dict) -> Iterator[Judgement]:
    """Judges every claim whose variants were run, at both budgets, by every measure."""
    there, blocked = set(variants(found)), obstacles(found)
    for claim in CLAIMS:
        rivals = [name for name in claim.than if name in there]
        if claim.better not in there or not rivals:
            continue
        for budget in BUDGETS:
            for measure in MEASURES:
                best = max(
                    rivals, key=lambda name: measure.sign * _mean(found, name, budget, measure)
                )
                if apart := difference(found, claim.better, best, budget, measure):
                    verdict = (
                        UNJUDGED
                        if blocked or len(rivals) < len(claim.than)
                        else _verdict(apart, measure)
                    )
                    yield Judgement(claim, budget, measure, best, apart, verdict)


def _mean(found: dict, variant: str, budget: str, measure: Measure) -> float:
    return float(
        np.mean([value.mean() for value in values(found, variant, budget, measure).values()])
    )


def _verdict(apart: Difference, measure: Measure) -> str:
    if apart.seeds < LEAST_SEEDS or apart.low <= 0 <= apart.high:
        return UNDECIDED
    return HOLDS if (apart.low > 0) == (measure.sign > 0) else FAILS
