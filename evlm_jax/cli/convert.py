"""`evlm convert`: its arguments, and what it does."""

import argparse
from typing import get_args, get_type_hints

from evlm_jax.config.load import CONFIG_HELP, load_config
from evlm_jax.config.model import TOWER_MATRICES, QuantConfig
from evlm_jax.config.ranges import Count, NonNegative, Positive, argument
from evlm_jax.config.schema import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the actions."""
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="import|export|merge|adapt|quantize|verify|families"
    )
    read = actions.add_parser(
        "import", help="foreign towers, or an export of ours, to a checkpoint"
    )
    read.add_argument("--config", required=True, help=CONFIG_HELP)
    read.add_argument(
        "--vision", help="vision tower: an asset, a directory or a file; init.vision where left out"
    )
    read.add_argument("--llm", help="language model, likewise; init.llm where left out")
    read.add_argument(
        "--model",
        help="instead of the two: a directory that `evlm convert export --format hf` wrote, or of"
        " IDEFICS or Llama 3.2 Vision; or beside them: open_flamingo's checkpoint",
    )
    read.add_argument(
        "--out", required=True, help="new directory; start training from it with --init"
    )
    _export_arguments(actions.add_parser("export", help="a checkpoint to PyTorch"))
    merge = actions.add_parser(
        "merge", help="adapters into the matrices that they stand beside, quantised ones to float32"
    )
    _source_arguments(merge)
    merge.add_argument("--out", required=True, help="new directory, a model without adapters")
    adapt = actions.add_parser(
        "adapt", help="adapters in PEFT's format, beside a checkpoint's matrices"
    )
    _source_arguments(adapt)
    adapt.add_argument(
        "--adapter", required=True, help="directory with adapter_config.json, as PEFT writes it"
    )
    adapt.add_argument("--out", required=True, help="new directory, a model with these adapters")
    _quantize_arguments(
        actions.add_parser(
            "quantize", help="a checkpoint's matrices in 8 or 4 bits, with a receipt"
        )
    )
    _verify_arguments(
        actions.add_parser(
            "verify",
            help="whether two models compute the same, and where they part; exit status 1 if not",
        )
    )
    actions.add_parser(
        "families",
        help="what is read and written: files, models, and which are refused by name",
    )


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="directory of a training run, or of an import"
    )
    parser.add_argument("--step", type=argument(Count), help="the newest where left out")


def _export_arguments(write: argparse.ArgumentParser) -> None:
    _source_arguments(write)
    write.add_argument(
        "--format",
        choices=("hf", "torch", "openflamingo", "idefics", "mllama", "llm", "peft", "peft-llm"),
        default="hf",
        help="of what is written",
    )
    write.add_argument(
        "--without-adapters",
        action="store_true",
        help="the model without them, which `--format peft` and `peft-llm` fit, not merged",
    )
    write.add_argument("--out", required=True, help="new directory")


def _quantize_arguments(made: argparse.ArgumentParser) -> None:
    _source_arguments(made)
    usual = QuantConfig()
    made.add_argument(
        "--kind",
        choices=get_args(get_type_hints(QuantConfig)["kind"]),
        default=usual.kind,
        help="of the numbers (default: %(default)s)",
    )
    made.add_argument(
        "--pattern",
        action="append",
        default=[],
        help="regular expression, searched in names as llm/layers/0/attn/q/kernel, of what is"
        " quantised; may be given several times, and is all of the towers where left out",
    )
    made.add_argument(
        "--int8",
        action="append",
        default=[],
        metavar="PATTERN",
        help="likewise, of what is held in int8 whatever --kind is, as '^llm/(embed|head)'",
    )
    made.add_argument(
        "--tile", type=argument(Positive), default=usual.tile, help="values that share a scale"
    )
    made.add_argument(
        "--calibrate",
        type=argument(Positive),
        default=0,
        metavar="ROWS",
        help="of the run's training data, on whose activations GPTQ rounds: its sources must be"
        " there; left out, each value is rounded by itself",
    )
    made.add_argument(
        "--without-logits",
        action="store_true",
        help="a receipt of the matrices alone, for which no model is run",
    )
    made.add_argument("--out", required=True, help="new directory, a model with less bytes")


def _verify_arguments(same: argparse.ArgumentParser) -> None:
    for side in "AB":
        same.add_argument(side, help="directory of a run or an import, or a Hugging Face directory")
    same.add_argument(
        "--image",
        action="append",
        default=[],
        help="seen by every prompt; with --prompt, in place of the built-in ones",
    )
    same.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="images stand in front of it, or at <image> markers",
    )
    same.add_argument(
        "--tolerance",
        type=argument(NonNegative),
        default=1e-3,
        help="of differences, relative to magnitudes",
    )
    same.add_argument(
        "--folder-code",
        action="store_true",
        help="run the Python code of a Hugging Face directory; without it none runs",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> int | None:
    """Does the action; returns the exit status."""
    if args.action == "export":
        from evlm_jax.convert import export

        adapters = not args.without_adapters
        return export.export(args.checkpoint, args.out, args.format, args.step, adapters)
    if args.action == "merge":
        from evlm_jax.convert.merge import merge_run

        return merge_run(args.checkpoint, args.out, args.step)
    if args.action == "adapt":
        from evlm_jax.convert.peft import adapt_run

        return adapt_run(args.checkpoint, args.adapter, args.out, args.step)
    if args.action == "quantize":
        from evlm_jax.convert.quantize import quantize_run

        fields = {"kind": args.kind, "tile": args.tile, "int8": args.int8}
        how = build(QuantConfig, fields | {"patterns": args.pattern or TOWER_MATRICES}, "quant")
        logits = not args.without_logits
        return quantize_run(args.checkpoint, how, args.out, args.step, logits, args.calibrate)
    if args.action == "verify":
        from evlm_jax.convert.verify import verify

        return (
            0
            if verify(args.A, args.B, args.image, args.prompt, args.tolerance, args.folder_code)
            else 1
        )
    if args.action == "families":
        from evlm_jax.convert.listing import listing

        return print(listing(), end="")
    from evlm_jax.convert import importer

    towers = {"vision": args.vision, "llm": args.llm}
    cfg = load_config(
        args.config,
        [
            *(f"--config.init.{tower}={where}" for tower, where in towers.items() if where),
            *overrides,
        ],
    )
    return (
        importer.import_model(cfg, args.model, args.out)
        if args.model
        else importer.import_towers(cfg, args.out)
    )
