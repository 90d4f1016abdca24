"""Packed rows against a slow recomputation, token by token; the packer against its budgets."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import STAGES, by_task, made_tasks, stream
from benchmarks.packing import document as made_document
from evlm_jax.config.load import load_config
from evlm_jax.data.mixture import tasks
from evlm_jax.data.pack import Budget, Packer, assemble, fill, pack_image_group, unfit, used
from evlm_jax.data.pipeline import Lane
from evlm_jax.data.samples import Sample, Turn, question
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import encode
from evlm_jax.data.tools.bench import rows_of
from tests.data.made import TOKENIZER, config, refs, samples, write_jsonl
from tests.data.made import row as made_row

CFG = config()


def encoded(made, cfg=CFG):
    """Documents of samples, keyed by their number."""
    return [encode(s, TOKENIZER, cfg)._replace(key=str(i)) for i, s in enumerate(made)]


def drain(packer):
    """All rows until the stream ends."""
    return [row for rows in drain_groups(packer) for row in rows]


def drain_groups(packer):
    """The rows of each image group until the stream ends."""
    groups = []
    while any(rows := pack_image_group([packer] * packer.data.image_group, packer.data)):
        groups.append(rows)
    return groups


def sees_text(fields, b):
    """[T, T] who sees whom."""
    k, q = np.arange(len(fields["tokens"][b]))[:, None], np.arange(len(fields["tokens"][b]))[None]
    return ((k <= q) & (q < fields["visible_until"][b][:, None])).T


def sees_images(fields, b, images):
    """[T, I] by the visible ranges, and the same by the (query block, image) pairs."""
    slots = np.arange(images)
    by_range = (fields["visible_start"][b][:, None] <= slots) & (
        slots < fields["visible_stop"][b][:, None]
    )
    by_pairs = np.zeros_like(by_range)
    pairs = len(fields["pair_block"][b])
    for block, image in zip(fields["pair_block"][b], fields["pair_image"][b], strict=True):
        if block < pairs:
            for token in fields["block_tokens"][b][block]:
                if token < len(by_range):
                    by_pairs[token, image] = True
    return by_range, by_pairs


@settings(max_examples=60, deadline=None)
@given(made=st.lists(samples(), min_size=1, max_size=8))
def test_rows_equal_their_documents_side_by_side(made):
    documents = [d for d in encoded(made) if not unfit(d, CFG.data)]
    rows = [[document for _, document in row] for row in drain(Packer(documents, CFG.data))]
    fields = assemble(rows or [[]], CFG)
    for b, row in enumerate(rows):
        text, images = sees_text(fields, b), sees_images(fields, b, CFG.data.images)
        np.testing.assert_array_equal(*images)
        expected_text, expected_images = (
            np.eye(CFG.data.length, dtype=bool),
            np.zeros_like(images[0]),
        )
        token = image = target = 0
        for document in row:
            for q in range(len(document.tokens)):
                for k in range(q + 1):
                    expected_text[token + q, token + k] = q < document.visible_until[k]
                for i in range(document.visible_start[q], document.visible_stop[q]):
                    expected_images[token + q, image + i] = True
                for name in ("tokens", "positions", "media_slot"):
                    assert fields[name][b, token + q] == getattr(document, name)[q]
            for at, wanted in zip(document.target_positions, document.targets, strict=True):
                assert (fields["target_positions"][b, target], fields["targets"][b, target]) == (
                    token + at,
                    wanted,
                )
                target += 1
            token, image = token + len(document.tokens), image + len(document.refs)
        np.testing.assert_array_equal(text, expected_text)
        np.testing.assert_array_equal(images[0], expected_images)
        assert (fields["targets"][b, target:] == -1).all() and (
            fields["media_slot"][b, token:] == -1
        ).all()


@settings(max_examples=80, deadline=None)
@given(
    made=st.lists(samples(), max_size=20),
    window=st.integers(1, 6),
    step=st.integers(1, 3),
    size=st.integers(1, 3),
)
def test_packer_uses_each_document_once_within_budget(made, window, step, size):
    cfg = config(
        length=90,
        images=4,
        targets=30,
        image_group=size,
        slots=4 + size // 2,
        block_pairs=12,
        window=window,
    )
    documents = encoded(made, cfg)
    packers = [Packer(documents, cfg.data, start, step) for start in range(step)]
    groups = [rows for packer in packers for rows in drain_groups(packer)]
    times = Counter(index for rows in groups for row in rows for index, _ in row)
    assert set(times.values()) <= {1}
    assert {i for i, d in enumerate(documents) if not unfit(d, cfg.data)} == set(times)
    assert sum(len(packer.drops) for packer in packers) == len(documents) - len(times)
    for rows in groups:
        laid = [[document for _, document in row] for row in rows]
        assert all((used([row]) <= Budget.of(cfg.data)).all() for row in laid)
        assert used(laid)[1] <= cfg.data.slots
        assert (
            assemble(laid, cfg)["targets"].max() >= 0
        )  # the pair budget holds too, or this raises


@settings(max_examples=100, deadline=None)
@given(
    made=st.lists(samples(), min_size=5, max_size=20),
    window=st.integers(1, 6),
    after=st.integers(0, 6),
    size=st.integers(1, 3),
)
def test_restored_packer_goes_on_equally(made, window, after, size):
    cfg = config(
        length=90, images=4, targets=30, image_group=size, slots=4 + size // 2, window=window
    )
    documents = encoded(made, cfg)
    packer, other = Packer(documents, cfg.data), Packer(documents, cfg.data)
    for _ in range(after):
        pack_image_group([packer] * size, cfg.data)
    other.restore(json.loads(json.dumps(packer.state)))
    assert [[i for i, _ in row] for row in drain(packer)] == [
        [i for i, _ in row] for row in drain(other)
    ]


def long_sample(texts=1, images=0, size=10):
    """A document of plain text."""
    dialogs = tuple(question("<image>" * images + str(i) * size, "x" * size) for i in range(texts))
    return Sample("7", "made", refs(*[1] * images), dialogs)


@pytest.mark.parametrize(
    "sample, cause, figures",
    [
        (long_sample(size=300), "too long", "619 tokens > data.length 256"),
        (long_sample(images=9), "too many images", "9 images > data.images 8"),
        (long_sample(texts=12, size=1), "too many targets", "24 targets > data.targets 20"),
        (long_sample(images=2), "too many block pairs", "6 block_pairs > data.block_pairs 5"),
        (
            Sample("7", "made", (), ((Turn("user", "x"),),)),
            "nothing supervised",
            "nothing supervised",
        ),
    ],
)
def test_what_cannot_fit_is_dropped_by_name(sample, cause, figures):
    budgets = {
        "too many targets": dict(targets=20, length=1024),
        "too many block pairs": dict(block_pairs=5, images=2),
    }
    data = config(**budgets.get(cause, {})).data
    packer = Packer([encode(sample, TOKENIZER, CFG)], data)
    assert pack_image_group([packer], data) == [[]]
    (drop,) = packer.drops
    assert drop.cause == cause and "sample made/7" in drop.message
    assert re.search(figures, drop.message), drop.message


def test_nothing_ever_fits_is_an_error():
    documents = [encode(long_sample(size=300), TOKENIZER, CFG)] * 1000
    with pytest.raises(ValueError, match="1000 documents in a row cannot be used.*data.length 256"):
        pack_image_group([Packer(documents, CFG.data)], CFG.data)


def test_without_isolation_later_documents_see_the_end_of_earlier_ones():
    cfg = config(isolate=False, template="plain")
    two = encode(
        Sample("0", "made", refs(1), (question("<image>a", "x"), question("<image>b", "y"))),
        TOKENIZER,
        cfg,
    )
    one = encode(Sample("1", "made", refs(1), (question("<image>c", "z"),)), TOKENIZER, cfg)
    fields = assemble([[two, one]], cfg)
    text, (images, _) = sees_text(fields, 0), sees_images(fields, 0, cfg.data.images)
    start, last = len(two.tokens), len(two.tokens) + len(one.tokens) - 1
    path = [
        k for k in range(start) if two.visible_until[k] == start
    ]  # the dialog that is laid out last
    assert 0 < len(path) < start
    assert np.flatnonzero(text[last]).tolist() == [*path, *range(start, last + 1)]
    assert fields["positions"][0, start] == two.positions[-1] + 1
    assert np.flatnonzero(images[last]).tolist() == [1]  # pictures stay with their documents


@pytest.mark.parametrize("kind", ["captions", "instructions", "web pages", "plain text"])
def test_fill_of_a_2048_row(kind):
    """At least 97% of the text positions with a window of 64."""
    data = config(length=2048, images=64, targets=2048, block_pairs=128, window=64).data
    assert fill(rows_of(stream({kind: 1}, 3000), data), data)["tokens"] >= 0.97


@pytest.mark.parametrize(
    "kind, images", [("captions", 44), ("instructions", 10), ("web pages", 26)]
)
def test_few_image_slots_are_padding_where_their_number_suits_the_data(kind, images):
    data = config(
        length=2048, images=images, targets=2048, block_pairs=64 + images, window=256
    ).data
    full = fill(rows_of(stream({kind: 1}, 5000), data), data)
    assert full["images"] >= 0.9 and full["tokens"] >= 0.94


def test_no_row_of_a_group_is_starved_of_images():
    """Slots for 40 images a row, where the captions have 42.

    If every row took what it wants, 18 were left for the last one of five.
    """
    data = config(
        length=2048, images=64, targets=2048, image_group=5, slots=200, block_pairs=520, window=256
    ).data
    rows = rows_of(stream({"captions": 1}, 8000), data)
    tokens, images = np.array([used([row])[:2] for row in rows]).reshape(-1, 5, 2).mean(0).T
    assert (
        0.8 * 2048 < tokens[-1]
        and 30 < images[-1]
        and images.max() < 43
        and 39 < images.mean() <= 40
    )


def test_a_row_may_have_more_than_its_share():
    """Pages of 30 pictures among captions: slots are a group's, so a row has up to data.images."""
    documents = [made_document(400, 30), *[made_document(90, 1)] * 16] * 40
    data = config(
        length=1000, images=40, targets=1000, image_group=4, slots=72, block_pairs=200, window=64
    ).data
    rows = rows_of(documents, data)
    counts = [used([row])[1] for row in rows]
    assert max(counts) > 72 / 4 + 10 and max(counts) <= 40 and fill(rows, data)["images"] > 0.8


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_fill_text_and_image_slots(stage):
    """At least 97% of the text positions, at most 10% of the ViT's images padding."""
    data = load_config(f"experiments/evlm_14b.py:{stage}").data
    full = fill(rows_of(stream(STAGES[stage], 4000), data), data)
    assert full["tokens"] >= 0.97 and full["images"] >= 0.9


def test_tasks_that_differ_in_images_share_slots():
    """Stage 2 packed by task, as in the paper: rows of 42 captions beside rows of text.

    A row's own 12 slots are 62% full.
    """
    cfg = load_config("experiments/evlm_14b.py:continual")
    rows = by_task(made_tasks(STAGES["continual"], 3000), 5000, cfg)
    full = fill(rows, cfg.data)
    assert (
        full["tokens"] >= 0.97
        and full["images"] >= 0.9
        and max(used([row])[1] for row in rows) > 35
    )


def test_text_alone_is_packed_as_well_as_with_pictures():
    """Without images there is nothing to keep even: the largest that fits is taken."""
    documents = [made_document(tokens, 0) for tokens in (10, 20, 30, 40, 25, 60)]
    packer = Packer(documents, config(length=100, window=6).data)
    assert [[len(d.tokens) for _, d in row] for row in drain(packer)] == [
        [10, 60, 30],
        [20, 40, 25],
    ]


def stream_of(tmp_path, count, lanes=4, **data):
    """The lanes of a source of captions of different lengths."""
    rng = np.random.default_rng(0)
    rows = [
        made_row(f"r{i}", "0.png", "<image>q", "w" * int(rng.integers(1, 25)) + str(i))
        for i in range(count)
    ]
    cfg = config(
        sources=(write_jsonl(tmp_path / "rows.jsonl", rows),),
        length=400,
        targets=300,
        images=8,
        slots=8,
        block_pairs=1000,
        **data,
    )
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch=lanes))
    made = tasks([open_source(name) for name in cfg.data.sources], TOKENIZER, cfg)
    return [Lane(made, cfg, number) for number in range(lanes)]


def test_ten_pictures_are_spread_over_a_batch(tmp_path):
    """Of 32 documents each of ten is there three or four times; of a hundred, hardly one is there
    twice.
    """
    for count, most, different in ((10, 4, 10), (100, 2, 28)):
        lanes = stream_of(tmp_path, count, window=256)
        for _ in range(4):
            found = Counter(
                document.key for lane in lanes for rows in lane.rows() for document in rows
            )
            assert found.total() == 32 and max(found.values()) <= most and len(found) >= different


def test_data_that_are_longer_than_the_window_keep_their_order(tmp_path, monkeypatch):
    def keys(lanes):
        return [
            [document.key for document in rows]
            for _ in range(40)
            for lane in lanes
            for rows in lane.rows()
        ]

    found = keys(stream_of(tmp_path, 4000, window=32))
    monkeypatch.setattr(Packer, "_spread", lambda *_: None)
    assert keys(stream_of(tmp_path, 4000, window=32)) == found
