"""What every source yields: pictures by reference, and dialogs about them.

Small and hashable; nothing is decoded here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

MARKER = "<image>"  # stands in a turn's text where a visual goes


class SampleError(ValueError):
    """A sample contradicts itself. The message names its key."""


class RowError(SampleError):
    """A row cannot be read, or is no sample. The message names its file, number and key."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image file, the frame that a video shows at `frame` seconds, or a picture in memory
    (image.in_memory); or a tile of one.
    """

    path: str  # of a picture in memory what its pixels hash to
    frame: float | None = None
    picture: Image.Image | None = field(default=None, compare=False, repr=False)  # RGB
    tile: tuple[int, int, int] | None = None  # its number, row by row, of tiles down and across


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. Each `<image>` in the text consumes the next visual of the sample."""

    role: str  # "user" | "assistant"
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Visuals (a tuple of frames each: one for an image, several for a video) and independent
    dialogs about all of them.
    """

    key: str  # unique in its source; errors and drop reports name it
    source: str  # as in `data.sources`
    visuals: tuple[tuple[ImageRef, ...], ...]
    dialogs: tuple[tuple[Turn, ...], ...]
    scores: tuple[float, ...] = ()  # relevance of each visual to its text, where the data tell it
    labels: tuple[str, ...] = ()  # what kind of question each dialog is, where the source tells

    @property
    def refs(self) -> tuple[ImageRef, ...]:
        """All frames of all visuals: the image slots of its document, in order."""
        return tuple(frame for visual in self.visuals for frame in visual)


def literal(text: str) -> str:
    """Text from the world, where `<image>` is no marker: it is spelled `< image>`.

    Raises ValueError for what is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"a text is a str, got {type(text).__name__}")
    return text.replace(MARKER, "< image>")


def marked(texts: Sequence[str], visuals: int) -> list[str]:
    """Texts of a dialog with a marker for each visual: where none has one, the visuals come first.

    Raises:
      ValueError: another number of markers, or something that is no text.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a text is a str, got {type(text).__name__}")
        text.encode()  # UnicodeEncodeError, a ValueError, says which letter is none
    if (marks := sum(text.count(MARKER) for text in texts)) not in (0, visuals):
        raise ValueError(
            f"the text has {marks} {MARKER} markers for {visuals} images and videos: write one for"
            " each, or none"
        )
    return list(texts) if marks else [MARKER * visuals + texts[0], *texts[1:]]


def question(text: str, answer: str) -> tuple[Turn, Turn]:
    """A dialog of one question and one answer."""
    return Turn("user", text), Turn("assistant", answer)


def part_count(dialogs: int, limit: int) -> int:
    """Documents that a sample with so many dialogs is split into, `limit` = data.dialogs (0: no
    limit).
    """
    return max(1, -(-dialogs // limit)) if limit else 1


def part(sample: Sample, index: int, limit: int, seed: tuple[int, ...] | None = None) -> Sample:
    """The dialogs of document `index` of the sample's `part_count` documents.

    The parts of one `seed` (an epoch) share every dialog among them once, in sizes that differ by
    one at most; another seed deals them out anew. Without a seed they are dealt in the order of the
    sample."""
    count = part_count(len(sample.dialogs), limit)
    if count == 1:
        return sample
    order = (
        np.arange(len(sample.dialogs))
        if seed is None
        else np.random.default_rng(seed).permutation(len(sample.dialogs))
    )
    chosen = np.sort(order[index::count])
    return replace(
        sample,
        dialogs=tuple(sample.dialogs[i] for i in chosen),
        labels=tuple(sample.labels[i] for i in chosen) if sample.labels else (),
    )
