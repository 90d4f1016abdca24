"""Questions about written pages, synthetic or real. Every page has DIALOGS of them."""

from collections.abc import Sequence

import numpy as np

from evlm_jax.data.formats.grounding import box
from evlm_jax.data.formats.plain import READ
from evlm_jax.data.samples import MARKER, Turn, question

DIALOGS = 4
ASKED = {  # by language: all text, what is written at, where something stands, how many lines
    "en": (
        READ,
        "What is written at {}?",
        'Where is "{}" written?',
        "How many lines of text are there?",
    ),
    "zh": ("读出图中的文字。", "{}处写着什么？", "“{}”写在哪里？", "一共有多少行文字？"),
}
Placed = tuple[str, Sequence[float]]  # text, and its box as shares of width and height


def dialogs(
    language: str, lines: Sequence[Placed], words: Sequence[Placed], rng: np.random.Generator
) -> tuple[tuple[Turn, Turn], ...]:
    """Dialogs about a page: the transcription, a line by its box, the box of something that occurs
    once, the number of lines.

    Args:
      lines: in reading order.
      words: one that occurs once is chosen for the question; where there is none, a line, and where
        each occurs twice, the last by its box.
    """
    read, at, where, count = (MARKER + text for text in ASKED[language])

    def by_box(line):
        return question(at.format(box(line[1])), line[0])

    whole = "\n".join(text for text, _ in lines)
    once = _once(words, whole) or _once(lines, whole)
    if once:
        text, place = once[rng.integers(len(once))]
        third = question(where.format(text), box(place))
    else:
        third = by_box(lines[-1])
    asked = by_box(lines[rng.integers(len(lines))])
    return question(read, whole), asked, third, question(count, str(len(lines)))


def _once(placed: Sequence[Placed], whole: str) -> list[Placed]:
    """Those that the whole text has once, with a letter in it and more than one character."""
    return [
        (text, place)
        for text, place in placed
        if len(text) > 1 and any(map(str.isalpha, text)) and whole.count(text) == 1
    ]
