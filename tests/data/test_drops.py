"""What a batch loses: drops are counted and named, and too many of them stop the run."""

import re
from collections import Counter

import pytest

from evlm_jax.data import pipeline
from evlm_jax.data.pipeline import batches
from tests.data.made import TOKENIZER, row, write_images, write_jsonl
from tests.data.test_pipeline import take
from tests.helpers.tiny import tiny_config


def single(tmp_path, rows, **data):
    """A config with one jsonl source and one lane."""
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    defaults = dict(
        sources=(source,), weights=(1.0,), length=120, targets=60, block_pairs=40, window=3
    )
    return tiny_config(data=defaults | data, train=dict(batch=1))


def test_drops_are_counted_and_named(tmp_path):
    rows = [row("good", None, "q", "a"), row("long", None, "q" * 500, "a"), row("mute", None, "q")]
    drops = Counter()
    for _, info in take(batches(single(tmp_path, rows), TOKENIZER), 8):
        drops.update((drop.cause, drop.message.split("/")[-1]) for drop in info["drops"])
        assert {key.split("/")[-1] for keys in info["keys"] for key in keys} == {"good"}
    assert set(drops) == {("too long", "long"), ("nothing supervised", "mute")}


def test_an_unreadable_image_takes_the_targets_of_its_document_only(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    cfg = single(
        tmp_path, [row("ok", "0.png", "<image>q", "aa"), row("bad", "1.png", "<image>q", "aa")]
    )
    iterator = batches(cfg, TOKENIZER)
    seen = Counter()
    for batch, info in take(iterator, 4):
        bad = sum(key.endswith("bad") for key in info["keys"][0])
        assert [drop.cause for drop in info["drops"]] == ["unreadable image"] * bad
        assert (batch.targets[0] >= 0).sum() == 3 * (len(info["keys"][0]) - bad)
        seen[bad] += 1
    assert max(seen) > 0


def test_bad_rows_are_left_out_by_name(tmp_path):
    rows = [
        row("good", None, "q", "aa"),
        {"id": "bad", "conversations": 5},
        row("fine", None, "q", "bb"),
    ]
    cfg = single(tmp_path, rows)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"id": \n')
    drops, keys = Counter(), Counter()
    for _, info in take(batches(cfg, TOKENIZER), 8):
        drops.update(drop.cause for drop in info["drops"])
        keys.update(key.split("/")[-1] for key in info["keys"][0])
        assert all(
            re.search(
                r"(bad|\?): (ValueError|JSONDecodeError): .*rows.jsonl: row (2|4)\)$", drop.message
            )
            for drop in info["drops"]
        )
    assert set(drops) == {"bad row"} and drops["bad row"] > 4 and set(keys) == {"good", "fine"}


@pytest.mark.parametrize("share, stops", [(0.2, True), (0.3, False)])
def test_too_many_drops_stop_the_run(tmp_path, monkeypatch, share, stops):
    monkeypatch.setattr(pipeline, "ENOUGH", 40)
    rows = [row(f"r{i}", None, "q", "a") for i in range(6)] + [
        row("mute", None, "q"),
        {"id": "bad"},
    ]
    iterator = batches(single(tmp_path, rows, most_drops=share), TOKENIZER)
    if stops:
        with pytest.raises(
            ValueError, match="documents were left out, more than data.most_drops = 0.2:"
        ) as error:
            take(iterator, 20)
        for cause, key in (("bad row", "bad: KeyError"), ("nothing supervised", "mute")):
            assert re.search(rf"\n  {cause}: \d+, the first: .*{key}", str(error.value))
        iterator.close()
    else:
        take(iterator, 20)


@pytest.mark.parametrize("share, kept", [(0.1, 5), (0.5, 16)])
def test_a_run_that_has_lost_everything_stops_soon(tmp_path, share, kept):
    rows = [row(f"r{i}", "gone.png", "<image>q", "a") for i in range(40)]
    iterator = batches(single(tmp_path, rows, length=30, most_drops=share), TOKENIZER)
    with pytest.raises(ValueError, match=r"(\d+) of \1 documents were left out") as error:
        take(iterator, 40)
    iterator.close()
    lost = int(str(error.value).split()[0])
    assert kept < lost <= kept + 3 and "gone.png" in str(error.value)


def test_a_source_of_odd_rows_alone_ends_with_the_key(tmp_path):
    cfg = single(tmp_path, [row("two-of-one", "0.png", "<image><image>q", "a")])
    with pytest.raises(
        ValueError,
        match=(
            "1000 documents in a row cannot be used; the last: .*two-of-one: .*2 <image> markers"
            " for 1"
        ),
    ):
        next(batches(cfg, TOKENIZER))
