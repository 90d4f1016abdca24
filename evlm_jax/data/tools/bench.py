"""`evlm data bench`: how fast a configuration's data are read, packed and decoded, and how full its
rows are.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

from evlm_jax.config import DataConfig, EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.mixture import tasks
from evlm_jax.data.pack import Budget, Packer, assemble, fill, pack_image_group, used
from evlm_jax.data.samples import SampleError
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import Document

WINDOWS = (1, 4, 16, 64, 256)
GROUP = 5  # rows that are tried
PADDING = 0.1  # of the image slots: more is worth another data.slots


def rows_of(documents: Sequence[Document], data: DataConfig) -> list[list[Document]]:
    """Rows of a finite stream, in whole image groups, but those of the last window, which is not
    filled up again.
    """
    packer, rows = Packer(documents, data), []
    while packer.next < len(documents):
        rows += [
            [document for _, document in row]
            for row in pack_image_group([packer] * data.image_group, data)
        ]
    return rows


def natural_images(rows: Sequence[Sequence[Document]], data: DataConfig) -> float:
    """Images of a row if all positions were used."""
    tokens, images, *_ = used(rows)
    return float(images / tokens * data.length)


def line(name: str, documents: Sequence[Document], data: DataConfig) -> str:
    """A line of the table: fill of each budget, rows a second of one core, documents and images a
    row.
    """
    return timed(name, lambda: rows_of(documents, data), data)


def timed(name: str, pack: Callable[[], list[list[Document]]], data: DataConfig) -> str:
    """`line`, of the rows that `pack` makes."""
    begin = time.process_time()
    rows = pack()
    rate = len(rows) / (time.process_time() - begin)
    full = fill(rows, data)
    shares = "".join(f"{100 * full[budget]:{len(budget) + 4}.1f}" for budget in Budget._fields)
    return (
        f"{name:24}{shares}{sum(map(len, rows)) / len(rows):12.1f}"
        f"{natural_images(rows, data):10.1f}{rate:10.0f}"
    )


def head(title: str) -> str:
    """Names of the columns of `line`."""
    return (
        f"{title:24}"
        + "".join(f"{name + ' %':>{len(name) + 4}}" for name in Budget._fields)
        + f"{'docs/row':>12}{'images*':>10}{'rows/s':>10}"
    )


def image_groups_of(
    rows: Sequence[Sequence[Document]], data: DataConfig
) -> list[Sequence[Sequence[Document]]]:
    """The rows of each image group."""
    return [
        rows[first : first + data.image_group] for first in range(0, len(rows), data.image_group)
    ]


FOOT = (
    "images*: of a row if all its positions were used. Image slots that are not used are padding"
    " that the ViT computes."
)


def report(documents: Sequence[Document], data: DataConfig) -> list[str]:
    """The table of a stream: as configured, by window, and what to do about padding in the image
    slots.
    """
    lines = [
        head("window"),
        *(
            line(str(window), documents, replace(data, window=window))
            for window in sorted({*WINDOWS, data.window})
        ),
    ]
    rows = rows_of(documents, data)
    padding, natural = 1 - fill(rows, data)["images"], natural_images(rows, data)
    lines.append(
        f"data.slots = {data.slots}, of {data.image_group} rows: {100 * padding:.1f}% of the ViT's"
        " images are padding"
    )
    if padding > PADDING and natural:
        most = max(len(document.refs) for document in documents)
        for rows in sorted({data.image_group, GROUP}):
            slots = max(math.ceil(natural * rows), most)
            if slots < data.slots * rows / data.image_group:
                pairs = max(slots, data.block_pairs * rows // data.image_group)
                fewer = replace(
                    data,
                    image_group=rows,
                    slots=slots,
                    images=slots if rows == 1 else min(data.images, slots),
                    block_pairs=pairs,
                )
                lines.append(
                    line(f"data.image_group = {rows} slots = {slots}", documents, fewer)
                    + "   less padding"
                )
    return [*lines, FOOT]


def bench(cfg: EVLMConfig, tokenizer, count: int) -> str:
    """The report of `count` documents of each task of `cfg`, read as lane 0 of one would read them.

    Speeds are of processor time.
    """
    lines = []
    for task in tasks([open_source(name) for name in cfg.data.sources], tokenizer, cfg):
        lines.append(f"task {task.name}" if task.name else "all sources")
        documents, rate = _tried(lambda i, task=task: task.documents[i], range(count))
        lines.append(rate("documents/s read and tokenised"))
        rows = rows_of(documents, cfg.data)
        if not rows:
            raise ValueError(
                f"{count} documents fill no row beyond the window of {cfg.data.window}: give a"
                " greater --documents"
            )
        _, rate = _tried(
            lambda rows: assemble(rows, cfg),
            image_groups_of(rows, cfg.data)[:64],
            cfg.data.image_group,
        )
        lines.append(rate("rows/s assembled"))
        refs = list(islice((ref for row in rows for document in row for ref in document.refs), 128))
        if refs:
            _, rate = _tried(lambda ref: image.pixels([ref], cfg), refs)
            lines.append(
                rate(f"images/s decoded and resized to {' x '.join(map(str, cfg.vit.size))}")
            )
        lines += report(documents, cfg.data)
    return "\n".join(lines)


def _tried(work: Callable, items: Iterable, size: int = 1) -> tuple[list, Callable[[str], str]]:
    """What `work` makes of each, and a line about its speed: how many a second, each of `size`, and
    what could not be done.
    """
    made, failed, begin = [], Counter(), time.process_time()
    for item in items:
        try:
            made.append(work(item))
        except SampleError:
            failed["bad row"] += 1
        except image.ImageError:
            failed["unreadable image"] += 1
    rate = (len(made) + failed.total()) * size / (time.process_time() - begin)
    lost = (
        "; left out: " + ", ".join(f"{cause} {count}" for cause, count in failed.items())
        if failed
        else ""
    )
    return made, lambda unit: f"{rate:10.0f} {unit}{lost}"
