"""Where a run's time goes: seconds in which the devices had no update to make, by what the host did
meanwhile, summed through all restarts.

A wait of the host alone is no loss: two updates are under way while it reads and saves. So a thread
waits for each update and notes when it was done; what passes from there to the next update is
lost."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax

# start: reading, restoring, entering a phase; of a run that goes on, all since its last line
CAUSES = ("start", "compile", "data", "save", "monitor", "other")


class Goodput:
    """Counts what is lost. Causes are CAUSES; what the host did under no name is "other"."""

    def __init__(self, began: float, former: Mapping[str, float]):
        """`began`: when the process began with the run (time.monotonic); `former`: the last line of
        the run that goes on, empty where there is none.
        """
        gap = max(0.0, time.time() - former["time"]) if "time" in former else None
        now = time.monotonic()
        self._free: float | Future = began if gap is None else now - gap
        self._origin = self._free - former.get("run_seconds", 0.0)
        self._lost = Counter({cause: former.get(f"lost/{cause}", 0.0) for cause in CAUSES})
        self._spans = []

    @contextlib.contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """What the host does within counts for `cause`, as far as devices were free."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._spans.append((cause, begin, time.monotonic()))

    def update(
        self, dispatch: Callable[..., tuple[Any, dict]], *arguments: Any, first: bool
    ) -> tuple[Any, dict]:
        """The result of `dispatch`, which begins an update; `first`: of a phase, so it compiles."""
        begin = time.monotonic()
        state, report = dispatch(*arguments)
        if first:  # the devices begin behind it
            self._spans.append(("compile", begin, time.monotonic()))
            begin = time.monotonic()
        self._count(begin, "start" if first else "other")
        self._free = _when_done(report["good"])
        return state, report

    def _count(self, until: float, rest: str) -> None:
        """Counts what was lost before `until`; `rest` is the cause of what has no other."""
        free = self._free
        if isinstance(free, Future):
            free = free.result() if free.done() else until
        left = max(0.0, until - free)
        for cause, begin, end in self._spans:
            lost = max(0.0, min(end, until) - max(begin, free))
            self._lost[cause] += lost
            left -= lost
        self._lost[rest] += max(0.0, left)
        self._spans.clear()

    def line(self) -> dict[str, float]:
        """Since the run began: its seconds, those lost by cause, the share of all that was not;
        and the Unix time.
        """
        seconds = max(time.monotonic() - self._origin, 1e-9)
        lost = {f"lost/{cause}": self._lost[cause] for cause in CAUSES}
        return {
            "time": time.time(),
            "run_seconds": seconds,
            "goodput": 1 - sum(lost.values()) / seconds,
        } | lost


def _when_done(report: jax.Array) -> Future:
    """When an update is done, or has failed: the main thread hears of that by itself."""
    done = Future()

    def wait() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(report)
        done.set_result(time.monotonic())

    threading.Thread(target=wait, daemon=True).start()
    return done
