"""Arguments of `evlm plan`; the command line reads them without what the command needs."""

import argparse

from evlm_jax.config.load import CONFIG_HELP
from evlm_jax.config.ranges import Count, NonNegative, Positive, argument


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evlm plan`."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument(
        "--topology", required=True, help="v5p:4x4x4, v6e:16x16, h100:8, cpu:8 and the like"
    )
    parser.add_argument("--mesh", default="", help="fields of config.mesh: data=1,fsdp=32,tensor=2")
    parser.add_argument("--global-batch", type=argument(Positive), help="train.batch")
    parser.add_argument("--remat", help="train.remat")
    parser.add_argument(
        "--what",
        choices=("train", "eval", "prefill", "read", "decode", "encode"),
        default="train",
        help="the program; of generation, prefill with the keys of all images, or read: text alone",
    )
    parser.add_argument(
        "--video",
        action="store_true",
        help="a row's images are frames that its text sees together, not pictures that it passes",
    )
    parser.add_argument(
        "--phase", type=argument(Count), default=0, help="of training: what is trained"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="try meshes and remat policies, and rank them"
    )
    parser.add_argument(
        "--no-mend",
        action="store_true",
        help="where it does not fit, look for no change that makes it",
    )
    parser.add_argument("--price", type=argument(NonNegative), help="of a chip-hour")
    parser.add_argument("--json", help="file to write the report to")
    parser.add_argument("--hlo", help="file to write the optimised program to")
