"""Ranges of numbers: of config fields (schema.py checks them, with the field's name) and of
arguments of the command line.

A field says its range by its type: `steps: Positive`. What is not finite lies in no range.
"""

import argparse
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, get_args


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, each end included unless it is open."""

    low: float
    high: float = math.inf
    above: bool = False  # `low` itself is outside
    below: bool = False  # `high` itself is outside
    far: bool = False  # `high` is beyond what is usual: only who went beyond it is told of it

    def __contains__(self, number: float) -> bool:
        if isinstance(number, float) and not math.isfinite(number):
            return False
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def __str__(self) -> str:
        return self.about(None)

    def about(self, number: float | None) -> str:
        """The range in words, for an error about `number`."""
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == math.inf or (self.far and (number or 0) <= self.high):
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:.15g}"


LARGEST = 2**31 - 1  # of integers on a device
Positive = Annotated[int, Range(1, LARGEST, far=True)]
Count = Annotated[int, Range(0, LARGEST, far=True)]
NewTokens = Annotated[int, Range(1, 2**20, far=True)]  # each has room in memory beforehand
Answers = Annotated[int, Range(1, 2**16, far=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX takes no more bits without a word
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Fraction = Annotated[float, Range(0, 1, below=True)]


def check_type(name: str, given: object, kind: type, mend: str) -> None:
    """Raises ValueError with `name` and `mend` where an argument is no `kind`."""
    if not isinstance(given, kind):
        raise ValueError(f"{name} is a {type(given).__name__}: {mend}")


def check(kind: type, number: float, name: str) -> float:
    """Returns `number`, which is of `kind`.

    Raises ValueError with `name` where it is outside the range of `kind`.
    """
    plain, span = get_args(kind)
    if isinstance(number, bool) or not isinstance(
        number, numbers.Integral if plain is int else numbers.Real
    ):
        raise ValueError(
            f"{name} must be {'a whole number' if plain is int else 'a number'}, {span}, got"
            f" {number!r}"
        )
    if number not in span:
        raise ValueError(f"{name} must be {span.about(number)}, got {number!r}")
    return number


def argument(kind: type) -> Callable[[str], float]:
    """A `type` of argparse that reads a number of `kind`."""
    plain, span = get_args(kind)

    def read(text: str) -> float:
        try:
            number = plain(text)
        except ValueError:
            number = None
        if number is None or number not in span:
            raise argparse.ArgumentTypeError(
                f"must be {'a whole number' if plain is int else 'a number'},"
                f" {span.about(number)}, got {text!r}"
            )
        return number

    return read
