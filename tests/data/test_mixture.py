"""Mixtures: exact weights, whole epochs, sources that end."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.data import mixture
from evlm_jax.data.mixture import Mixture, tasks
from evlm_jax.data.samples import Sample, question
from evlm_jax.data.source import Source
from tests.data.made import TOKENIZER, refs
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3), (2_100_000_000, 900_000_000)])
def test_mixture_is_exact_and_skips_nothing(weights):
    lanes = 4
    pairs = [Mixture(weights, lanes)[i] for i in range(10 * lanes * 6)]
    for lane in range(lanes):
        for period in range(6):
            mine = [
                source
                for source, _ in pairs[
                    lane + period * 10 * lanes : (period + 1) * 10 * lanes : lanes
                ]
            ]
            assert Counter(mine) == {0: 7, 1: 3}
    for source in range(2):
        indices = sorted(index for s, index in pairs if s == source)
        assert indices == list(range(len(indices)))


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-4, 10), min_size=1, max_size=6), start=st.integers(0, 10**12))
def test_weights_hold_over_any_run(weights, start):
    """Anywhere, each source's own index goes on by one at each of its turns, and is its share of
    all turns, to the number of sources.
    """
    made, share = Mixture(weights, 1), [weight / sum(weights) for weight in weights]
    following = {}
    for turn in range(start, start + 40):
        source, k = made[turn]
        assert following.get(source, k) == k
        following[source] = k + 1
        assert abs(k - share[source] * turn) <= len(weights) + 1e-3
    with pytest.raises(ValueError, match="data.weights"):
        Mixture((*weights, 0.0), 1)


def test_a_rare_source_has_its_turn():
    """One of 20,000 documents, every 20,000 documents."""
    made = Mixture((1.0, 0.00005), 1)
    assert [turn for turn in range(60_003) if made[turn][0] == 1] == [10_000, 30_001, 50_002]


def one(count, **data):
    """The only task of a made source: sample i has i % 5 + 1 dialogs."""
    samples = [
        Sample(
            str(i),
            "made",
            refs(1),
            tuple(question(f"<image>{i}-{j}", "x") for j in range(i % 5 + 1)),
        )
        for i in range(count)
    ]
    source = Source(
        "made", samples, lambda sample: sample, dialogs=lambda sample: len(sample.dialogs)
    )
    cfg = tiny_config(data=dict(dialogs=2, sources=("made",), weights=(1.0,), length=999) | data)
    (task,) = tasks([source], TOKENIZER, cfg)
    return task.documents


@pytest.mark.parametrize("table", [0, 1 << 16])
def test_every_epoch_has_every_dialog_once_in_another_order(table, monkeypatch):
    monkeypatch.setattr(mixture, "TABLE", table)  # by grain's shuffle, by a table
    count = sum(-(-(i % 5 + 1) // 2) for i in range(17))
    documents = one(17)
    epochs = []
    for epoch in range(3):
        parts = [documents[epoch * count + i] for i in range(count)]
        epochs.append(
            [
                (part.key, frozenset(re.findall(rb"\d+-\d+", bytes(t % 256 for t in part.tokens))))
                for part in parts
            ]
        )
        # The trie breaks off where questions agree, so whole questions are counted by their
        # targets.
        assert sum(len(part.targets) for part in parts) == 2 * sum(i % 5 + 1 for i in range(17))
    keys = [[key for key, _ in epoch] for epoch in epochs]
    assert Counter(keys[0]) == Counter(keys[1]) == Counter(keys[2])
    assert keys[0] != keys[1] != keys[2]
    assert Counter(epochs[0]) != Counter(epochs[1])  # dialogs are dealt to the parts anew


@pytest.mark.parametrize("table", [0, 1 << 16])
def test_a_source_that_ends_stops_the_run_by_name(table, monkeypatch):
    monkeypatch.setattr(mixture, "TABLE", table)
    count = sum(-(-(i % 5 + 1) // 2) for i in range(17))
    documents = one(17, ends="error")
    assert len({documents[i].tokens.tobytes() for i in range(count)}) == count
    with pytest.raises(
        ValueError, match=f"'made' has ended after {count} documents: set data.ends"
    ):
        documents[count]


def test_tasks_join_sources_and_their_weights():
    sources = [
        Source(name, [Sample(name, name, (), (question("a", "b"),))], lambda sample: sample)
        for name in ("a", "b", "c")
    ]
    cfg = tiny_config(
        data=dict(sources=("a", "b", "c"), weights=(2.0, 1.0, 1.0), tasks=("web", "caption", "web"))
    )
    made = tasks(sources, TOKENIZER, cfg)
    assert [(task.name, task.weight) for task in made] == [("web", 0.75), ("caption", 0.25)]
    assert Counter(made[0].documents[i].source for i in range(30 * cfg.train.batch)) == Counter(
        a=20 * cfg.train.batch, c=10 * cfg.train.batch
    )
    with pytest.raises(ValueError, match="data.tasks needs one name"):
        tiny_config(data=dict(tasks=("web",)))
