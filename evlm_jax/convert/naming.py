"""What a table of foreign parameter names is made of.

A row says: foreign name with {} for the block number -> canonical path, and the einops pattern that
turns one into the other (the inverse swaps the pattern's sides). A row with several paths is a
fused tensor: the pattern's first axis on the right, `n`, runs over the paths, or `sizes` says how
long each part is. Lengths that a pattern cannot know (`heads`, `kv_heads`) come from the config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LINEAR = "o i -> i o"
UNUSED = ""  # a part of the model that no tap depends on: dropped whatever its values


@dataclass(frozen=True)
class NameRow:
    """One foreign tensor (of every block, with {})."""

    foreign: str
    paths: tuple[str, ...]
    pattern: str = ""  # empty: as it is
    written: bool = True  # False: a name that is read alone
    # of a fused tensor whose parts are of different lengths: the name of each part's, along the
    # first axis; the pattern is of one part
    sizes: tuple[str, ...] = ()
    less: float = 0.0  # what is taken from the foreign numbers

    def match(self, name: str) -> tuple[str, ...] | None:
        """Canonical names that the foreign `name` fills, or None."""
        found = re.fullmatch(re.escape(self.foreign).replace(r"\{\}", r"(\d+)"), name)
        return found and tuple(path.format(*found.groups()) for path in self.paths)

    def unmatch(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """The foreign name that the canonical `name` goes to, and all canonical names that go
        there; None unless `name` is the first.
        """
        found = self.written and re.fullmatch(
            re.escape(self.paths[0]).replace(r"\{\}", r"(\d+)"), name
        )
        return found and (
            self.foreign.format(*found.groups()),
            tuple(path.format(*found.groups()) for path in self.paths),
        )


@dataclass(frozen=True)
class Family:
    """A naming scheme. It is recognised by `signature`, a tensor that no other family has;
    `prefixes` may precede every name.
    """

    name: str
    tower: str  # one of engine.PARTS
    signature: str
    rows: tuple[NameRow, ...]
    prefixes: tuple[str, ...] = ("",)
    drop: Mapping[str, str] = field(
        default_factory=dict
    )  # patterns of names (after the prefix) without a place in EVLM: rule of inert.py
    drop_outside: bool = False  # other parts of a larger model, without the prefix, are dropped too


def row(foreign: str, path: str, pattern: str = "") -> NameRow:
    """A foreign tensor that becomes one of ours."""
    return NameRow(foreign, (path,), pattern)


def linear(foreign: str, path: str, bias: bool = True) -> tuple[NameRow, ...]:
    """A linear layer of PyTorch, whose kernel is the transpose of ours."""
    rows = (
        row(f"{foreign}.weight", f"{path}/kernel", LINEAR),
        row(f"{foreign}.bias", f"{path}/bias"),
    )
    return rows if bias else rows[:1]


def linears(foreign: str, path: str, names: Mapping[str, str]) -> tuple[NameRow, ...]:
    """Linear layers of one module, {their name: ours}."""
    return tuple(
        one
        for theirs, ours in names.items()
        for one in linear(f"{foreign}.{theirs}", f"{path}/{ours}")
    )


def norm(foreign: str, path: str) -> tuple[NameRow, ...]:
    """A norm with scale and bias."""
    return row(f"{foreign}.weight", f"{path}/scale"), row(f"{foreign}.bias", f"{path}/bias")


def patch(foreign: str) -> tuple[NameRow, ...]:
    """The convolution that makes patch embeddings."""
    return row(f"{foreign}.weight", "vit/patch/kernel", "v c h w -> h w c v"), row(
        f"{foreign}.bias", "vit/patch/bias"
    )
