"""What is saved today loads tomorrow: the formats of saved configs and checkpoints, and what former
ones mean today.

A change of format comes with a new number, its rows below, and a golden folder in tests/golden.
Numbers so far:
  0  no number; frozen stores and steps without digests of what is trained
  1  configs and steps carry the number; steps carry digests (checkpoint.py)
A field that is merely added needs no row: its default is what the code did before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

FORMAT = 1


class Former(NamedTuple):
    """A field that saved configs up to a format lack, and what the code did then."""

    until: int  # the last format without it
    field: str
    value: Callable[[dict], Any]  # of the saved config


FORMER = (Former(0, "xattn.kv_heads", lambda saved: saved["xattn"]["heads"]),)
RENAMED: dict[str, str] = {}  # "section.old": "section.new", in saved configs and in experiments


def check(number: Any, what: str) -> int:
    """The number of a format.

    Raises ValueError for one that this version does not know; `what` says whose it is.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= FORMAT:
        raise ValueError(
            f"{what} is of format {number}, this version reads 0 to {FORMAT}: update, or read it"
            " with what wrote it"
        )
    return number


def upgraded(saved: dict) -> dict:
    """A saved config as today's, without its number.

    Raises ValueError for a format that this version does not know.
    """
    number, config = (
        check(saved.get("format", 0), "the saved config"),
        renamed({k: v for k, v in saved.items() if k != "format"}),
    )
    for row in FORMER:
        section, _, field = row.field.partition(".")
        if number <= row.until and field not in config.get(section, {field: None}):
            config[section] = config[section] | {field: row.value(config)}
    return config


def renamed(config: dict) -> dict:
    """`config` with former names of fields replaced.

    Raises ValueError where old and new name stand side by side.
    """
    config = dict(config)
    for old, new in RENAMED.items():
        (section, _, name), (to, _, field) = old.partition("."), new.partition(".")
        if not isinstance(config.get(section), dict) or name not in config[section]:
            continue
        if field in config.get(to, {}):
            raise ValueError(f"config: {old} is called {new} now, and both are given: remove {old}")
        value = config[section][name]
        config[section] = {k: v for k, v in config[section].items() if k != name}
        config[to] = config.get(to, {}) | {field: value}
    return config
