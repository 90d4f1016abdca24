"""`evlm flops`: what a config's EVLM costs beside LLaVA's and Flamingo's way of showing images to
the same towers.
"""

import argparse
from collections.abc import Callable

from evlm_jax.costs import formula
from evlm_jax.costs.counted import count
from evlm_jax.costs.measure import measure
from evlm_jax.costs.study import study
from evlm_jax.costs.summary import summary
from evlm_jax.costs.tables import Table, tables
from evlm_jax.evals.results import save
from evlm_jax.planning.text import table


def run(args: argparse.Namespace, overrides: list[str], load_config: Callable) -> None:
    """Counts and prints the costs, and saves them where a file is given. Raises ValueError for
    frames that are no numbers.
    """
    cfg = load_config(args.config, overrides)
    try:
        frames = sorted({int(n) for n in args.frames.split(",")})
    except ValueError:
        frames = []
    if not frames or frames[0] < 1 or args.text < 1:
        raise ValueError(
            f"--frames {args.frames}, --text {args.text}: give positive whole numbers, frames as"
            " 1,4,16"
        )
    # Measured first: the planner makes this process one that looks for no accelerator.
    measured = (
        {"measured": measure(cfg, [n for n in frames if n <= args.measure], args.text)}
        if args.measure
        else {}
    )
    found = (
        study(
            cfg,
            frames,
            args.text,
            args.chip,
            count(cfg, frames, args.text, args.chip),
            args.context,
        )
        | measured
    )
    for one in [published(), *tables(found)]:
        print("", one.title, one.says, "", *table(one.head, one.rows), sep="\n")
    print("", *summary(found), sep="\n")
    if args.json:
        save(args.json, {"formula": formula.rows(), "configs": {cfg.name: found}})


def published() -> Table:
    """The paper's formula."""
    rows = [
        (
            f"{r['images']:,}",
            str(r["text"]),
            str(r["published"]),
            f"{r['formula']:.4f}",
            f"{r['without media tokens']:.4f}",
        )
        for r in formula.rows()
    ]
    says = (
        "One layer at the paper's widths: cross-attention by full attention (arXiv 2407.14177,"
        " section 2). The ViT is left out."
    )
    return Table(
        "The paper's S",
        says,
        ("visual tokens", "text tokens", "published", "its formula", "without the 16 media tokens"),
        rows,
    )
