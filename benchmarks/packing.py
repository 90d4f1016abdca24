"""How full rows are, and how fast they are packed: `python -m benchmarks.packing`. `evlm data bench` tells the same of real data.

Documents are made: lengths and images like those of captions, web pages, instructions and plain text. Padding of the image slots is
what the ViT computes in vain. Rows a second are of one core's processor time, tokenising and decoding excluded; "assembled" is with all
arrays of a Batch but the pictures.
"""

import argparse
import time
from dataclasses import replace

import numpy as np

from evlm_jax.cli import load_config
from evlm_jax.config import DataConfig, EVLMConfig
from evlm_jax.data.pack import assemble
from evlm_jax.data.text import Document
from evlm_jax.data.tools.bench import FOOT, WINDOWS, head, line, rows_of
from evlm_jax.ops.grouping import pair_count

MEDIA, TILE = 16, 32


def _log(median: float, spread: float, most: int):
    return lambda rng: int(min(most, 2 + rng.lognormal(np.log(median), spread)))


# kind -> (text tokens, images) of a document, drawn
DISTRIBUTIONS = {
    "captions": (_log(26, 0.6, 400), lambda rng: 1),
    "web pages": (_log(330, 0.6, 1000), lambda rng: min(30, int(rng.geometric(1 / 5)) + 1)),
    "instructions": (_log(140, 0.8, 1900), lambda rng: 1),
    "questions": (_log(72, 0.8, 1900), lambda rng: 1),
    "boxes": (_log(72, 0.5, 1900), lambda rng: 1),
    "pages to read": (_log(146, 0.9, 1900), lambda rng: 1),
    "plain text": (_log(500, 0.8, 1900), lambda rng: 0),
}
STAGES = {  # shares of samples (paper, section 3)
    "pretrain": {"captions": 2500, "web pages": 50},
    "continual": {"captions": 30, "questions": 9, "boxes": 17, "pages to read": 26, "plain text": 10},
    "sft": {"instructions": 815, "pages to read": 270, "questions": 1200},
}


def document(tokens: int, images: int) -> Document:
    """One of these costs: images in front, each seen by its share of the text. Contents do not matter."""
    length = MEDIA * images + tokens
    at, zeros = np.arange(length, dtype=np.int32), np.zeros(length, np.int32)
    start = np.minimum(at // max(1, length // max(images, 1)), max(images - 1, 0)).astype(np.int32)
    stop = start + 1 if images else start
    targets = np.arange(MEDIA * images, length - 1, dtype=np.int32)
    seen = np.full(length, length, np.int32)
    place = (zeros, at, seen, zeros - 1, start, stop)
    return Document(*place, targets, targets * 0, targets * 0, (None,) * images, "k", "made", pair_count(start, stop, TILE))


def stream(shares: dict[str, float], count: int, seed: int = 0) -> list[Document]:
    """`count` documents of a mixture."""
    rng, kinds = np.random.default_rng(seed), list(shares)
    weights = np.array([shares[kind] for kind in kinds], float)
    drawn = rng.choice(len(kinds), count, p=weights / weights.sum())
    return [document(*(draw(rng) for draw in DISTRIBUTIONS[kinds[kind]])) for kind in drawn]


def assembled(documents: list[Document], data: DataConfig, cfg: EVLMConfig) -> float:
    """Rows a second, packed and assembled."""
    begin = time.process_time()
    rows = rows_of(documents, data)
    for row in rows:
        assemble([row], cfg)
    return len(rows) / (time.process_time() - begin)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=4000)
    count = parser.parse_args().documents
    configs = {stage: load_config(f"experiments/evlm_14b.py:{stage}") for stage in STAGES}
    kinds = {**{kind: ("pretrain", {kind: 1}) for kind in DISTRIBUTIONS}, **{f"stage {stage}": (stage, STAGES[stage]) for stage in STAGES}}
    print(head("as configured"))
    for name, (stage, shares) in kinds.items():
        print(line(name, stream(shares, count), configs[stage].data))
    for name, shares in (("captions", {"captions": 1}), ("instructions", {"instructions": 1}), ("web pages", {"web pages": 1})):
        print("\n" + head(f"{name}, by window"))
        for window in WINDOWS:
            print(line(str(window), stream(shares, count), replace(configs["pretrain"].data, window=window)))
    for stage, budgets in (("pretrain", (64, 48, 44, 40)), ("continual", (64, 16, 12, 11)), ("sft", (64, 16, 12, 11))):
        print("\n" + head(f"{stage}, by data.images"))
        for images in budgets:
            print(line(str(images), stream(STAGES[stage], count), replace(configs[stage].data, images=images, pairs=64 + images)))
    for stage, cfg in configs.items():
        print(f"\n{stage}: {assembled(stream(STAGES[stage], count), cfg.data, cfg):.0f} rows/s packed and assembled", end="")
    print("\n" + FOOT)


if __name__ == "__main__":
    main()
