"""What compiled programs of a case do, read from the optimised program (planning/compiled.py).
Nothing runs.

FLOPs are of XLA:CPU's program of two rows, halved: it takes any size, and of one row the compilers
write products as sums, or lose what a product belongs to. Bytes are of the TPU compiler's program
of one row on one chip, where that holds it; XLA:CPU's would be of another program, which widens and
copies weights."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import jax
from tqdm import tqdm

from evlm_jax.config import EVLMConfig
from evlm_jax.costs.cases import case, counterparts
from evlm_jax.planning.plan import plan

WHATS = ("decode", "prefill", "train")
COMPILER, ROWS = "cpu:1", 2


def counted_flops(cfg: EVLMConfig, what: str, frames: int, text: int) -> dict:
    """FLOPs of one row: {"needed", "executed": {part: FLOPs}, "again": FLOPs of them that are
    computed a second time}.
    """
    report = _plan(case(cfg, frames, text, ROWS), COMPILER, what)

    def parts(costs):
        return {part: sum(cost.values()) / ROWS for part, cost in costs.items()}

    again = sum(cost["again"] for cost in report["executed"].values()) / ROWS
    return {
        "needed": parts(report["needed"]),
        "executed": parts(report["executed"]),
        "again": again,
        "notes": report["notes"],
    }


def counted_bytes(cfg: EVLMConfig, what: str, frames: int, text: int, chip: str) -> dict:
    """Bytes of one row on one chip: {"fits", "bytes": through HBM, "peak": of memory}, or why it
    does not fit.
    """
    report = _plan(case(cfg, frames, text), f"{chip}:1", what)
    if not report["fits"]:
        return {"fits": False, "says": report["says"].splitlines()[0]}
    return {
        "fits": True,
        "bytes": report["bytes"],
        "peak": report["memory"]["peak"],
        "notes": report["notes"],
    }


def _plan(cfg: EVLMConfig, topology: str, what: str) -> dict:
    jax.clear_caches()  # programs of other cases are not needed again
    return plan(cfg, topology, what, consumers=False, video=True)


def count(cfg: EVLMConfig, frames: list[int], text: int, chip: str | None) -> dict:
    """{name: what was counted} of all of `programs`."""
    found = dict(programs(cfg, frames, text, chip))
    return {name: f() for name, f in tqdm(found.items(), desc=cfg.name, unit="program")}


def programs(
    cfg: EVLMConfig, frames: list[int], text: int, chip: str | None
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every program of a study, (name, what counts it): "llava, prefill, 16 frames, FLOPs"; the
    ViT's is that of one frame.

    Args:
      chip: "v5p" and the like, for bytes; None: FLOPs alone.
    """
    yield "encode, 1 frames, FLOPs", partial(counted_flops, cfg, "encode", 1, text)
    for what, number, (kind, model) in itertools.product(WHATS, frames, counterparts(cfg).items()):
        yield (
            f"{kind}, {what}, {number} frames, FLOPs",
            partial(counted_flops, model, what, number, text),
        )
        if chip:
            yield (
                f"{kind}, {what}, {number} frames, bytes",
                partial(counted_bytes, model, what, number, text, chip),
            )
