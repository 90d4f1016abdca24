"""The claims of a study, judged from finished runs.

Without looks a claim "holds" where the 95% interval of the difference, over seeds and questions,
lies above 0, "does not" where it lies below, and is "undecided" in between, by every measure. With
looks the primary measure decides, by seeds in their order (evals/group_sequential.py): "holds",
"does not", "equivalent" or "open"; the others are reported beside it. Nothing is judged unless the
runs could have shown a difference: see `obstacles`."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evlm_jax.ablate.budget import QUESTIONS
from evlm_jax.ablate.collect import BUDGETS, Difference, difference, values, variants
from evlm_jax.ablate.study import BASE, Claim, Measure, study_of
from evlm_jax.evals.group_sequential import FAILS, HOLDS, OPEN, Decision, decide

LEAST_SEEDS = 2
UNDECIDED, UNJUDGED, REPORTED = "undecided", "not judged", "reported"


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
    study, limit = study_of(found["settings"]), found["settings"]["limit"]
    primary, reasons = study.primary, []
    if limit is not None:
        reasons.append(f"only {limit} questions of {study.tested.partition(',')[0]} were asked")
    of_base = values(found, BASE, QUESTIONS, primary)
    reached = float(np.mean([value.mean() for value in of_base.values()])) if of_base else 0.0
    if study.enough is not None and primary.sign * (reached - study.enough) < 0:
        reasons.append(
            f"the base reaches {reached:.{primary.digits}f} ({primary.name}),"
            f" {study.enough:g} is needed"
        )
    short = [
        run
        for run in found["runs"]
        if max(cut["questions"] for cut in run["budgets"].values()) < study.questions
    ]
    if short:
        names = ", ".join(f"{run['variant']}/{run['seed']}" for run in short)
        reasons.append(f"{names} saw fewer than {study.questions:,} questions")
    return reasons


def judge(found: dict) -> Iterator[Judgement]:
    """Judges every claim whose variants were run, at both budgets, by every measure."""
    study, there, blocked = study_of(found["settings"]), set(variants(found)), obstacles(found)
    for claim in study.claims:
        rivals = [name for name in claim.than if name in there]
        if claim.better not in there or not rivals:
            continue
        for budget in BUDGETS:
            for measure in study.measures:
                best = max(
                    rivals, key=lambda name: measure.sign * _mean(found, name, budget, measure)
                )
                if not (apart := difference(found, claim.better, best, budget, measure)):
                    continue
                verdict = _verdict(apart, measure)
                if study.looks and measure == study.primary:
                    decision = decided(found, claim, budget)
                    verdict, apart = decision.verdict, _at_the_look(decision, measure) or apart
                elif study.looks:
                    verdict = REPORTED
                if verdict != REPORTED and (blocked or len(rivals) < len(claim.than)):
                    verdict = UNJUDGED
                yield Judgement(claim, budget, measure, best, apart, verdict)


def decided(found: dict, claim: Claim, budget: str) -> Decision:
    """How a claim of a study with looks ended: by its primary measure, seeds 0, 1, ... in their
    order up to the first that either side lacks.
    """
    study = study_of(found["settings"])
    a, b = (values(found, name, budget, study.primary) for name in (claim.better, claim.than[0]))
    differences = []
    while (seed := len(differences)) in a and seed in b:
        differences.append(study.primary.sign * float(a[seed].mean() - b[seed].mean()))
    return decide(differences, study.looks, study.margin, study.alpha)


def wanted(found: dict) -> set[str]:
    """Variants of a study with looks that a claim still needs, of those that were run: one that is
    not decided at each budget.
    """
    there = set(variants(found))
    return {
        name
        for claim in study_of(found["settings"]).claims
        if there.issuperset({claim.better, *claim.than})
        and any(decided(found, claim, budget).verdict == OPEN for budget in BUDGETS)
        for name in (claim.better, *claim.than)
    }


def _at_the_look(decision: Decision, measure: Measure) -> Difference | None:
    """The difference at the last look, in the measure's own unit; None before the first."""
    if not decision.seeds:
        return None
    low, high = sorted((measure.sign * decision.low, measure.sign * decision.high))
    return Difference(measure.sign * decision.mean, low, high, None, decision.seeds)


def _mean(found: dict, variant: str, budget: str, measure: Measure) -> float:
    return float(
        np.mean([value.mean() for value in values(found, variant, budget, measure).values()])
    )


def _verdict(apart: Difference, measure: Measure) -> str:
    if apart.seeds < LEAST_SEEDS or apart.low <= 0 <= apart.high:
        return UNDECIDED
    return HOLDS if (apart.low > 0) == (measure.sign > 0) else FAILS
