"""A document that is longer than a row, in parts that each fit one.

Only a document is cut: text with pictures in between that one assistant turn says (a web page), not
a conversation. It is cut in front of a picture, so that text stays behind the picture it sees:

    img A text  img B  img C text text  img D text    the tokens of a row end in the text of C
    img A text | img B  img C text text | img D text  3 parts; neighbouring pictures stay together

A text that is longer than a row by itself is cut at the end of a line, else of a word, else
anywhere: nothing is lost. The end token stands in the last part alone. Why so: docs/decisions.md,
D-ROW-5 and D-ROW-6.
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from evlm_jax.config import EVLMConfig
from evlm_jax.data.pack import Budget, unfit
from evlm_jax.data.samples import Sample
from evlm_jax.data.text import Document, Media, Piece, Text, document, render, steps
from evlm_jax.data.tiles import tiled
from evlm_jax.ops.attention_plan import block_pair_count

ENDS = (r"\n+", r"\s+", "(?<=.)")  # where a text may be cut, best first
LONGEST = 8  # characters a token that are looked at


def encode_parts(sample: Sample, tokenizer, cfg: EVLMConfig) -> Document:
    """`text.encode`; where the sample is a document that fits no row, its first part, with the
    others in `rest`.

    What fits no row even so (more neighbouring pictures than a row has) stays as it is, for the
    packer to drop by name.
    """
    sample = tiled(sample, cfg)
    dialogs = render(sample, tokenizer, cfg)
    whole = document(dialogs, sample, tokenizer, cfg)
    alone = [turn.role for dialog in sample.dialogs for turn in dialog] == ["assistant"]
    if not alone or not len(whole.targets) or unfit(whole, cfg.data) is None:
        return whole
    groups = list(_grouped(dialogs[0], tokenizer, cfg))
    made = [
        _part(group, number, len(groups), sample, tokenizer, cfg)
        for number, group in enumerate(groups, 1)
    ]
    return made[0]._replace(rest=tuple(made[1:]))


def _grouped(pieces: Sequence[Piece], tokenizer, cfg: EVLMConfig) -> Iterator[list[Piece]]:
    """Pieces of each part: as many units as fit."""
    room, part, used = np.array(_budget(tokenizer, cfg)), [], 0
    for unit in _units(pieces, tokenizer, cfg):
        need = np.array(_cost(unit, tokenizer, cfg))
        behind_a_cut = not isinstance(unit[0], Media)
        if part and (behind_a_cut or (used + need > room).any()):
            yield part
            part, used = [], 0
        part, used = part + unit, used + need
    yield part


def _units(pieces: Sequence[Piece], tokenizer, cfg: EVLMConfig) -> Iterator[list[Piece]]:
    """Neighbouring pictures with the text behind them; what of the text does not fit one row with
    them stands alone.
    """
    starts = [
        i
        for i, piece in enumerate(pieces)
        if isinstance(piece, Media) and (i == 0 or not isinstance(pieces[i - 1], Media))
    ]
    for start, stop in zip([0, *starts], [*starts, len(pieces)]):
        unit = list(pieces[start:stop])
        while unit and (at := _too_long(unit, tokenizer, cfg)) is not None:
            head, tail = _split(
                unit[at].text,
                _room(unit[:at], tokenizer, cfg),
                partial(_count, tokenizer, unit[:at]),
            )
            yield [*unit[:at], unit[at]._replace(text=head)]
            unit = [unit[at]._replace(text=tail), *unit[at + 1 :]]
        if unit:
            yield unit


def _too_long(unit: Sequence[Piece], tokenizer, cfg: EVLMConfig) -> int | None:
    """Where in a unit its text stands, if the unit fits no row and a shorter text would."""
    at = next((i for i, piece in enumerate(unit) if isinstance(piece, Text)), None)
    if at is None or len(unit[at].text) < 2 or (room := _room(unit[:at], tokenizer, cfg)) <= 0:
        return None
    begin = unit[at].text[: LONGEST * room]  # of a very long text this tells, without all of it
    fits = _count(tokenizer, unit[:at], begin) <= room and all(
        need <= have for need, have in zip(_cost(unit, tokenizer, cfg), _budget(tokenizer, cfg))
    )
    return None if fits else at


def _count(tokenizer, pictures: Sequence[Media], text: str) -> int:
    """Tokens of a text behind pictures, or at the beginning of a document."""
    return len(tokenizer.encode(text, "token" if pictures else "nothing"))


def _budget(tokenizer, cfg: EVLMConfig) -> Budget:
    """What a row has for a part, whose first tokens may be the vocabulary's own."""
    budget = Budget.of(cfg.data)
    return budget._replace(tokens=budget.tokens - len(tokenizer.bos))


def _room(pictures: Sequence[Media], tokenizer, cfg: EVLMConfig) -> int:
    """Tokens of text that fit a row behind these pictures."""
    data, seen = cfg.data, pictures[-1].stop - pictures[-1].start if pictures else 0
    used = _cost(pictures, tokenizer, cfg)
    room = min(_budget(tokenizer, cfg).tokens - used.tokens, data.targets)
    if seen and cfg.query_block:
        room = min(room, (data.block_pairs - used.block_pairs) // seen * cfg.query_block)
    return room if len(pictures) <= data.images else 0


def _cost(unit: Sequence[Piece], tokenizer, cfg: EVLMConfig) -> Budget:
    """At most what the unit adds to a document: a visible range is never that of two units."""
    laid, supervised = steps(unit, tokenizer, cfg.media)
    start, stop = np.array([step[2:] for step in laid], np.int32).reshape(-1, 2).T
    images = sum(isinstance(piece, Media) for piece in unit)
    tokens = len(laid) + images * ((cfg.data.pack_media or cfg.media.tokens) - cfg.media.tokens)
    return Budget(tokens, images, sum(supervised), block_pair_count(start, stop, cfg.query_block))


def _split(text: str, room: int, count) -> tuple[str, str]:
    """The longest head of at most `room` tokens that ends where a text may be cut, and the rest; at
    least one character each.
    """
    window = text[: min(LONGEST * room, len(text) - 1)]
    for pattern in ENDS:
        ends = [match.end() for match in re.finditer(pattern, window, re.DOTALL)]
        if fitting := bisect.bisect_right(ends, room, key=lambda end: count(window[:end])):
            return text[: ends[fitting - 1]], text[ends[fitting - 1] :]
    return text[:1], text[1:]


def _part(
    group: Sequence[Piece], number: int, count: int, sample: Sample, tokenizer, cfg: EVLMConfig
) -> Document:
    """One part as a document of its own, with its own pictures."""
    frames = [piece.frame for piece in group if isinstance(piece, Media)]
    first = frames[0] if frames else 0
    moved = [
        (
            p._replace(frame=p.frame - first, start=p.start - first, stop=p.stop - first)
            if isinstance(p, Media)
            else p
        )
        for p in group
    ]
    key = f"{sample.key}[{number}/{count}]" if count > 1 else sample.key
    own = replace(sample, key=key, visuals=(sample.refs[first : first + len(frames)],))
    return document([moved], own, tokenizer, cfg)._replace(parts=count)
