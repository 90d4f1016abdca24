"""Arguments of `evlm flops`; the command line reads them without what the command needs."""

import argparse

from evlm_jax.config.load import CONFIG_HELP
from evlm_jax.config.ranges import Count, Positive, argument


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evlm costs`."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument(
        "--frames",
        default="1,4,16,64,256,1024",
        help="numbers of frames, each an image of its own for the ViT",
    )
    parser.add_argument(
        "--text", type=argument(Count), default=64, help="text tokens behind the frames"
    )
    parser.add_argument(
        "--context",
        type=argument(Positive),
        help=(
            "tokens that the language model is made for; llm.dynamic_ntk or data.length where"
            " left out"
        ),
    )
    parser.add_argument(
        "--chip",
        help="count bytes too, by the compiler of this chip: v5p, v6e, ... (it runs without one)",
    )
    parser.add_argument(
        "--measure",
        type=argument(Positive),
        nargs="?",
        const=16,
        metavar="FRAMES",
        help="run the real towers here, up to so many frames (16)",
    )
    parser.add_argument("--json", help="file to write the numbers to")
