"""Arguments of `evlm eval` and `evlm score`; the command line reads them without what the commands
need.
"""

import argparse
import os

from evlm_jax.config.ranges import Positive, argument
from evlm_jax.evals.task import STYLES


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evlm eval`."""
    parser.add_argument(
        "--checkpoint", required=True, help="directory of a training run, or of an import"
    )
    parser.add_argument(
        "--task",
        required=True,
        help="vqav2, gqa, easy-vqa, ...; a name that is none is answered with all of them",
    )
    parser.add_argument(
        "--data",
        type=os.path.expanduser,
        help=(
            "where its official files are; docs/evaluation.md says which, as does the top of"
            " evlm_jax/evals/tasks/FAMILY.py"
        ),
    )
    parser.add_argument("--split", help="the usual one where left out")
    parser.add_argument("--prompt", choices=STYLES, default=STYLES[0], help="whose prompts")
    parser.add_argument(
        "--limit",
        type=argument(Positive),
        help="the first questions only, and all others about the same images",
    )
    parser.add_argument(
        "--batch",
        type=argument(Positive),
        default=8,
        help="questions answered together; shared among the devices",
    )
    parser.add_argument(
        "--mesh",
        default="",
        help="fields of config.mesh: tensor=4,frozen=sharded; else each device has it all",
    )
    parser.add_argument(
        "--out",
        help=(
            "result file; default: CHECKPOINT/evals/TASK-SPLIT.json. Predictions stand beside it,"
            " in .jsonl"
        ),
    )
    _add_judge(parser)


def add_score(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evlm score`."""
    parser.add_argument(
        "results", help="result file of `evlm eval`; its scores are computed again and saved"
    )
    parser.add_argument(
        "--against", help="another result file on the same questions, for a paired test"
    )
    _add_judge(parser)


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge",
        help="of free text: https://HOST/v1 of an OpenAI-compatible endpoint, or module:function",
    )
    parser.add_argument("--judge-model", default="", help="of the endpoint")
