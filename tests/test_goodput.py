"""Seconds that are lost, against a second-by-second account of a made-up run; and in the lines of a
real one that is slow at its data and goes on after a pause.
"""

import json
import time
from collections import Counter
from concurrent.futures import Future
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evlm_jax import goodput
from evlm_jax.goodput import CAUSES, Goodput
from evlm_jax.train import train
from evlm_jax.watch import IN_FLIGHT
from tests.helpers.tiny import TinyData, tiny_config, tiny_towers


class Clock:
    """Time that passes when the host says so; and what the host did in each second."""

    def __init__(self):
        self.now, self.did = 0, []

    def monotonic(self):
        return float(self.now)

    def time(self):
        return 1e9 + self.now

    def spend(self, seconds, what):
        self.now += seconds
        self.did += [what] * seconds


class Update(Future):
    """Is done at a time of the clock."""

    def __init__(self, clock, end):
        super().__init__()
        self.clock, self.end = clock, end

    def done(self):
        return self.clock.now >= self.end

    def result(self):
        return float(self.end)


seconds = st.integers(0, 4)


@given(
    st.lists(st.tuples(seconds, seconds, seconds, seconds, st.booleans()), min_size=1, max_size=9)
)
def test_every_second_is_counted_once(steps):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goodput, "time", clock)
        counted, busy, updates = Goodput(0.0, {}), [], []
        patch.setattr(goodput, "_when_done", lambda end: Update(clock, end))
        for number, (data, work, save, other, enters) in enumerate(steps):
            first = number == 0 or enters
            clock.spend(other, "start" if first else "other")
            with counted.during("data"):
                clock.spend(data, "data")

            def dispatch(first=first, work=work):
                clock.spend(3 * first, "compile")
                begin = max([clock.now, *updates[-1:]])
                busy.extend(range(begin, begin + work))
                updates.append(begin + work)
                return None, {"good": begin + work}

            counted.update(dispatch, first=first)
            for end in updates[: len(updates) - IN_FLIGHT][-1:]:  # the host looks at an older one
                clock.spend(max(0, end - clock.now), "wait")
            with counted.during("save"):
                clock.spend(save, "save")
        line = counted.line()
    begun = updates[-1] - steps[-1][1]  # only what lies before the last update is counted yet
    free = [second for second in range(begun) if second not in set(busy)]
    expected = Counter(clock.did[second] for second in free if second < len(clock.did))
    assert {cause: line[f"lost/{cause}"] for cause in CAUSES} == {
        cause: expected[cause] for cause in CAUSES
    }
    assert line["run_seconds"] == max(clock.now, 1e-9)


class Slow(TinyData):
    """Makes each batch wait."""

    def __next__(self):
        time.sleep(0.3)
        return super().__next__()


@pytest.mark.ci
def test_the_lines_of_a_run_that_goes_on(tmp_path):
    cfg = tiny_config(train={"steps": 4, "save_every": 4})
    train(cfg, tmp_path, Slow(cfg), tiny_towers(cfg))
    ended = time.time()
    time.sleep(1)
    train(tiny_config(train={"steps": 6, "save_every": 4}), tmp_path, Slow(cfg), {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for before, after in pairwise(lines):
        passed = after["time"] - before["time"]
        assert after["run_seconds"] - before["run_seconds"] == pytest.approx(passed, abs=0.5)
        assert all(after[f"lost/{cause}"] >= before[f"lost/{cause}"] for cause in CAUSES)
    last, then = lines[-1], lines[3]
    assert last["lost/data"] > 2 * 0.3 and last["lost/compile"] > then["lost/compile"] > 0
    assert last["lost/start"] - then["lost/start"] > 1 + ended - then["time"] - 0.1
    lost = sum(last[f"lost/{cause}"] for cause in CAUSES)
    assert last["goodput"] == pytest.approx(1 - lost / last["run_seconds"])
    assert last["flops"] > last["flops/vision"] > 0
