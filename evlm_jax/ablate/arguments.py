"""Arguments of `evlm ablate`; the command line reads them without what the command needs."""

import argparse
from typing import Any

from evlm_jax.config.ranges import Positive, argument


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evlm ablate`."""
    parser.add_argument(
        "--variants",
        required=True,
        type=_names,
        help="a,b,c: of the experiment file; its base is always there",
    )
    parser.add_argument(
        "--config",
        default="experiments/ablations.py",
        help=(
            "FILE.py, or an experiment's name, without :arg: its get_config takes a variant; fields"
            " are overridden with --config.section.field=value"
        ),
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=argument(Positive), default=3, help="runs of a variant")
    seeds.add_argument(
        "--sequential",
        action="store_true",
        help=(
            "as many seeds as the experiment's looks ask for, one look after the other: a variant"
            " leaves when its claims are decided"
        ),
    )
    parser.add_argument(
        "--questions",
        type=argument(Positive),
        default=20_000,
        help="that a run sees; the other budget is what the base costs for them",
    )
    parser.add_argument(
        "--test",
        type=argument(Positive),
        help="questions of the first task that are asked; all where left out",
    )
    _begin(parser)
    parser.add_argument(
        "--out",
        required=True,
        help="runs, results.json and report.html; what is there is not done again",
    )
    _machine(parser)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--run",
        dest="only",
        type=_run,
        metavar="VARIANT/SEED",
        help="this run only, in this process",
    )
    part.add_argument(
        "--list",
        dest="listed",
        action="store_true",
        help="print the runs that are missing now, VARIANT/SEED a line, and make none",
    )


def _begin(parser: argparse.ArgumentParser) -> None:
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--init",
        help=(
            "run of an earlier stage that all start from; experts are made of its FFNs, by"
            " moe.upcycle"
        ),
    )
    begin.add_argument(
        "--branch-from",
        metavar="DIR",
        help=(
            "earlier --out, made with --keep: those of each seed start from its base's run of that"
            " seed, as with --init"
        ),
    )


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=argument(Positive),
        default=1,
        help="runs at a time, each on its share of the cores",
    )
    parser.add_argument(
        "--cores",
        type=_numbers,
        help="0,1,...: which to share; those of this process where left out",
    )
    parser.add_argument(
        "--gpus",
        type=_names,
        default=[],
        help="0,1,...: one run at a time on each, instead of --jobs",
    )


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names, as a,b,c, got {text!r}")
    return _distinct(names)


def _numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be whole numbers, as 0,1, got {text!r}")
    return _distinct([int(number) for number in numbers])


def _distinct(given: list[Any]) -> list[Any]:
    for one in given:
        if given.count(one) > 1:
            raise argparse.ArgumentTypeError(f"{one} is given twice")
    return given


def _run(text: str) -> str:
    variant, _, seed = text.rpartition("/")
    if not variant or not seed.isdecimal():
        raise argparse.ArgumentTypeError(f"must be VARIANT/SEED, as base/0, got {text!r}")
    return text
