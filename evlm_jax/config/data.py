"""The sections `data` and `clean` of the configuration (config/__init__.py)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from evlm_jax.config.ranges import (
    Count,
    NonNegative,
    Positive,
    PositiveFloat,
    PositiveShare,
    Range,
    Seed,
    Share,
)
from evlm_jax.config.schema import Pattern


@dataclass(frozen=True)
class DataConfig:
    """Budgets of rows (all static) and the sources of a run."""

    sources: tuple[str, ...]  # names registered in data/sources.py
    weights: tuple[PositiveFloat, ...]  # share of the documents that each source has
    tasks: tuple[
        str, ...
    ]  # of each source: documents of different tasks share no row; empty: any may
    ends: Literal[
        "repeat", "error"
    ]  # after its last document a source starts again, shuffled anew, or stops the run
    template: Literal["chatml", "plain", "own"]  # of chats; "own": the tokenizer's
    length: Positive  # T, text positions of a row
    images: Count  # most images of a row
    targets: Positive  # M, supervised positions of a row
    image_group: Positive  # neighbouring rows that share image slots and block pairs
    slots: Count  # I, image slots of an image group
    block_pairs: Count  # P, (query block, image) pairs of an image group
    dialogs: (
        Count  # at most this many dialogs about the same image share a document (0: all of them)
    )
    isolate: bool  # documents of a row do not see each other
    window: Positive  # samples the packer may choose from
    resize: Literal["squash", "crop", "pad"]  # to a square: stretched, its middle, or with bars
    # JPEGs at 1/2, 1/4 or 1/8 of their size where that does, and a fast resize (data/image.py)
    scaled_decoding: bool
    most_drops: Share  # share of the documents that may be left out before the run stops
    cache_features: bool  # compute the frozen tower's taps once and keep them on disk
    seed: Seed  # of shuffles and draws
    # Rows are packed as if they had so many positions and an image took so many, so that models
    # whose images take more or fewer see equal documents in every update. 0: length, media.tokens.
    pack_length: Count = 0
    pack_media: Count = 0
    # A large picture is itself in small, and at most so many tiles of it, each an image of its own
    # behind a tag (data/tiles.py): they count in images, slots and block_pairs. 0: one image
    tiles: Count = 0

    @property
    def packed(self) -> int:
        """Positions of a row that packing fills."""
        return self.pack_length or self.length

    def __post_init__(self):
        most = self.image_group * self.images
        rules = [
            (
                bool(self.pack_length) == bool(self.pack_media),
                "pack_length",
                "and data.pack_media are given together, or both are 0",
            ),
            (
                len(self.sources) == len(self.weights),
                "weights",
                "needs one weight for each of data.sources",
            ),
            (
                len(self.tasks) in (0, len(self.sources)),
                "tasks",
                "needs one name for each of data.sources, or none at all",
            ),
            (
                self.images <= self.slots <= most,
                "slots",
                f"must lie in data.images..data.image_group * data.images = {self.images}..{most}",
            ),
            (
                not self.tiles or self.resize == "squash",
                "resize",
                "must be squash where data.tiles is set: tiles are parts of a picture that is"
                " stretched",
            ),
            (
                self.block_pairs >= self.slots,
                "block_pairs",
                f"must be at least data.slots = {self.slots}",
            ),
        ]
        refuse("data", rules)


@dataclass(frozen=True)
class CleanConfig:
    """Rules of data/clean.py for captions and web documents, of data/ocr/scans.py for real pages.
    Which there are is the paper's (section 3.1), thresholds are ours.

    Captions meet the first group, pictures of all the second, documents the third, pages the
    fourth. A word is a run of letters, or one Chinese character.
    """

    letters: Share  # more than this share of what is no space must be letters
    digits: Count  # most digits in a row
    duplicates: (
        PositiveShare  # share of words that came before in the text, from which on it is dropped
    )
    links: tuple[Pattern, ...]  # patterns of addresses and file names
    words: Count  # least number of words
    dates: tuple[Pattern, ...]  # patterns of dates
    simplify: bool  # traditional Chinese to simplified, by OpenCC
    similarity: Share  # least relevance of a picture to its caption; 0: any

    deviation: (
        NonNegative  # least standard deviation of some channel, of 255: less is a single colour
    )
    aspect: Annotated[float, Range(1)]  # greatest ratio of the sides
    side: Count  # least shorter side, in pixels

    web_images: Count  # most pictures of a document
    web_characters: Count  # most characters of its text
    web_similarity: Share  # least relevance of a picture to its sentence; 0: any

    page_confidence: (
        NonNegative  # least confidence of a detector in a text; what is below is painted over
    )
    page_characters: Count  # least number of characters of a page that are no space
    # share of common text with an earlier page, from which on it is a duplicate; above 1: none is
    page_similarity: PositiveFloat


def refuse(section: str, rules: list[tuple[bool, str, str]]) -> None:
    """Raises ValueError for the first rule (condition, field, mend) whose condition is false,
    naming the field and the mend.
    """
    for ok, name, mend in rules:
        if not ok:
            raise ValueError(f"config: {section}.{name} {mend}")
