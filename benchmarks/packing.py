"""How full rows are, and how fast they are packed: `python -m benchmarks.packing`.
`evlm data bench` tells the same of real data.

Documents are made: lengths and images like those of captions, web pages, instructions and plain
text. Padding of the image slots is what the ViT computes in vain. Rows a second are of one core's
processor time, tokenising and decoding excluded; "assembled" is with all arrays of a Batch but the
pictures."""

import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks import parser
from evlm_jax.config import DataConfig, EVLMConfig
from evlm_jax.config.load import load_config
from evlm_jax.data.mixture import Task
from evlm_jax.data.pack import assemble
from evlm_jax.data.pipeline import Lane
from evlm_jax.data.text import Document
from evlm_jax.data.tools.bench import FOOT, WINDOWS, head, image_groups_of, line, rows_of, timed
from evlm_jax.ops.attention_plan import block_pair_count

MEDIA, BLOCK = 16, 32


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
    "continual": {
        "captions": 30,
        "questions": 9,
        "boxes": 17,
        "pages to read": 26,
        "plain text": 10,
    },
    "sft": {"instructions": 815, "pages to read": 270, "questions": 1200},
}

BUDGETS = {  # data.images, data.image_group, data.slots
    "pretrain": ((64, 1, 64), (42, 1, 42), (64, 2, 84), (64, 5, 200), (64, 5, 208)),
    "continual": ((64, 1, 64), (12, 1, 12), (24, 2, 24), (48, 5, 52), (48, 5, 56)),
    "sft": ((64, 1, 64), (12, 1, 12), (13, 1, 13), (26, 2, 26)),
}


def document(tokens: int, images: int) -> Document:
    """One of these costs: images in front, each seen by its share of the text.

    Contents do not matter.
    """
    length = MEDIA * images + tokens
    at, zeros = np.arange(length, dtype=np.int32), np.zeros(length, np.int32)
    start = np.minimum(at // max(1, length // max(images, 1)), max(images - 1, 0)).astype(np.int32)
    stop = start + 1 if images else start
    targets = np.arange(MEDIA * images, length - 1, dtype=np.int32)
    seen = np.full(length, length, np.int32)
    place = (zeros, at, seen, zeros - 1, start, stop)
    return Document(
        *place,
        targets,
        targets * 0,
        targets * 0,
        (None,) * images,
        "k",
        "made",
        block_pair_count(start, stop, BLOCK),
    )


def stream(shares: dict[str, float], count: int, seed: int = 0) -> list[Document]:
    """`count` documents of a mixture."""
    rng, kinds = np.random.default_rng(seed), list(shares)
    weights = np.array([shares[kind] for kind in kinds], float)
    drawn = rng.choice(len(kinds), count, p=weights / weights.sum())
    made = [document(*(draw(rng) for draw in DISTRIBUTIONS[kinds[kind]])) for kind in drawn]
    return [each._replace(key=str(number)) for number, each in enumerate(made)]


class Endless(list):
    """Documents without an end, as of data/mixture.py."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Document:
        return super().__getitem__(index % super().__len__())


def made_tasks(shares: dict[str, float], count: int) -> list[Task]:
    """A task for each kind."""
    return [
        Task(kind, share / sum(shares.values()), Endless(stream({kind: 1}, count)))
        for kind, share in shares.items()
    ]


def by_task(made: list[Task], count: int, cfg: EVLMConfig) -> list[list[Document]]:
    """Rows of `count` documents or more, each row of one kind."""
    lane, rows = (
        Lane(made, replace(cfg, train=replace(cfg.train, batch=cfg.data.image_group)), 0),
        [],
    )
    while sum(map(len, rows)) < count:
        rows += lane.rows()
    return rows


def assembled(documents: list[Document], cfg: EVLMConfig) -> float:
    """Rows a second, packed and assembled."""
    begin = time.process_time()
    rows = rows_of(documents, cfg.data)
    for group in image_groups_of(rows, cfg.data):
        assemble(group, cfg)
    return len(rows) / (time.process_time() - begin)


def with_slots(data: DataConfig, images: int, group: int, slots: int) -> DataConfig:
    """Other image slots, and pairs for any text without videos."""
    return replace(
        data,
        images=images,
        image_group=group,
        slots=slots,
        block_pairs=-(-data.length // BLOCK) * group + slots,
    )


def main() -> None:
    """Measures and prints."""
    asked = parser(__doc__)
    asked.add_argument("--documents", type=int, default=12_000)
    args = asked.parse_args()
    count = 60 if args.smoke else args.documents
    configs = {stage: load_config(f"experiments/evlm_14b.py:{stage}") for stage in STAGES}
    kinds = {
        **{kind: ("pretrain", {kind: 1}) for kind in DISTRIBUTIONS},
        **{f"stage {stage}": (stage, STAGES[stage]) for stage in STAGES},
    }
    print(head("as configured"))
    for name, (stage, shares) in kinds.items():
        print(line(name, stream(shares, count), configs[stage].data))
    for name, shares in (
        ("captions", {"captions": 1}),
        ("instructions", {"instructions": 1}),
        ("web pages", {"web pages": 1}),
    ):
        print("\n" + head(f"{name}, by window"))
        for window in WINDOWS:
            print(
                line(
                    str(window),
                    stream(shares, count),
                    replace(configs["pretrain"].data, window=window),
                )
            )
    for stage, budgets in BUDGETS.items():
        print("\n" + head(f"{stage}, images/image_group/slots"))
        documents, made = stream(STAGES[stage], count), made_tasks(STAGES[stage], count)
        for budget in budgets:
            cfg = replace(configs[stage], data=with_slots(configs[stage].data, *budget))
            name = "/".join(map(str, budget))
            print(line(f"{name} mixed", documents, cfg.data))
            print(timed(f"{name} by task", partial(by_task, made, count, cfg), cfg.data))
    for stage, cfg in configs.items():
        print(
            f"\n{stage}: {assembled(stream(STAGES[stage], count), cfg):.0f} rows/s packed and"
            " assembled",
            end="",
        )
    print("\n" + FOOT)


if __name__ == "__main__":
    main()
