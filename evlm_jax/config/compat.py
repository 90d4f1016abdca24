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

from ml_collections import ConfigDict

FORMAT = 1


class Former(NamedTuple):
    """A field that saved configs up to a format lack, and what the code did then."""

    until: int  # the last format without it
    field: str
    value: Callable[[dict], Any]  # of the saved config


FORMER = (Former(0, "xattn.kv_heads", lambda saved: saved["xattn"]["heads"]),)
RENAMED = {  # "section.old": "section.new", in saved configs, experiments and overrides
    "data.pool": "data.image_group",
    "data.pairs": "data.block_pairs",
    "xattn.tile": "xattn.query_block",
    "moe.tile": "moe.expert_block",
}


def check(number: Any, what: str) -> int:
    """Returns the number of a format.

    Raises ValueError for one that this version does not read; `what` names the file in the error.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= FORMAT:
        raise ValueError(
            f"{what} is of format {number}, this version reads 0 to {FORMAT}: update, or read it"
            " with what wrote it"
        )
    return number


def upgraded(saved: dict) -> dict:
    """A saved config in today's form, without its number.

    Raises ValueError for a format that this version does not read.
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

    Raises ValueError where old and new name are given with different values.
    """
    config = dict(config)
    for old, new in RENAMED.items():
        (section, _, name), (to, _, field) = old.partition("."), new.partition(".")
        if not isinstance(config.get(section), dict) or name not in config[section]:
            continue
        value = config[section][name]
        if config.get(to, {}).get(field, value) != value:
            raise ValueError(f"config: {old} is called {new} now, and both are given: remove {old}")
        config[section] = {k: v for k, v in config[section].items() if k != name}
        config[to] = config.get(to, {}) | {field: value}
    return config


def link_former_names(config: ConfigDict) -> ConfigDict:
    """`config` itself, with each renamed field under both names as one reference: an experiment
    that was written for a former version reads and sets it as it did.
    """
    with config.unlocked():
        for names in RENAMED.items():
            (of_old, old), (of_new, new) = (name.split(".") for name in names)
            former, current = config.get(of_old), config.get(of_new)
            if not (isinstance(former, ConfigDict) and isinstance(current, ConfigDict)):
                continue
            if new in current and old not in former:
                former[old] = current.get_ref(new)
            elif old in former and new not in current:
                current[new] = former.get_ref(old)
    return config
