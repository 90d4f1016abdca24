"""What a study asks: tasks, measures, claims, and when a claim is decided.

An experiment declares it (`get_study`), each of its runs keeps it, and what is said of finished
runs is said by what they keep. Runs that keep none are of EASY_VQA."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from evlm_jax.config import load
from evlm_jax.config.ranges import Count, Fraction, Positive, PositiveFloat
from evlm_jax.config.schema import build

BASE = "base"


@dataclass(frozen=True)
class Task:
    """An evaluation that every reading of a run makes."""

    name: str  # of evals/tasks
    # "answers": scored as `evlm eval` does; "losses": nats of each right answer, and whether greedy
    # generation would say it, from one pass
    how: Literal["answers", "losses", "both"] = "losses"
    rows: Positive = 4  # of a batch of answers
    questions: Count = 0  # the first so many are asked; 0: all


@dataclass(frozen=True)
class Measure:
    """What is compared."""

    key: str  # TASK/METRIC, in "measured"
    name: str  # for people
    sign: Literal[1, -1]  # 1: more is better
    families: tuple[str, ...] = ()  # whose means it is the mean of; (): the mean of all questions
    digits: Count = 2  # shown behind the point

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its parts in "measured"."""
        task, _, metric = self.key.partition("/")
        return tuple(f"{of_family(task, family)}/{metric}" for family in self.families or ("",))


def of_family(task: str, family: str) -> str:
    """What the questions of a family are called in "measured" and "clusters"; "": all."""
    return f"{task}, {family}" if family else task


@dataclass(frozen=True)
class Claim:
    """`better` beats the best of `than`.

    Of several, the one with the best mean is chosen by the same numbers, which is in its favour.
    """

    text: str
    better: str
    than: tuple[str, ...]
    control: bool = False  # the two differ by their seeds alone: it must not be decided


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that decides what finished runs say."""

    tested: str  # for people: of what, and how it is asked
    tasks: tuple[Task, ...]  # --test limits the first
    measures: tuple[Measure, ...]  # the first is the primary one
    claims: tuple[Claim, ...]
    enough: float | None = None  # the base's primary measure, without which nothing is judged
    questions: Count = 0  # that a run must have seen
    readings: Positive = 1  # of a budget, whose mean counts; the last is at the budget
    apart: Count = 0  # updates between two readings
    # Numbers of seeds at which the primary measure is looked at, and each claim may end
    # (evals/group_sequential.py); (): every measure is judged by its interval.
    looks: tuple[Positive, ...] = ()
    margin: PositiveFloat | None = None  # a smaller difference of the primary measure is none
    alpha: Fraction = 0.05  # of each claim

    def __post_init__(self):
        tasks = {task.name for task in self.tasks}
        rules = [
            (bool(self.tasks and self.measures), "tasks", "and measures need one entry each"),
            (
                all(m.key.partition("/")[0].partition(", ")[0] in tasks for m in self.measures),
                "measures",
                f"are of one of study.tasks each: {', '.join(sorted(tasks))}",
            ),
            (self.readings == 1 or self.apart > 0, "apart", "is needed for several readings"),
            (
                list(self.looks) == sorted({*self.looks} - {1}),
                "looks",
                "must ascend, from 2 seeds or more",
            ),
            (bool(self.looks) == (self.margin is not None), "margin", "belongs to study.looks"),
            (
                not self.looks or all(len(claim.than) == 1 for claim in self.claims),
                "claims",
                "have one rival each where there are looks: choose it by runs of other seeds",
            ),
        ]
        for holds, name, mend in rules:
            if not holds:
                raise ValueError(f"config: study.{name} {mend}")

    @property
    def primary(self) -> Measure:
        """The measure that decides."""
        return self.measures[0]

    def steps(self, step: int) -> list[int]:
        """The updates behind which a run is read for a budget that ends at `step`.

        Raises ValueError where the first would lie before the run.
        """
        first = step - (self.readings - 1) * self.apart
        if first < 1:
            raise ValueError(
                f"study: {self.readings} readings {self.apart} updates apart do not fit a run of"
                f" {step}: give more --questions, or a smaller study.apart"
            )
        return [first + number * self.apart for number in range(self.readings)]


EASY_VQA = Study(
    tested="easy-vqa's official test, answered by lowest loss",
    tasks=(Task("easy-vqa-choice", "answers", 4), Task("emoji", "both", 32)),
    measures=(
        Measure("easy-vqa-choice/accuracy", "easy-vqa test, %", 1),
        Measure("emoji/loss", "unseen emoji, nats a name", -1),
        Measure("emoji/CIDEr (words)", "unseen emoji, CIDEr", 1),
    ),
    claims=(
        Claim(
            "Several taps beat the best single one", BASE, ("tap-4", "tap-8", "tap-11", "tap-last")
        ),
        Claim("Several taps beat the last block's", BASE, ("tap-last",)),
        Claim("Routed taps beat fused ones", BASE, ("fused",)),
        Claim(
            "Neighbouring layers share a tap (blocked) beats taps in turn (cyclic)",
            BASE,
            ("cyclic",),
        ),
        Claim("16 media tokens beat one", "media-16", ("media-1",)),
        Claim("Experts beat a dense FFN", "moe", (BASE,)),
        Claim("EVLM beats llava", BASE, ("llava",)),
        Claim("EVLM beats flamingo", BASE, ("flamingo",)),
    ),
    enough=80.0,
    questions=20_000,
)


def load_study(spec: str) -> Study:
    """What the experiment file of `spec` declares; EASY_VQA where it declares nothing.

    Raises ValueError naming the field that is wrong.
    """
    declare = getattr(load.experiment(spec), "get_study", None)
    return build(Study, load.guarded(spec, declare), "study") if declare else EASY_VQA


def study_of(settings: dict) -> Study:
    """Of finished runs, whose settings these are."""
    return build(Study, settings["study"], "study") if "study" in settings else EASY_VQA


def saved(study: Study) -> dict:
    """Its part of the settings of a run."""
    return {} if study == EASY_VQA else {"study": dataclasses.asdict(study)}
