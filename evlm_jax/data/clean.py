"""Cleaning of captions and web documents by the rules of the paper (section 3.1), with a receipt
that says what became of everything.

A caption is a dialog of a sample: a picture with five captions may keep three. Rules, in the order
in which they are asked; the first that objects counts:

    letters, digits, duplicates, links, words, dates   of the text; what is left is written in
                                                       simplified Chinese
    similarity                                         if the data bring it
    damaged, single colour, aspect, side               of the picture, decoded
    similarity                                         if a scorer must be asked

Of a web document single pictures are dropped (damaged, single colour, aspect, side, similarity to
its sentence), or all of it (web_images, web_characters, no picture left).
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from PIL import ImageStat

from evlm_jax.config import CleanConfig, EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.formats.interleaved import assign
from evlm_jax.data.samples import MARKER, ImageRef, Sample, SampleError, Turn

Scorer = Callable[
    [Sequence[ImageRef], Sequence[str]], np.ndarray
]  # n pictures and m texts -> relevance [n, m]
CHUNK = 256  # samples in work at a time
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+")
SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
KANA = re.compile(r"[\u3040-\u30ff]")


@dataclass
class Receipt:
    """How many of each unit ("caption", "document", "image", "row") were seen, kept and dropped by
    which rule, with an example of each.
    """

    seen: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    dropped: dict[str, Counter] = field(default_factory=dict)  # by unit
    examples: dict[str, str] = field(
        default_factory=dict
    )  # rule -> the first sample that it dropped
    simplified: int = 0  # captions that simplification changed

    def add(self, unit: str, rule: str, key: str) -> None:
        """One unit; `rule` is empty if it was kept."""
        self.seen[unit] += 1
        if rule:
            self.dropped.setdefault(unit, Counter())[rule] += 1
            self.examples.setdefault(rule, key)
        else:
            self.kept[unit] += 1

    def update(self, other: "Receipt") -> None:
        """Adds what came after."""
        self.seen.update(other.seen)
        self.kept.update(other.kept)
        for unit, counts in other.dropped.items():
            self.dropped.setdefault(unit, Counter()).update(counts)
        self.examples = other.examples | self.examples
        self.simplified += other.simplified

    def __str__(self) -> str:
        lines = []
        for unit in sorted(self.seen):
            lines.append(f"{unit}: {self.seen[unit]} seen, {self.kept[unit]} kept")
            found = self.dropped.get(unit, Counter()).most_common()
            lines += [
                f"  {rule}: {count} dropped, the first {self.examples[rule]}"
                for rule, count in found
            ]
        return "\n".join(
            [*lines, *([f"simplified: {self.simplified} captions"] if self.simplified else [])]
        )


@dataclass
class Cleaner:
    """What cleaners of captions and of documents share; thresholds are `cfg.clean`.

    `scorer` computes relevance where the data have none.
    """

    cfg: EVLMConfig
    scorer: Scorer | None = None
    receipt: Receipt = field(default_factory=Receipt)


class Captions(Cleaner):
    """Cleans samples of one visual with captions about it."""

    def judge(self, sample: Sample) -> list[str | tuple[Turn, ...]]:
        """The rule that objects to each dialog, or the dialog as it is kept.

        May run in a thread.
        """
        cfg = self.cfg.clean
        if len(sample.visuals) != 1 or not all(sample.dialogs):
            raise SampleError(
                f"sample {sample.source}/{sample.key}: {len(sample.visuals)} visuals; captions are"
                " about one, and say something"
            )
        found = [
            text_rule(_caption(dialog), cfg) or self._simplified(dialog)
            for dialog in sample.dialogs
        ]
        known = relevance(sample, cfg.similarity, self.scorer)
        if known is not None and not known[0] >= cfg.similarity:  # nor is NaN
            found = [f if isinstance(f, str) else "similarity" for f in found]
        if left := [i for i, f in enumerate(found) if not isinstance(f, str)]:
            rule = picture_rule(sample.visuals[0], cfg)
            scores = [np.inf] * len(left)
            if known is None and not rule:
                scores = self.scorer([sample.refs[0]], [_caption(found[i]) for i in left])[0]
            for i, score in zip(left, scores):
                found[i] = rule or (found[i] if score >= cfg.similarity else "similarity")
        return found

    def note(self, sample: Sample, found: list[str | tuple[Turn, ...]]) -> Sample | None:
        """Enters a judgement in the receipt; what is left of the sample, or None."""
        for dialog, verdict in zip(sample.dialogs, found):
            self.receipt.add(
                "caption",
                verdict if isinstance(verdict, str) else "",
                f"{sample.source}/{sample.key}",
            )
            self.receipt.simplified += not isinstance(verdict, str) and verdict != dialog
        kept = {i: verdict for i, verdict in enumerate(found) if not isinstance(verdict, str)}
        labels = tuple(sample.labels[i] for i in kept) if sample.labels else ()
        return replace(sample, dialogs=tuple(kept.values()), labels=labels) if kept else None

    def _simplified(self, dialog: tuple[Turn, ...]) -> tuple[Turn, ...]:
        return (
            (*dialog[:-1], replace(dialog[-1], text=simplify(dialog[-1].text)))
            if self.cfg.clean.simplify
            else dialog
        )


class Documents(Cleaner):
    """Cleans web documents: one turn with pictures in between."""

    def judge(self, sample: Sample) -> tuple[str, list[str]]:
        """The rule that objects to the document, and to each of its pictures.

        May run in a thread.
        """
        cfg, count, text = (
            self.cfg.clean,
            len(sample.visuals),
            "".join(turn.text for dialog in sample.dialogs for turn in dialog),
        )
        if len(sample.dialogs) != 1 or text.count(MARKER) != count:
            raise SampleError(
                f"sample {sample.source}/{sample.key}: must be one document with {count} {MARKER}"
                " markers"
            )
        if count > cfg.web_images:
            return "web_images", ["of a dropped document"] * count
        if len(text) - count * len(MARKER) > cfg.web_characters:
            return "web_characters", ["of a dropped document"] * count
        scores = relevance(sample, cfg.web_similarity, self.scorer)
        rules = [picture_rule(visual, cfg) for visual in sample.visuals]
        good = [i for i, rule in enumerate(rules) if not rule]
        if scores is None and good:
            sentences = [
                found for found in SENTENCE.findall(text.replace(MARKER, "\n")) if found.strip()
            ] or [""]
            matrix = self.scorer([sample.visuals[i][0] for i in good], sentences)
            scores = dict(zip(good, matrix[np.arange(len(good)), assign(matrix)]))
        for i in good:
            if not scores[i] >= cfg.web_similarity:
                rules[i] = "web_similarity"
        return ("no picture left" if all(rules) else ""), rules

    def note(self, sample: Sample, found: tuple[str, list[str]]) -> Sample | None:
        """Enters a judgement in the receipt; what is left of the sample, or None."""
        rule, pictures = found
        name = f"{sample.source}/{sample.key}"
        self.receipt.add("document", rule, name)
        for picture in pictures:
            self.receipt.add("image", picture, name)
        if rule:
            return None
        (turns,) = sample.dialogs
        marks = iter([MARKER * (not picture) for picture in pictures])
        shorter = tuple(
            replace(turn, text=re.sub(re.escape(MARKER), lambda _: next(marks), turn.text))
            for turn in turns
        )

        def keep(values):
            return tuple(value for value, picture in zip(values, pictures) if not picture)

        return replace(
            sample, visuals=keep(sample.visuals), scores=keep(sample.scores), dialogs=(shorter,)
        )


def clean(
    source: Sequence[Sample], cleaner: Captions | Documents, workers: int | None = None
) -> Iterator[tuple[int, Sample]]:
    """(number in the source, what is left of the sample) for all of which something is left, in
    order; `cleaner.receipt` grows with it.

    A row that is no sample is counted as "bad row", with its error as the example.

    Args:
      workers: threads that decode; by default as many as there are cores.
    """

    def work(number: int):
        try:
            sample = source[number]
            return sample, cleaner.judge(sample)
        except SampleError as error:
            return None, error

    numbers = iter(range(len(source)))
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(numbers, CHUNK)):
            for number, (sample, found) in zip(chunk, pool.map(work, chunk)):
                if sample is None:
                    cleaner.receipt.add("row", "bad row", str(found))
                elif (kept := cleaner.note(sample, found)) is not None:
                    yield number, kept


def text_rule(text: str, cfg: CleanConfig) -> str:
    """The rule that objects to a caption; empty if none does."""
    solid = [character for character in text if not character.isspace()]
    words = [word.lower() for word in WORD.findall(text)]
    if sum(map(str.isalpha, solid)) <= cfg.letters * len(solid):
        return "letters"
    if re.search(rf"\d{{{cfg.digits + 1}}}", text):
        return "digits"
    if len(words) - len(set(words)) >= cfg.duplicates * len(words):
        return "duplicates"
    for name, patterns in (("links", cfg.links), ("dates", cfg.dates)):
        if any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns):
            return name
    return "words" if len(words) < cfg.words else ""


def picture_rule(visual: Sequence[ImageRef], cfg: CleanConfig) -> str:
    """The rule that objects to a picture, or to the frames of a video; empty if none does."""
    try:
        frames = image.decode_all(
            visual, each=lambda frame: (max(ImageStat.Stat(frame).stddev), frame.size)
        )
    except image.ImageError:
        return "damaged"
    if all(deviation < cfg.deviation for deviation, _ in frames):
        return "single colour"
    short, long = sorted(frames[0][1])
    if long > cfg.aspect * short:
        return "aspect"
    return "side" if short < cfg.side else ""


def relevance(sample: Sample, least: float, scorer: Scorer | None) -> Sequence[float] | None:
    """Relevance of each visual where the data have it or `least` is 0; None where the scorer must
    compute it. Raises ValueError if there is no scorer.
    """
    if not least:
        return [np.inf] * len(sample.visuals)
    if sample.scores:
        if len(sample.scores) != len(sample.visuals):
            raise SampleError(
                f"sample {sample.source}/{sample.key}: {len(sample.scores)} scores of"
                f" {len(sample.visuals)} visuals"
            )
        return sample.scores
    if scorer is None:
        raise ValueError(
            f"sample {sample.source}/{sample.key} has no relevance in the data: give a scorer, or"
            " set clean.similarity and clean.web_similarity to 0"
        )
    return None


def simplify(text: str) -> str:
    """Traditional Chinese as simplified; Japanese stays as it is."""
    return text if text.isascii() or KANA.search(text) else _opencc().convert(text)


@functools.cache
def _opencc():
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise ImportError(
            'clean.simplify needs OpenCC: pip install -e ".[clean]", or set it to False'
        ) from error
    return OpenCC("t2s")


def _caption(dialog: Sequence[Turn]) -> str:
    return dialog[-1].text.replace(MARKER, "")
