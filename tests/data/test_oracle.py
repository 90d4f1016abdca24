"""Packed rows against another implementation, which is slow and plain: dialogs are spelled out one
by one, without tries, from the samples.

In a row every token sees a path of tokens that ends in itself. The paths of a document's tokens
must be exactly the beginnings of its dialogs; what is predicted behind each must be what the
dialogs say next where they are learned."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.data.cut import encode_parts
from evlm_jax.data.pack import Packer, assemble, pack_image_group
from evlm_jax.data.samples import Sample, Turn
from tests.data.made import SPECIALS, TOKENIZER, config, refs, samples

MEDIA = 2  # tokens of an image in the tiny config


def spell(sample, dialog, template):
    """[(token, media slot, first image seen, end of images seen)], [learned] of one dialog."""
    steps, learned, visible, image, visuals = [], [], (0, 0), 0, list(sample.visuals)

    def say(tokens, learn):
        steps.extend((token, -1, *visible) for token in tokens)
        learned.extend([learn] * len(tokens))

    def read(text, learn):
        nonlocal visible, image
        while text:
            if not text.startswith("<image>"):
                say(text[0].encode(), learn)
                text = text[1:]
                continue
            frames = len(visuals.pop(0))
            for i in range(image, image + frames):
                steps.extend((SPECIALS["<|media|>"], slot, i, i + 1) for slot in range(MEDIA))
                learned.extend([False] * MEDIA)
            visible, image, text = (image, image + frames), image + frames, text[len("<image>") :]

    for i, turn in enumerate(dialog):
        answers = turn.role == "assistant"
        if template == "plain" or len(dialog) == 1 and answers:
            read(
                (" " if answers and i else "") + turn.text + ("" if answers else " Answer:"),
                answers,
            )
            say(TOKENIZER.eos if answers else (), True)
        else:
            say(b"\n" if i else b"", False)
            say([SPECIALS["<|im_start|>"], *turn.role.encode(), ord("\n")], False)
            read(turn.text, answers)
            say([SPECIALS["<|im_end|>"]], answers)
    return steps, learned


def expected(dialogs):
    """The paths of tokens that are laid out, and how often each path is followed by which
    target.
    """
    paths, targets = set(), Counter()
    for steps, learned in dialogs:
        ends = [i for i in range(1, len(steps)) if learned[i]]
        for i in ends:
            targets[tuple(steps[:i]), steps[i][0]] += 1
        paths |= {tuple(steps[: i + 1]) for i in range(ends[-1] if ends else 0)}
    return paths, targets


def seen_in(fields, b, documents, image):
    """Of each document of row b, whose images begin in slot `image` of its group: its paths, the
    number of its tokens, and its targets by path; image numbers are its own, and it sees no
    other's."""
    token, found = 0, []
    for document in documents:
        paths, steps, here = {}, {}, range(token, token + len(document.tokens))
        for k in here:
            start, stop = int(fields["visible_start"][b, k]), int(fields["visible_stop"][b, k])
            assert stop == start or image <= start < stop <= image + len(document.refs)
            shift = image if stop > start else start
            steps[k] = (
                int(fields["tokens"][b, k]),
                int(fields["media_slot"][b, k]),
                start - shift,
                stop - shift,
            )
        for q in here:
            path = np.flatnonzero(fields["visible_until"][b, : q + 1] > q).tolist()
            assert path[0] >= token and fields["positions"][b, q] == len(path) - 1
            paths[q] = tuple(steps[k] for k in path)
        own = [
            m
            for m, at in enumerate(fields["target_positions"][b])
            if fields["targets"][b, m] >= 0 and at in here
        ]
        targets = Counter(
            (paths[int(fields["target_positions"][b, m])], int(fields["targets"][b, m]))
            for m in own
        )
        found.append((set(paths.values()), len(here), targets))
        token, image = token + len(here), image + len(document.refs)
    rest = slice(token, None)
    length = fields["tokens"].shape[1]
    assert (fields["visible_until"][b, rest] == np.arange(token, length) + 1).all() and (
        fields["media_slot"][b, rest] == -1
    ).all()
    assert (fields["visible_start"][b, rest] == fields["visible_stop"][b, rest]).all()
    assert (fields["targets"][b] >= 0).sum() == sum(targets.total() for _, _, targets in found)
    return found


def check_grouping(fields, b, rows, block):
    """Each token of group b is in one block with others that see the same; each block has one pair
    for each image that it sees.
    """
    start, stop = (
        np.concatenate(fields[name][rows * b : rows * (b + 1)])
        for name in ("visible_start", "visible_stop")
    )
    length, sees = len(start), {}
    for q in range(length):
        if stop[q] > start[q]:
            sees.setdefault((int(start[q]), int(stop[q])), []).append(q)
    blocks = fields["block_tokens"][b]
    place = {int(q): at for at, q in enumerate(blocks.ravel()) if q < length}
    for q in range(length):
        assert fields["token_place"][b, q] == place.get(q, blocks.size)
    wanted = Counter()
    for (start, stop), tokens in sees.items():
        used = {place[q] // block for q in tokens}
        assert len(used) == -(-len(tokens) // block) and {
            int(q) for t in used for q in blocks[t] if q < length
        } == set(tokens)
        wanted.update((t, image) for t in used for image in range(start, stop))
    pairs = list(
        zip(fields["pair_block"][b].tolist(), fields["pair_image"][b].tolist(), strict=True)
    )
    assert Counter(pair for pair in pairs if pair[0] < len(blocks)) == wanted and pairs == sorted(
        pairs, key=lambda pair: pair[0]
    )
    assert set(place) == {q for tokens in sees.values() for q in tokens}


def check(made, cfg):
    """Packs the samples and compares every row; the number of rows."""
    documents = [encode_parts(sample, TOKENIZER, cfg) for sample in made]
    packer, rows, size = Packer(documents, cfg.data), [], cfg.data.image_group
    while any(packed := pack_image_group([packer] * size, cfg.data)):
        rows += packed
    fields = assemble([[document for _, document in row] for row in rows] or [[]] * size, cfg)
    parts, images = {}, [sum(len(document.refs) for _, document in row) for row in rows]
    assert max(images, default=0) <= cfg.data.images
    for b, row in enumerate(rows):
        first = b // size * size
        if b == first:
            check_grouping(fields, b // size, size, cfg.xattn.query_block)
            assert sum(images[b : b + size]) <= cfg.data.slots
        found = seen_in(fields, b, [d for _, d in row], sum(images[first:b]))
        for (index, document), (paths, tokens, targets) in zip(row, found, strict=True):
            if document.parts > 1:
                parts.setdefault(index, []).append((document, paths, targets))
                continue
            dialogs = [
                spell(made[index], dialog, cfg.data.template) for dialog in made[index].dialogs
            ]
            assert (paths, targets) == expected(dialogs)
            assert tokens == len(paths)  # what dialogs share stands once
    for index, found in parts.items():
        if len(found) == found[0][0].parts:  # none was too long even alone
            check_parts(*spell(made[index], made[index].dialogs[0], cfg.data.template), found)
    return len(rows)


def check_parts(steps, learned, found):
    """The parts of a long document, put together again, are all of it; what is behind its picture
    in a part sees it.
    """
    found.sort(key=lambda part: int(part[0].key.split("[")[1].split("/")[0]))
    image = at = 0
    for document, paths, targets in found:
        longest = max(paths, key=len)
        last = [token for path, token in targets if path == longest]
        for token, slot, start, stop in [*longest, *[(token, -1, None, None) for token in last]]:
            assert (token, slot) == steps[at][:2]
            if start is not None and stop > start:
                assert (start + image, stop + image) == steps[at][2:]
            elif start is not None and steps[at][3]:
                assert steps[at][3] <= image  # its picture stands in an earlier part
            at += 1
        while at < len(steps) and not learned[at] and steps[at][2] < image + len(document.refs):
            at += 1  # pictures at the very end of a part predict nothing
        assert targets.total() == sum(slot < 0 for _, slot, *_ in longest[1:]) + len(last)
        image += len(document.refs)
    assert at == len(steps)


texts = st.text("ab \n", max_size=12)


@st.composite
def webpages(draw, most_images=6):
    """Assistant alone: texts, of one token or longer than a row, and pictures anywhere, at the very
    end as well.
    """
    count = draw(st.integers(0, most_images))
    pieces = [
        draw(st.one_of(texts, st.just("c"), st.just(""), st.just("de fg " * 20)))
        for _ in range(count + 1)
    ]
    return Sample(
        "key", "made", refs(*[1] * count), ((Turn("assistant", "<image>".join(pieces)),),)
    )


rows = given(
    made=st.lists(st.one_of(samples(), webpages()), min_size=1, max_size=5),
    template=st.sampled_from(["chatml", "plain"]),
    shared=st.sampled_from([(1, 8), (2, 8), (2, 11), (3, 20)]),
)
ROWS = dict(length=96, images=8, targets=80, block_pairs=40, window=3)
short_rows = given(
    made=st.lists(webpages(most_images=8), min_size=1, max_size=3),
    shared=st.sampled_from([(1, 3), (2, 4), (3, 3)]),
)
SHORT = dict(length=30, images=3, targets=30, block_pairs=12, window=3)  # most documents are cut


@settings(max_examples=150, deadline=None)
@rows
def test_rows_equal_the_slow_implementation(made, template, shared):
    check(made, config(**ROWS, template=template, image_group=shared[0], slots=shared[1]))


@settings(max_examples=80, deadline=None)
@short_rows
def test_long_documents_equal_the_slow_implementation(made, shared):
    check(made, config(**SHORT, image_group=shared[0], slots=shared[1]))


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@rows
def test_thousands_of_rows(made, template, shared):
    check(made, config(**ROWS, template=template, image_group=shared[0], slots=shared[1]))


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@short_rows
def test_thousands_of_long_documents(made, shared):
    check(made, config(**SHORT, image_group=shared[0], slots=shared[1]))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(62, 64),
    where=st.sampled_from(["front", "end", "between"]),
    more=samples(most_visuals=1),
    size=st.integers(1, 2),
)
def test_rows_of_64_images(count, where, more, size):
    text = {
        "front": "<image>" * count + "x",
        "end": "x" + "<image>" * count,
        "between": "x<image>" * count + "y",
    }[where]
    page = Sample(
        "key", "made", refs(*[1] * count), ((Turn("user", text), Turn("assistant", "z")),)
    )
    video = Sample(
        "key", "made", refs(count), ((Turn("user", "<image>what?"), Turn("assistant", "a dog")),)
    )
    assert (
        check(
            [page, video, more],
            config(
                length=320,
                images=64,
                targets=100,
                image_group=size,
                slots=64 * size,
                block_pairs=1000,
                window=3,
            ),
        )
        >= 2
    )
