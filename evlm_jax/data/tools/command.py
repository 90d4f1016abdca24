"""`evlm data ACTION`: its arguments, and what each calls."""

import argparse
import os
from collections.abc import Callable

from evlm_jax.config.load import CONFIG_HELP
from evlm_jax.config.ranges import Count, Positive, argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of all actions."""
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="inspect|stats|bench|build"
    )

    def add(name, text):
        return actions.add_parser(name, help=text, description=text)

    look = add(
        "inspect",
        "a page that shows rows as the model will see them: pictures, tokens, what is learned,"
        " masks",
    )
    look.add_argument("--out", default="inspect.html", help="the page, with everything inside it")
    look.add_argument(
        "--rows", type=argument(Positive), default=4, help="rows of the first step that are shown"
    )
    look.add_argument("--picture", help="PNG to write of these rows, without masks")
    count = add("stats", "lengths, pictures and drops of each source")
    count.add_argument(
        "--samples",
        type=argument(Count),
        default=1000,
        help="of each source, drawn at random; 0: all",
    )
    speed = add(
        "bench",
        "how full rows are, by packing window, and how fast data are read, packed and decoded",
    )
    speed.add_argument("--documents", type=argument(Positive), default=4000, help="of each task")
    make = add(
        "build", "write a source as shards that are read fast, cleaned and with smaller pictures"
    )
    make.add_argument(
        "--source", help="as in data.sources; where left out, the only one of the configuration"
    )
    make.add_argument("--out", required=True, help="folder; a build that was killed in it goes on")
    make.add_argument(
        "--rules", choices=("captions", "documents", "none"), default="none", help="of config.clean"
    )
    make.add_argument(
        "--format", choices=("tar", "array_record"), default="tar", help="of the shards"
    )
    make.add_argument(
        "--side",
        type=argument(Positive),
        help="greatest shorter side of a picture, in pixels; left out, that of vit.image_size",
    )
    make.add_argument(
        "--shard",
        type=argument(Positive),
        default=1000,
        help="samples of the source that a shard is made of",
    )
    make.add_argument(
        "--workers", type=argument(Positive), default=os.cpu_count(), help="processes"
    )
    for action in (look, count, speed, make):
        action.add_argument("config", help=CONFIG_HELP)


def run(args: argparse.Namespace, overrides: list[str], load_config: Callable) -> None:
    """Does what the arguments say."""
    cfg = load_config(args.config, overrides)
    if not cfg.data.sources and not getattr(args, "source", None):
        raise ValueError(
            "config: data.sources is empty: --config.data.sources=\"('KIND:PATH',)\""
            " --config.data.weights='(1.0,)'"
        )
    if args.action == "build":
        from evlm_jax.data.tools.build import Job, build

        if not args.source and len(cfg.data.sources) > 1:
            raise ValueError(f"--source: give one of {', '.join(cfg.data.sources)}")
        source = args.source or cfg.data.sources[0]
        print(
            build(
                Job(
                    cfg,
                    source,
                    args.out,
                    args.rules,
                    args.format,
                    args.side or min(cfg.vit.size),
                    args.shard,
                ),
                args.workers,
            )
        )
        return
    from evlm_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.init.llm)
    if args.action == "inspect":
        from evlm_jax.data.tools.inspect import inspect

        print(f"wrote {inspect(cfg, tokenizer, args.out, args.rows, args.picture)}")
    elif args.action == "stats":
        from evlm_jax.data.tools.stats import stats

        print(stats(cfg, tokenizer, args.samples))
    else:
        from evlm_jax.data.tools.bench import bench

        print(bench(cfg, tokenizer, args.documents))
