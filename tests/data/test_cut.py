"""Long documents in parts: nothing lost, nothing too long, cut in front of pictures."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.data.cut import encode_parts
from evlm_jax.data.pack import Packer, pack_image_group, unfit
from evlm_jax.data.pipeline import batches
from evlm_jax.data.samples import Sample, Turn, question
from evlm_jax.data.text import encode
from tests.data.made import TOKENIZER, config, refs, write_images, write_jsonl
from tests.helpers.tiny import tiny_config

EOS = TOKENIZER.eos[0]


def small(**data):
    return config(**dict(length=40, targets=34, images=4, block_pairs=20) | data)


def page(text, *frames):
    return Sample("page", "made", refs(*frames), ((Turn("assistant", text),),))


@st.composite
def pages(draw):
    """Documents of up to 200 letters with up to 8 images or short videos anywhere."""
    frames = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), max_size=8))
    texts = [
        draw(st.text("ab \n", max_size=draw(st.sampled_from([0, 5, 20, 90]))))
        for _ in range(len(frames) + 1)
    ]
    return page("<image>".join(texts), *frames)


def parts(document):
    return [document, *document.rest]


def said(document):
    """The text tokens of a part, its last target included."""
    return [*document.tokens[document.media_slot < 0].tolist(), *document.targets[-1:].tolist()]


def runs(sample):
    """Frames of each run of neighbouring pictures."""
    visuals = iter(sample.visuals)
    marks = [
        len(run) // len("<image>") for run in re.findall("(?:<image>)+", sample.dialogs[0][0].text)
    ]
    return [sum(len(next(visuals)) for _ in range(count)) for count in marks]


@pytest.mark.parametrize("template", ["plain", "chatml"])
@settings(max_examples=100, deadline=None)
@given(sample=pages())
def test_parts_hold_the_whole_document(template, sample):
    cfg = small(template=template)
    made = parts(encode_parts(sample, TOKENIZER, cfg))
    whole = encode(
        sample,
        TOKENIZER,
        small(length=9999, targets=9999, images=99, block_pairs=9999, template=template),
    )
    if not len(whole.targets):
        return
    dropped = {len(part.refs) for part in made if len(part.targets) and unfit(part, cfg.data)}
    assert dropped == {
        frames for frames in runs(sample) if frames > cfg.data.images
    }  # neighbours that are too many for any row
    if all(len(part.targets) for part in made):
        assert sum((part.refs for part in made), ()) == sample.refs
        assert sum((said(part) for part in made), []) == said(whole)
        assert [EOS in said(part) for part in made] == [False] * (len(made) - 1) + [True]


@settings(max_examples=100, deadline=None)
@given(sample=pages())
def test_a_document_that_fits_is_not_touched(sample):
    cfg = small(length=2000, targets=2000, images=40, block_pairs=400)
    document, plain = encode_parts(sample, TOKENIZER, cfg), encode(sample, TOKENIZER, cfg)
    assert (
        document.rest == ()
        and document.key == "page"
        and document.tokens.tolist() == plain.tokens.tolist()
    )


def test_parts_of_the_docstring():
    """Cut in front of pictures; neighbouring pictures stay together; text sees the picture in front
    of it, as in the whole.
    """
    cfg = small(length=26, template="plain")
    made = parts(
        encode_parts(
            page(
                "<image>" + "a" * 18 + "<image><image>" + "c" * 18 + "<image>" + "d" * 3, 1, 1, 1, 1
            ),
            TOKENIZER,
            cfg,
        )
    )
    assert [part.key for part in made] == ["page[1/3]", "page[2/3]", "page[3/3]"] and {
        part.parts for part in made
    } == {3}
    assert [bytes(t for t in said(part) if t < 256) for part in made] == [
        b"a" * 18,
        b"c" * 18,
        b"d" * 3,
    ]
    assert [len(part.refs) for part in made] == [1, 2, 1] and made[1].refs == page(
        "", 1, 1, 1, 1
    ).refs[1:3]
    assert set(zip(made[1].visible_start[4:].tolist(), made[1].visible_stop[4:].tolist())) == {
        (1, 2)
    }
    assert (made[0].positions[0], made[1].positions[0]) == (0, 0)


def test_a_text_longer_than_a_row_is_cut_at_lines_then_words_then_anywhere():
    def cut(text, length=20):
        return [
            bytes(t for t in said(part) if t < 256).decode()
            for part in parts(encode_parts(page(text), TOKENIZER, small(length=length)))
        ]

    assert cut("one two\nthree four\nfive six seven") == ["one two\nthree four\n", "five six seven"]
    assert cut("one two three four five six") == ["one two three four ", "five six"]
    assert cut("x" * 45) == ["x" * 20, "x" * 20, "x" * 5]
    made = parts(
        encode_parts(page("<image>" + "y" * 30 + "<image>z", 1, 1), TOKENIZER, small(length=20))
    )
    assert [len(part.refs) for part in made] == [1, 1] and [len(part.tokens) for part in made] == [
        19,
        15,
    ]


def test_the_pair_budget_limits_text_behind_a_video():
    """Three frames are seen by every query block of 8: pairs for 3 media blocks and 5 of text."""
    made = parts(
        encode_parts(
            page("<image>" + "a" * 60, 3), TOKENIZER, small(length=100, targets=99, block_pairs=18)
        )
    )
    assert [part.block_pairs for part in made] == [18, 0] and [
        bytes(said(part)).count(b"a") for part in made[:1]
    ] == [40]


def test_conversations_are_not_cut():
    sample = Sample("talk", "made", (), (question("q" * 50, "a"),))
    document = encode_parts(sample, TOKENIZER, small())
    assert document.rest == () and unfit(document, small().data).cause == "too long"


def test_too_many_neighbouring_pictures_are_dropped_by_name_and_the_rest_is_kept():
    cfg = small(images=2, block_pairs=8)
    document = encode_parts(
        page("<image>abc" + "<image>" * 4 + "xyz<image>def", *[1] * 6), TOKENIZER, cfg
    )
    packer = Packer([document], cfg.data)
    rows = []
    while row := pack_image_group([packer], cfg.data)[0]:
        rows += [found.key for _, found in row]
    assert rows == ["page[1/3]", "page[3/3]"]
    assert [drop.message for drop in packer.drops] == [
        "too many images: 4 images > data.images 2, sample made/page[2/3]"
    ]


@settings(max_examples=100, deadline=None)
@given(
    made=st.lists(pages(), min_size=1, max_size=6),
    window=st.integers(1, 4),
    after=st.integers(0, 8),
)
def test_a_restored_packer_goes_on_within_a_document(made, window, after):
    cfg = small(window=window)
    documents = [
        encode_parts(sample, TOKENIZER, cfg)._replace(key=str(i)) for i, sample in enumerate(made)
    ]

    def drain(packer):
        rows = []
        while row := pack_image_group([packer], cfg.data)[0]:
            rows.append(
                [(index, document.key, document.tokens.tolist()) for index, document in row]
            )
        return rows

    packer, other = Packer(documents, cfg.data), Packer(documents, cfg.data)
    before = [pack_image_group([packer], cfg.data)[0] for _ in range(after)]
    other.restore(json.loads(json.dumps(packer.state)))
    rest = drain(packer)
    assert rest == drain(other)
    used = [(index, document.key) for row in before for index, document in row] + [
        (index, key) for row in rest for index, key, _ in row
    ]
    expected = [
        (i, part.key)
        for i, document in enumerate(documents)
        for part in parts(document)
        if unfit(part, cfg.data) is None
    ]
    assert sorted(used) == sorted(expected)  # each part once


def test_batches_count_the_parts(tmp_path):
    write_images(tmp_path / "images", 5)
    info = [
        {"image_name": f"{i}.png", "matched_text_index": i, "matched_sim": 0.3} for i in range(5)
    ]
    row = {"url": "page", "text_list": ["a" * 30] * 5, "image_info": info}
    source = write_jsonl(tmp_path / "docs.jsonl", [row]).replace("llava:", "mmc4:")
    data = dict(
        sources=(source,), weights=(1.0,), length=80, targets=80, images=4, block_pairs=40, window=4
    )
    iterator = batches(tiny_config(data=data, train=dict(batch=1)), TOKENIZER)
    keys, cut = [], 0
    for _ in range(6):
        batch, info = next(iterator)
        keys += info["keys"][0]
        cut += info["cut"]
        for slot in range(len(info["keys"][0])):
            assert batch.pixels[0, slot].any()
    iterator.close()
    assert cut == len(keys) and {key[-5:] for key in keys[:3]} == {"[1/3]", "[2/3]", "[3/3]"}
    assert np.isin(batch.pixels[0, :2, 0, 0, 0], range(5)).all()
