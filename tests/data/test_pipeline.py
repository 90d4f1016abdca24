"""Batches: the same stream for any number of processes and after any stop; mixtures, epochs, drops,
evaluation rows.
"""

import contextlib
import dataclasses
import json
import random
from collections import Counter

import grain
import numpy as np
import pytest

from evlm_jax.batch import Batch
from evlm_jax.data.identity import identity
from evlm_jax.data.image import ImageError
from evlm_jax.data.mixture import Documents, tasks
from evlm_jax.data.pack import Budget, Packer, used_of
from evlm_jax.data.pipeline import RowsIterator, batches, rows_in_order
from evlm_jax.data.samples import Sample, SampleError, question
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import encode, score_document
from tests.data.made import TOKENIZER, refs, row, write_images, write_jsonl
from tests.helpers.tiny import tiny_config

LANES = 8


@pytest.fixture(
    scope="module",
    params=[((), 1), (("chat", "captions"), 1), (("chat", "captions"), 2)],
    ids=["mixed", "tasks", "groups"],
)
def cfg(request, tmp_path_factory):
    """Two sources of different length and kind, eight lanes; rows of both together, or of one each,
    alone or two an image group.
    """
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "pictures", 23)
    for i in range(23):
        (folder / "pictures" / f"{i}.txt").write_text("caption " * (i % 5 + 1))
    rows = [
        row(
            f"r{i}",
            f"pictures/{i % 23}.png" if i % 3 else None,
            "<image>" * bool(i % 3) + "q" * (i % 20),
            f"a{i}",
        )
        for i in range(31)
    ]
    sources = (write_jsonl(folder / "rows.jsonl", rows), f"folder:{folder / 'pictures'}")
    names, group = request.param
    data = dict(
        sources=sources,
        weights=(0.75, 0.25),
        tasks=names,
        length=200,
        targets=150,
        images=6,
        block_pairs=60 * group,
        window=5,
        seed=3,
    )
    return tiny_config(
        data=data | dict(image_group=group, slots={1: 6, 2: 8}[group]),
        train=dict(batch=LANES * group),
    )


def take(iterator, count):
    """The next batches, then the thread is stopped."""
    made = [next(iterator) for _ in range(count)]
    iterator.close()
    return made


def assert_equal(left, right):
    """Batches and their keys."""
    assert left[1]["keys"] == right[1]["keys"]
    for a, b in zip(left[0], right[0], strict=True):
        assert (a is None and b is None) or np.array_equal(a, b)


def test_batch_has_the_promised_shapes(cfg):
    batch, info = take(batches(cfg, TOKENIZER), 1)[0]
    for name, array, spec in zip(Batch._fields, batch, Batch.spec(cfg), strict=True):
        assert (array is None and spec is None) or (array.shape, array.dtype) == (
            spec.shape,
            spec.dtype,
        ), name
    assert len(info["keys"]) == LANES * cfg.data.image_group and set(info["fill"]) == {
        "tokens",
        "images",
        "targets",
        "block_pairs",
    }
    assert set(batch.target_source[batch.targets >= 0]) == {0, 1}


def test_pictures_stand_in_their_slots(cfg):
    """The colour of a made picture is its number."""
    batch, info = take(batches(cfg, TOKENIZER), 1)[0]
    checked = slot = 0
    for b, keys in enumerate(info["keys"]):
        slot = 0 if b % cfg.data.image_group == 0 else slot
        for name in keys:
            key = name.split("/")[-1]
            number = int(key[1:]) % 23 if key.startswith("r") else int(key.removesuffix(".png"))
            if key.startswith("r") and int(key[1:]) % 3 == 0:
                continue  # text only
            assert (
                batch.pixels[b // cfg.data.image_group, slot] == (number, 255 - number, 7)
            ).all()
            slot, checked = slot + 1, checked + 1
    assert checked > 4


@pytest.mark.parametrize("points", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_resume_at_random_points_equals_the_uninterrupted_stream(cfg, points):
    iterator, states, made = batches(cfg, TOKENIZER), [], []
    for _ in range(points + 10):
        states.append(json.dumps(iterator.get_state()))
        made.append(next(iterator))
    iterator.close()
    other = batches(cfg, TOKENIZER)
    for at in random.Random(0).sample(range(points + 7), points):
        other.set_state(json.loads(states[at]))
        for expected in made[at : at + 2]:
            assert_equal(next(other), expected)
    other.close()


def shared(processes):
    """The lanes of each process."""
    return [range(LANES * p // processes, LANES * (p + 1) // processes) for p in range(processes)]


@pytest.mark.parametrize(
    "processes", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 8))]
)
def test_processes_share_the_rows_of_one_stream(cfg, processes):
    whole = take(batches(cfg, TOKENIZER), 12)
    parts = [take(batches(cfg, TOKENIZER, lanes=lanes), 12) for lanes in shared(processes)]
    for step, (batch, info) in enumerate(whole):
        pieces = [part[step] for part in parts]
        assert info["keys"] == [keys for _, piece in pieces for keys in piece["keys"]]
        np.testing.assert_array_equal(
            batch.tokens, np.concatenate([piece.tokens for piece, _ in pieces])
        )
        np.testing.assert_array_equal(
            batch.pixels, np.concatenate([piece.pixels for piece, _ in pieces])
        )


@pytest.mark.parametrize(
    "before, after",
    [
        (1, 8),
        (4, 2),
        *(pytest.param(*change, marks=pytest.mark.slow) for change in ((2, 1), (8, 4))),
    ],
)
def test_state_restores_on_another_number_of_processes(cfg, before, after):
    expected = take(batches(cfg, TOKENIZER), 9)[-1]
    saved = {}
    for lanes in shared(before):
        iterator = batches(cfg, TOKENIZER, lanes=lanes)
        take(iterator, 8)
        state = json.loads(json.dumps(iterator.get_state()))
        saved |= state["lanes"]
    keys, pixels = [], []
    for lanes in shared(after):
        iterator = batches(cfg, TOKENIZER, lanes=lanes)
        iterator.set_state(state | {"lanes": saved})
        batch, info = take(iterator, 1)[0]
        keys, pixels = keys + info["keys"], [*pixels, batch.pixels]
    assert keys == expected[1]["keys"]
    np.testing.assert_array_equal(np.concatenate(pixels), expected[0].pixels)


def test_a_state_of_other_lanes_or_tasks_is_refused(cfg):
    with (
        contextlib.closing(batches(cfg, TOKENIZER, lanes=(0, 1))) as half,
        contextlib.closing(batches(cfg, TOKENIZER)) as whole,
    ):
        with pytest.raises(ValueError, match=r"no lanes \[2, 3, 4, 5, 6, 7\]"):
            whole.set_state(half.get_state())
        state = {
            "lanes": {str(lane): [{"next": lane, "pending": []}] * 3 for lane in range(LANES)},
            "of": LANES,
        }
        with pytest.raises(ValueError, match="has 3 tasks, data.tasks has [12]"):
            whole.set_state(state)
        with pytest.raises(
            ValueError, match="has 8 of 16 lanes: merge the positions of all processes"
        ):
            whole.set_state(state | {"of": 16})


def used(state) -> list[int]:
    """Documents of each task that a position is behind."""
    return [
        sum(used_of(task, state["of"]) for task in tasks) for tasks in zip(*state["lanes"].values())
    ]


@pytest.mark.parametrize("wider", [2, 0.5])
def test_another_batch_goes_on_behind_as_many_documents(cfg, wider):
    with contextlib.closing(batches(cfg, TOKENIZER)) as iterator:
        for _ in range(7):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
    other = dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, batch=int(cfg.train.batch * wider))
    )
    with contextlib.closing(batches(other, TOKENIZER)) as iterator:
        iterator.set_state(state)
        begun = iterator.get_state()
        assert (
            begun["of"] == other.image_groups == len(begun["lanes"])
            and used(begun) == used(state)
            and min(used(state)) > 0
        )
        batch, _ = next(iterator)
        assert len(batch.tokens) == other.train.batch and sum(used(iterator.get_state())) > sum(
            used(begun)
        )


def test_the_position_tells_the_sources_apart(cfg, tmp_path):
    """A file in another order, a shorter one, and the same one elsewhere."""
    rows = [
        {
            "id": f"r{i}",
            "conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}],
        }
        for i in range(99)
    ]

    def told(name, rows):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return identity(open_source(f"llava:{tmp_path / name}/rows.jsonl"))

    first = told("first", rows)
    assert first["samples"] == 99 and told("moved", rows) == first
    assert told("backwards", rows[::-1])["samples"] == 99 and told("again", rows[::-1]) != first
    assert told("shorter", rows[:98])["samples"] == 98
    with contextlib.closing(batches(cfg, TOKENIZER)) as iterator:
        assert set(iterator.get_state()["sources"]) == set(cfg.data.sources)


def test_what_waited_and_fits_no_more_is_left_out(cfg):
    """Of a position that was saved with longer rows."""
    made = tasks([open_source(name) for name in cfg.data.sources], TOKENIZER, cfg)
    packer = Packer(made[0].documents, cfg.data)
    packer.row(Budget.of(cfg.data), 1, Counter())
    longest = max(len(document.tokens) for _, _, document in packer._pending)
    other = Packer(made[0].documents, dataclasses.replace(cfg.data, length=longest - 1))
    other.restore(packer.state)
    assert 0 < len(other.state["pending"]) < len(packer.state["pending"])
    assert {drop.cause for drop in other.drops} == {"too long"}


def test_rows_hold_one_task_and_documents_their_weights(cfg):
    """Shares of documents are exact to a packing window and an image group, in each lane."""
    iterator, kinds = batches(cfg, TOKENIZER), [[] for _ in range(LANES)]
    for _, info in take(iterator, 30):
        for b, keys in enumerate(info["keys"]):
            kinds[b // cfg.data.image_group].append([key.startswith("folder") for key in keys])
    mixed = sum(len(set(row)) > 1 for lane in kinds for row in lane)
    assert (mixed == 0) == bool(cfg.data.tasks)
    for lane in kinds:
        flat = sum(lane, [])
        slack = cfg.data.window + cfg.data.image_group * max(map(len, lane))
        assert abs(sum(flat) - 0.25 * len(flat)) <= slack, (sum(flat), len(flat))
    if cfg.data.tasks:
        assert (
            len({tuple(row[:1] == [True] for row in lane) for lane in kinds}) > 1
        )  # not all lanes have a task at once


def test_features_that_the_config_does_not_want(cfg):
    with pytest.raises(ValueError, match="data.cache_features"):
        batches(cfg, TOKENIZER, features=object())


def test_rows_in_order_map_back_to_documents_and_dialogs(cfg):
    source = open_source(cfg.data.sources[1])
    prompt = "<image>what?"
    documents = []
    for sample in source:
        dialogs = tuple(question(prompt, answer) for answer in ("yes", "no", sample.key))
        documents.append(
            score_document(dataclasses.replace(sample, dialogs=dialogs), TOKENIZER, cfg)
        )
    found = {}
    for batch, owner, dialog in rows_in_order(documents, cfg, rows=3):
        assert batch.tokens.shape[0] == owner.shape[0] == 3
        assert ((owner >= 0) == (batch.targets >= 0)).all() and (
            (dialog >= 0) == (batch.targets >= 0)
        ).all()
        for b, m in zip(*np.nonzero(owner >= 0), strict=True):
            found.setdefault((int(owner[b, m]), int(dialog[b, m])), []).append(
                int(batch.targets[b, m])
            )
    answers = {
        (i, d): answer
        for i, sample in enumerate(source)
        for d, answer in enumerate(("yes", "no", sample.key))
    }
    assert {key: TOKENIZER.decode(ids) for key, ids in found.items()} == answers


def test_rows_in_order_refuse_what_they_would_lose(cfg, tmp_path):
    long = encode(Sample("big", "made", (), (question("q" * 999, "a"),)), TOKENIZER, cfg)
    with pytest.raises(ValueError, match="1 documents do not fit a row.*made/big"):
        next(rows_in_order([long], cfg, rows=1))
    missing = encode(Sample("gone", "made", refs(1), (question("<image>q", "a"),)), TOKENIZER, cfg)
    with pytest.raises(ImageError, match="0.png.*made/gone"):
        next(rows_in_order([missing], cfg, rows=1))


def test_documents_are_a_grain_dataset(cfg):
    """Random access through grain's own transformations."""
    documents = Documents(open_source(cfg.data.sources[0]), TOKENIZER, cfg)
    assert (
        isinstance(documents, grain.MapDataset)
        and documents[3].key == "r3"
        and documents[31 + 3].key == "r3"
    )


def test_an_error_of_the_next_batch_leaves_this_one_whole(cfg):
    """Rows are packed ahead; what is wrong with them shows when their turn comes, and no position
    counts them.
    """
    made = tasks([open_source(name) for name in cfg.data.sources], TOKENIZER, cfg)
    whole, other = (RowsIterator(made, cfg, range(LANES), None) for _ in range(2))
    start, calls = other._start, []

    def fails():
        calls.append(1)
        if len(calls) == 3:
            raise SampleError("made/k")
        return start()

    other._start = fails
    for _ in range(2):
        assert_equal(next(other), next(whole))
        assert other.get_state() == whole.get_state()
    with pytest.raises(SampleError, match="made/k"):
        next(other)
    assert other.get_state() == whole.get_state()
