"""From a sample to a document: chat template, labels, visible ranges, and all its dialogs merged
into one token trie.

Inputs and labels come from the same pieces: a piece is text, one special token or one image, and is
supervised or not. Text is never encoded across a change of supervision, so generation, which stops
at such a border, sees the same tokens. Where the vocabulary has a BOS (`Tokenizer.bos`), every
document begins with it.

A document lays out all dialogs of a sample at once. What they begin with in common (the image, the
first words of the questions) stands, and is computed, once; below it they branch, in pre-order:

    dialogs     img what color? red .      img what shape? circle .      img is it red? yes .

    trie        img ─┬─ is ─ it ─ red? ─ yes
                     └─ what ─┬─ color? ─ red
                              └─ shape? ─ circle

    index           0    1    2    3     4    5      6    7     8      9
    token          img  is   it  red?  yes  what  color? red  shape? circle
    position        0    1    2    3     4    1      2    3     2      3
    visible_until  10    5    5    5     5   10      8    8    10     10

A token sees exactly its ancestors (k <= q < visible_until[k]) and its position is its depth, so
each dialog is computed as if it stood alone. A node may have several targets, one for each dialog
and supervised token behind it. A token that only is a target (the last one, `.` above) is not laid
out.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from evlm_jax.config import EVLMConfig, MediaConfig
from evlm_jax.convert.torch_model.tiles_evlm import tag
from evlm_jax.data.samples import ImageRef, Sample, SampleError, Turn, marked
from evlm_jax.data.template import Media, Piece, Template, Text, Token
from evlm_jax.data.tiles import tiled
from evlm_jax.ops.attention_plan import block_pair_count

SHORT = 128  # characters of a text whose tokens are kept


class Document(NamedTuple):
    """T tokens and M targets, int32 arrays relative to the document. Fields as in Batch."""

    tokens: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    visible_until: np.ndarray  # [T]
    media_slot: np.ndarray  # [T]
    visible_start: np.ndarray  # [T] into refs
    visible_stop: np.ndarray  # [T]
    target_positions: np.ndarray  # [M]
    targets: np.ndarray  # [M]
    dialog: np.ndarray  # [M] the sample's dialog that a target belongs to
    refs: tuple[ImageRef, ...]  # one for each image slot
    key: str
    source: str
    block_pairs: int  # (query block, image) pairs of its cross-attention
    parts: int = 1  # that its sample was cut into (data/cut.py)
    rest: tuple["Document", ...] = ()  # the other parts, where it is the first


def encode(sample: Sample, tokenizer, cfg: EVLMConfig) -> Document:
    """The document of all dialogs of a sample; without targets if nothing in it is supervised.

    Raises SampleError with the sample's key.
    """
    sample = tiled(sample, cfg)
    return document(render(sample, tokenizer, cfg), sample, tokenizer, cfg)


def score_document(sample: Sample, tokenizer, cfg: EVLMConfig, end: bool = True) -> Document:
    """A document for comparing answers by loss: each dialog ends with a candidate answer, and only
    that is supervised.

    Args:
      end: count the token that ends the answer as well.
    """
    sample = tiled(sample, cfg)
    dialogs = render(sample, tokenizer, cfg, answer_only=True, end=end)
    return document(dialogs, sample, tokenizer, cfg)


def prompt(
    turns: Sequence[Turn],
    visuals: Sequence[tuple[ImageRef, ...]],
    tokenizer,
    cfg: EVLMConfig,
    key: str = "prompt",
) -> Document:
    """The document that generation continues: its last token predicts the first token of the
    answer.
    """
    sample = tiled(Sample(key, key, tuple(visuals), (tuple(turns),)), cfg)
    pieces = _render(
        sample, lambda spans, dialog: Template(cfg.data.template, tokenizer).prompt(dialog, spans)
    )
    return lay_out([whole_steps(pieces[0], tokenizer, cfg.media)[0]], [()], sample, cfg)


def alone(
    given: str | Sequence[int],
    visuals: Sequence[tuple[ImageRef, ...]],
    tokenizer,
    cfg: EVLMConfig,
    key: str = "text",
) -> Document:
    """The document of a text as captions are trained, without a template and without targets; or of
    ids as they are, behind all visuals.

    Raises:
      ValueError: no token at all, markers and visuals differ in number, or an id that the model
        does not have.
    """
    said = marked([given], len(visuals)) if isinstance(given, str) else []
    turns = tuple(Turn("assistant", text) for text in said)
    sample = tiled(Sample(key, key, tuple(visuals), (turns,)), cfg)
    if isinstance(given, str):  # without the token that ends it
        (pieces,) = _render(
            sample, lambda spans, dialog: Template("plain", tokenizer).dialog(dialog, spans)[:-1]
        )
        path = whole_steps(pieces, tokenizer, cfg.media)[0]
    else:
        ids = np.asarray(given)
        if (
            ids.ndim != 1
            or not ids.size
            or ids.dtype.kind not in "iu"
            or ids.min() < 0
            or ids.max() >= cfg.llm.words
        ):
            raise ValueError(
                f"give a text, or a list of ids from 0 to {cfg.llm.words - 1}, got {ids.dtype} of"
                f" shape {list(ids.shape)}"
            )

        def media(spans, _):
            return [Media(frame, *span) for span in spans for frame in range(*span)]

        path = steps(
            [*_render(sample, media)[0], *(Token(token, False) for token in ids.tolist())],
            tokenizer,
            cfg.media,
        )[0]
    if not path:
        raise ValueError("a text without any token: give at least one letter")
    return lay_out([path], [()], sample, cfg)


def render(sample: Sample, tokenizer, cfg: EVLMConfig, **supervision: bool) -> list[list[Piece]]:
    """The pieces of each dialog; `supervision` as in Template.dialog. Raises SampleError with the
    sample's key.
    """
    template = Template(cfg.data.template, tokenizer)
    return _render(sample, lambda spans, dialog: template.dialog(dialog, spans, **supervision))


def document(
    dialogs: Sequence[Sequence[Piece]], sample: Sample, tokenizer, cfg: EVLMConfig
) -> Document:
    """The trie of dialogs given as pieces (for text between the frames of a video, say); images,
    key and source are those of `sample`.
    """
    paths, targets = [], []
    for pieces in dialogs:
        path, supervised = whole_steps(pieces, tokenizer, cfg.media)
        # The first token of a document follows nothing, so it cannot be a target.
        wanted = [depth for depth in range(1, len(path)) if supervised[depth]]
        targets.append([(depth - 1, path[depth][0]) for depth in wanted])
        paths.append(path[: wanted[-1]] if wanted else [])
    return lay_out(paths, targets, sample, cfg)


PathStep = tuple[int, int, int, int]  # token, media slot, visible start, visible stop


def whole_steps(
    pieces: Sequence[Piece], tokenizer, media: MediaConfig
) -> tuple[list[PathStep], list[bool]]:
    """`steps` of a whole document, behind what the vocabulary begins every text with."""
    laid, supervised = steps(pieces, tokenizer, media)
    return [(token, -1, 0, 0) for token in tokenizer.bos] + laid, [False] * len(
        tokenizer.bos
    ) + supervised


def steps(
    pieces: Sequence[Piece], tokenizer, media: MediaConfig
) -> tuple[list[PathStep], list[bool]]:
    """Tokens with what they see, and which of them are supervised."""
    laid, supervised, behind = [], [], "nothing"
    see = (0, 0)  # text before any image sees none
    for piece in pieces:
        if isinstance(piece, Media):
            placeholder = tokenizer.id(media.placeholder)
            last = media.sight == "last"
            first = _first_seen(media, piece, laid, see)
            own = (piece.frame if last else first, piece.frame + 1)
            new = [(placeholder, slot, *own) for slot in range(media.tokens)]
            before, see, labelled = see, (first, piece.stop), False
            if piece.tag:
                new = [(token, -1, *see) for token in _tokens(tokenizer, piece.tag, behind)] + new
            if media.around:
                side = tokenizer.id(media.around)
                front = (side, -1, *before)
                new = ([] if laid[-1:] == [front] else [front]) + new + [(side, -1, *see)]
        else:
            ids = (
                (piece.id,) if isinstance(piece, Token) else _tokens(tokenizer, piece.text, behind)
            )
            new, labelled = [(token, -1, *see) for token in ids], piece.supervised
        behind = "text" if isinstance(piece, Text) else "token"
        laid += new
        supervised += [labelled] * len(new)
    return laid, supervised


def _first_seen(
    media: MediaConfig, piece: Media, laid: Sequence[PathStep], see: tuple[int, int]
) -> int:
    """The first image that text behind `piece` sees; `see` is what text in front of it did."""
    if media.sight == "all":
        return 0  # markers take images in order
    beside = laid and laid[-1][1] >= 0 and see[1] in (piece.start, piece.stop)
    return see[0] if media.sight == "neighbours" and beside else piece.start


def lay_out(
    paths: Sequence[Sequence[PathStep]],
    targets: Sequence[Sequence[tuple[int, int]]],
    sample: Sample,
    cfg: EVLMConfig,
) -> Document:
    """Merges paths into a trie in pre-order.

    In lexicographic order each path shares its longest prefix with its predecessor, so one pass
    lays out every node once.

    Args:
      paths: the steps of each dialog.
      targets: (depth, token) of each dialog: the step at this depth of its path predicts this
        token.
    """
    nodes, positions, visible_until, found = [], [], [], []
    branch: list[int] = []  # nodes of the current path, by depth
    previous: Sequence[PathStep] = ()
    for dialog in sorted(range(len(paths)), key=lambda i: paths[i]):
        path = paths[dialog]
        shared = next(
            (i for i, (a, b) in enumerate(zip(previous, path)) if a != b),
            min(len(previous), len(path)),
        )
        for node in branch[shared:]:
            visible_until[node] = len(nodes)
        branch[shared:] = range(len(nodes), len(nodes) + len(path) - shared)
        nodes += path[shared:]
        positions += range(shared, len(path))
        visible_until += [0] * (len(path) - shared)
        found += [(branch[depth], token, dialog) for depth, token in targets[dialog]]
        previous = path
    for node in branch:
        visible_until[node] = len(nodes)
    tokens, media_slot, start, stop = np.array(nodes, np.int32).reshape(-1, 4).T.copy()
    target_positions, target, dialog = np.array(found, np.int32).reshape(-1, 3).T.copy()

    def ints(values):
        return np.array(values, np.int32)

    if cfg.xattn.key_rotary:
        _one_place_each(sample, media_slot, stop, positions)
    pairs = block_pair_count(start, stop, cfg.query_block)
    place = (tokens, ints(positions), ints(visible_until), media_slot, start, stop)
    return Document(
        *place, target_positions, target, dialog, sample.refs, sample.key, sample.source, pairs
    )


def _one_place_each(
    sample: Sample, media_slot: np.ndarray, stop: np.ndarray, positions: Sequence[int]
) -> None:
    """Raises SampleError where an image has several positions, in branches: its keys have one."""
    first = np.flatnonzero(media_slot == 0)
    places = {(int(stop[i]), positions[i]) for i in first}
    if len(places) > len({image for image, _ in places}):
        raise SampleError(
            f"sample {sample.source}/{sample.key}: its dialogs have an image at several positions,"
            " and xattn.key_rotary gives its keys one: set data.dialogs = 1"
        )


def _render(sample: Sample, pieces) -> list[list[Piece]]:
    """`pieces(spans, dialog)` of each dialog; errors get the sample's key."""
    stops = list(accumulate(map(len, sample.visuals)))
    spans = [(stop - len(visual), stop) for stop, visual in zip(stops, sample.visuals)]
    try:
        return [_tagged(pieces(spans, dialog), sample.refs) for dialog in sample.dialogs]
    except SampleError as error:
        raise SampleError(f"sample {sample.source}/{sample.key}: {error}") from error


def _tagged(pieces: Sequence[Piece], refs: Sequence[ImageRef]) -> list[Piece]:
    """Pieces whose tiles have their tags."""

    def of_tile(piece):
        return isinstance(piece, Media) and refs[piece.frame].tile is not None

    return [p._replace(tag=tag(refs[p.frame].tile[0])) if of_tile(p) else p for p in pieces]


def _tokens(tokenizer, text: str, behind: str) -> tuple[int, ...]:
    """Template text, common questions and answers come again and again; long texts do not, and
    would fill the memory.
    """
    return (
        _short(tokenizer, text, behind)
        if len(text) <= SHORT
        else tuple(tokenizer.encode(text, behind))
    )


@functools.lru_cache(maxsize=1 << 14)
def _short(tokenizer, text: str, behind: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, behind))
