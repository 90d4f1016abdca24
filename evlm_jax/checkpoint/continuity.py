"""Whether a run may go on under a config: what would lose its place, its order or its optimizer's
state is refused by name.
"""

from collections.abc import Iterator

from flax.traverse_util import flatten_dict

from evlm_jax import optim
from evlm_jax.config import EVLMConfig, from_saved, to_dict

# Fields that decide which documents come when, and which fit together into rows.
ORDER = (
    *(
        f"data.{name}"
        for name in (
            "sources",
            "weights",
            "tasks",
            "ends",
            "template",
            "length",
            "images",
            "targets",
            "image_group",
            "slots",
        )
    ),
    *(f"data.{name}" for name in ("block_pairs", "dialogs", "isolate", "window", "seed")),
    *("train.batch", "media.tokens", "xattn.query_block"),
)
FLAG = "--allow-data-change"


def changed(cfg: EVLMConfig, saved: dict) -> dict[str, tuple]:
    """{field: (its value in the checkpoint, in `cfg`)} where they differ."""
    old, new = (flatten_dict(to_dict(c), sep=".") for c in (from_saved(saved), cfg))
    return {key: (old[key], value) for key, value in new.items() if value != old[key]}


def reported_changes(cfg: EVLMConfig, saved: dict) -> str:
    """Returns a clause for the log about every field that differs from the checkpoint's config;
    empty where none does. Such a run continues, but is bit-identical to neither config.
    """
    return "".join(
        f"; {key} was {old}, is {new}" for key, (old, new) in changed(cfg, saved).items()
    )


def _check_quantised(cfg: EVLMConfig, saved: dict) -> None:
    """Raises ValueError where bytes of quantised matrices would be read as what they are not."""
    before = from_saved(saved).quant
    if before != cfg.quant and (before.patterns or cfg.quant.patterns):
        told = [
            f"{key} was {old}, is {new}"
            for key, (old, new) in changed(cfg, saved).items()
            if key.startswith("quant.")
        ]
        raise ValueError(
            f"the run holds its matrices otherwise: {'; '.join(told)}. Give its quant section, or"
            " begin another run with --init"
        )


def check(cfg: EVLMConfig, meta: dict, data: Iterator, other_data: bool) -> None:
    """Raises ValueError where the run of the checkpoint with this `meta` cannot go on.

    Args:
      other_data: the order of the documents may be another one.
    """
    step, phase = meta["step"], meta["phase"]
    if step < cfg.train.steps and optim.phase_at(cfg, step) < phase:
        raise ValueError(
            f"step {step} was reached in optim.phases[{phase}] and lies in"
            f" phases[{optim.phase_at(cfg, step)}] now, for they begin at steps"
            f" {optim.starts(cfg)}: give phases[{phase}].step, the update behind which it began, in"
            " place of its start"
        )
    _check_quantised(cfg, meta["config"])
    if other_data:
        return
    told = [
        f"{key} was {old}, is {new}"
        for key, (old, new) in changed(cfg, meta["config"]).items()
        if key in ORDER
    ]
    before, now = (state.get("sources", {}) for state in (meta["data"], data.get_state()))
    told += [
        (
            f"data source {name} has {now[name]['samples']} samples, had {before[name]['samples']}"
            if now[name]["samples"] != before[name]["samples"]
            else f"data source {name} has other samples, or in another order"
        )
        for name in now
        if name in before and now[name] != before[name]
    ]
    if told:
        raise ValueError(
            f"the data are not those of step {step}: {'; '.join(told)}. {FLAG} goes on with them"
            " from the same number of documents"
        )
