"""Side-by-side measurements against peers.

They may need torch, transformers or llama.cpp; the package never does.
"""

import argparse


def parser(doc: str) -> argparse.ArgumentParser:
    """Of a benchmark, which is its module's `doc`.

    Every one has --smoke, which tests run: does it still work?
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--smoke",
        action="store_true",
        help="the smallest sizes, once, without peers, in seconds: to see that it runs",
    )
    return made
