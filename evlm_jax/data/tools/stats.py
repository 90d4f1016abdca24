"""`evlm data stats`: what the sources of a configuration hold, from samples drawn at random."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from evlm_jax.config import EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.cut import encode_parts
from evlm_jax.data.pack import Budget, Drop, fill, unfit
from evlm_jax.data.samples import SampleError, part, part_count
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import Document
from evlm_jax.data.tools.bench import rows_of

BARS = " ▁▂▃▄▅▆▇█"
BINS = 40
PICTURES = 200  # that are decoded, of each source


def stats(cfg: EVLMConfig, tokenizer, count: int) -> str:
    """A chapter for each source. `count` samples of each are looked at, all for 0."""
    return "\n\n".join(_source(name, cfg, tokenizer, count) for name in cfg.data.sources)


def _source(name: str, cfg: EVLMConfig, tokenizer, count: int) -> str:
    source = open_source(name)
    rng = np.random.default_rng(cfg.data.seed)
    numbers = rng.permutation(len(source))[: count or None]
    documents, drops = [], []
    for number in numbers.tolist():
        made, lost = _documents(source, number, cfg, tokenizer)
        documents += made
        drops += lost
    lines = [
        name,
        f"{len(source)} samples, {sum(source.dialog_counts())} dialogs; looked at: {len(numbers)}",
    ]
    cut = sum(document.parts > 1 for document in documents)
    lines.append(
        f"{len(documents)} documents of them fit a row"
        + (f", {cut} are parts of longer ones" if cut else "")
    )
    if documents:
        lines.append(
            f"{'a document has':16}{'mean':>8}{'5%':>7}{'half':>7}{'95%':>7}{'most':>7}   from the"
            " least to the most"
        )
        needs = np.array([Budget.needed(document) for document in documents])
        lines += [plot(name, values) for name, values in zip(Budget._fields, needs.T)]
        lines += _pictures(documents, drops)
    if rows := rows_of(documents, cfg.data):
        lines.append(
            "fill of rows: "
            + ", ".join(
                f"{budget} {100 * share:.1f}%" for budget, share in fill(rows, cfg.data).items()
            )
        )
    first = {drop.cause: drop.message for drop in reversed(drops)}
    lines += [
        f"dropped, {cause}: {n}, the first: {first[cause]}"
        for cause, n in Counter(drop.cause for drop in drops).most_common()
    ]
    return "\n".join(lines)


def _documents(
    source, number: int, cfg: EVLMConfig, tokenizer
) -> tuple[list[Document], list[Drop]]:
    """The documents of a sample that fit a row, and what is wrong with the others."""
    limit = cfg.data.dialogs
    try:
        sample = source[number]
    except SampleError as error:
        return [], [Drop("bad row", str(error))]
    first = [
        encode_parts(part(sample, i, limit), tokenizer, cfg)
        for i in range(part_count(len(sample.dialogs), limit))
    ]
    made = [document for whole in first for document in (whole, *whole.rest)]
    drops = [unfit(document, cfg.data) for document in made]
    return [document for document, drop in zip(made, drops) if drop is None], [
        drop for drop in drops if drop
    ]


def _pictures(documents: Sequence[Document], drops: list[Drop]) -> list[str]:
    """Sizes of some pictures; those that cannot be read go to `drops`."""
    owner = {ref: document for document in documents for ref in document.refs if not ref.tile}
    sides = []
    for ref in list(owner)[:PICTURES]:
        try:
            sides.append(image.decode_all([ref])[0].size)
        except image.ImageError as error:
            drops.append(
                Drop("unreadable image", f"{error}, sample {owner[ref].source}/{owner[ref].key}")
            )
    if not sides:
        return []
    width, height = np.array(sides).T
    return [
        f"of {min(PICTURES, len(owner))} pictures, decoded:",
        plot("width", width),
        plot("height", height),
    ]


def plot(name: str, values: np.ndarray) -> str:
    """A line of numbers and a histogram in characters."""
    low, half, high = np.percentile(values, (5, 50, 95))
    counts, _ = np.histogram(values, BINS)
    bars = "".join(BARS[int(np.ceil(8 * n / counts.max()))] for n in counts)
    return (
        f"{name:16}{values.mean():8.1f}{low:7.0f}{half:7.0f}{high:7.0f}{values.max():7.0f}  "
        f" |{bars}|"
    )
