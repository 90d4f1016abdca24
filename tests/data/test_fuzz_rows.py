"""Rows of every format with values that nobody expects in any place: a sample that can be trained
on, or a bad row; nothing else.
"""

import copy
import json
import os
import random

import pytest

from evlm_jax.data.pack import unfit
from evlm_jax.data.samples import RowError, SampleError
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import encode
from tests.data.made import TOKENIZER, config

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of divisions by 0 and of NaN
TALK = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
WHOLE = {
    "llava": {"id": "k", "image": ["a.png"], "conversations": TALK, "frames": 2},
    "qwen-vl": {
        "id": "k",
        "conversations": [
            {"from": "user", "value": "<img>a.png</img>q"},
            {"from": "assistant", "value": "a"},
        ],
    },
    "img2dataset": {
        "key": "k",
        "jpg": "a.jpg",
        "caption": "c",
        "similarity": 0.3,
        "json": {"url": "u"},
    },
    "mmc4": {
        "url": "u",
        "text_list": ["a", "b"],
        "image_info": [{"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.3}],
        "similarity_matrix": [[0.1, 0.2]],
    },
    "grit": {
        "key": "k",
        "caption": "a cat",
        "ref_exps": [[0, 5, 0.1, 0.1, 0.5, 0.5, 0.9]],
        "clip_similarity_vitb32": 0.3,
    },
    "synthdog": {
        "file_name": "a.png",
        "ground_truth": json.dumps({"gt_parse": {"text_sequence": "t"}}),
    },
    "text": {"id": "k", "text": "t"},
    "detected": {
        "id": "k",
        "image": "a.png",
        "width": 9,
        "height": 9,
        "boxes": [{"box": [0, 0, 5, 5], "text": "x", "confidence": 0.9}],
    },
}
ODD = [
    *(None, True, False, 0, -1, 7, 1 << 70, 0.5, 1.5, float("nan"), float("inf")),
    *("", " ", "x", "<image>", "\ud800", "a\0b", "\u2028", "[]", "{}", "../a.png", "/dev/zero"),
    *("http://127.0.0.1/a.png", "range://0+9::/dev/zero", "parquet://0/jpg::a.parquet"),
    *([], [None], ["x"], [[]], [1, 2], [{"from": "gpt", "value": "x"}]),
    *({}, {"bytes": None}, {"path": "../a"}, {"bytes": 5}, {"a": {"b": []}}),
]


def spots(value, at=()):
    """Paths to all values in a row."""
    found = [at] if at else []
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return found + [path for key, part in inner for path in spots(part, (*at, key))]


def changed(row, rng):
    """The row with one to three values replaced or taken out."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice(spots(row) or [("id",)])
        place = row
        for key in path:
            place = place[key]
        if isinstance(place, dict) and rng.random() < 0.15:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(rng.choice(ODD))
    return row


def fuzz(folder, kind, count):
    """How many rows are samples."""
    rng, cfg, whole = random.Random(kind), config(sources=("x",), length=2000, targets=2000), 0
    rows = [WHOLE[kind], *(changed(WHOLE[kind], rng) for _ in range(count - 1))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"{kind}:{folder}/rows.jsonl")
    for number in range(count):
        try:
            sample = source[number]
        except RowError as error:
            assert number and f"rows.jsonl: row {number + 1})" in str(error)
            continue
        whole += 1
        assert all(os.path.normpath(ref.path).startswith(f"{folder}/") for ref in sample.refs), (
            rows[number]
        )
        try:
            unfit(encode(sample, TOKENIZER, cfg), cfg.data)
        except SampleError as error:
            raise AssertionError(f"{rows[number]}: {error}") from error
    return whole


@pytest.mark.parametrize("kind", WHOLE)
def test_rows_with_odd_values(tmp_path, kind):
    assert 0 < fuzz(tmp_path, kind, 250) < 250


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_ten_thousand_rows_with_odd_values(tmp_path, kind):
    assert 0 < fuzz(tmp_path, kind, 10_000) < 10_000
