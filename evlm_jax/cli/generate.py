"""`evlm generate`: its arguments, and what it does."""

import argparse
import os

from evlm_jax.config.ranges import (
    Answers,
    Count,
    NewTokens,
    NonNegative,
    PositiveFloat,
    PositiveShare,
    Seed,
    Share,
    argument,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all arguments; the options of sampling do what transformers' of the same names do."""
    parser.add_argument(
        "--checkpoint", required=True, help="directory of a training run, or of an import"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        type=_text,
        help="question; images stand in front of it, or at <image> markers",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=os.path.expanduser,
        help="may be given several times",
    )
    parser.add_argument(
        "--video", type=os.path.expanduser, help="a clip whose frames are seen together"
    )
    parser.add_argument(
        "--frames",
        help="of the video: a number, evenly spread, or a rate, as 2fps; 16 where left out",
    )
    parser.add_argument(
        "--max-new-tokens", type=argument(NewTokens), default=64, help="most tokens of an answer"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        type=_stop,
        help="text that ends the answer; may be given several times",
    )
    parser.add_argument(
        "--answers", type=argument(Answers), default=1, help="how many; several need a temperature"
    )
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling."""
    parser.add_argument(
        "--temperature",
        type=argument(NonNegative),
        default=0.0,
        help="0 is greedy; the next three need more",
    )
    parser.add_argument(
        "--top-k",
        type=argument(Count),
        default=0,
        help="draw from so many best tokens; 0: from all",
    )
    parser.add_argument(
        "--top-p",
        type=argument(PositiveShare),
        default=1.0,
        help="draw from the best tokens with this probability",
    )
    parser.add_argument(
        "--min-p",
        type=argument(Share),
        default=0.0,
        help="draw from tokens with this share of the best one's probability",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=argument(PositiveFloat),
        default=1.0,
        help="above 1: against tokens that were there",
    )
    parser.add_argument("--seed", type=argument(Seed), default=0, help="of the draws")


def sampling(args: argparse.Namespace) -> dict:
    """What `add_sampling` read, as options of Generator.generate.

    Raises ValueError for one that says nothing.
    """
    if not args.temperature and (args.top_k or args.top_p < 1 or args.min_p):
        raise ValueError(
            "--top-k, --top-p and --min-p are of draws: give a --temperature, or leave them out"
        )
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(args, name) for name in names}


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"is not UTF-8: {error}") from error
    return text


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text ends every answer; leave it out")
    return _text(text)


def run(args: argparse.Namespace) -> None:
    """Prints the answer as it grows, or several with their numbers. Images come first, then the
    video; in front of the prompt or at its markers."""
    from evlm_jax.data import image, video
    from evlm_jax.data.formats import captions
    from evlm_jax.data.samples import ImageRef, Turn, marked
    from evlm_jax.generate import Generator
    from evlm_jax.runs import load_trained

    if args.frames and not args.video:
        raise ValueError(f"--frames {args.frames} is of a video: give --video, or leave it out")
    for path in args.image:
        image.decode(path)  # what is wrong with it is said before a model is loaded
    visuals = [(ImageRef(path),) for path in args.image]
    if args.video:
        visuals.append(video.sample(args.video, args.frames or captions.FRAMES))
    prompt = marked([args.prompt], len(visuals))
    options = sampling(args) | {
        "num_return_sequences": args.answers,
        "stop_strings": args.stop,
    }
    if args.answers > 1 and not args.temperature:
        raise ValueError(
            f"--answers {args.answers}: at temperature 0 all answers are the same; give a"
            " --temperature"
        )
    generator = Generator(*load_trained(args.checkpoint)[:2])  # the model itself is let go
    prompt = generator.prompt([Turn("user", *prompt)], visuals)
    if args.answers > 1:
        answers = generator.generate([prompt], args.max_new_tokens, **options)
        print(*(f"{number}. {answer.text}" for number, answer in enumerate(answers, 1)), sep="\n")
        return
    generator.generate(
        [prompt],
        args.max_new_tokens,
        **options,
        callback=lambda _, piece: print(piece, end="", flush=True),
    )
    print()
