"""What the loop keeps an eye on: the values of steps that were dispatched a while ago, and whether
a save is due.
"""

import time
from collections import deque
from typing import Any

import jax
from etils import epath

from evlm_jax.config import TrainConfig
from evlm_jax.metrics import Meter
from evlm_jax.parallel.distributed import allgather_json
from evlm_jax.paths import Mirror

IN_FLIGHT = 2  # steps dispatched before the host looks at the values of an older one


class Watch:
    """Passes the values of steps to the meter, oldest first, and counts those whose loss or
    gradient is not finite.
    """

    def __init__(self, meter: Meter, most: int, bad: int):
        """`most`: bad updates that a run may have; `bad`: those it had before."""
        self._meter, self._most, self.bad = meter, most, bad
        self._pending, self._row = deque(), 0

    @property
    def sound(self) -> bool:
        """Whether the parameters may be saved: not after two bad updates in a row, of which they,
        not a batch, are the cause.
        """
        return self._row < 2

    def add(self, step: int, keys: list, counted: dict[str, float], report: Any) -> None:
        """Adds a step that was dispatched; its `report` is still on the devices."""
        self._pending.append((step, keys, counted, report))
        self.look(IN_FLIGHT)

    def look(self, left: int = 0) -> None:
        """Reports steps, oldest first, until `left` are left.

        Raises:
          FloatingPointError: too many were bad.
          ValueError: processes that read the same rows have other ones (agreement.py).
        """
        while len(self._pending) > left:
            step, keys, counted, report = self._pending.popleft()
            report = jax.device_get(report)
            if not report.get("same", True):
                raise ValueError(
                    f"step {step}: processes that read the same rows (mesh.tensor) have read other"
                    f" ones. {_samples(keys)}"
                )
            self._row = 0 if report["good"] else self._row + 1
            if not report["good"]:
                self._tell(
                    step,
                    keys,
                    f"sum of losses {report['source_loss'].sum()}, gradient norm"
                    f" {report['grad_norm']}",
                )
            self._meter.add(step, counted, report)

    def _tell(self, step: int, keys: list, sums: str) -> None:
        self.bad += 1
        text = (
            f"step {step}: {sums}; this update changed nothing, it is the run's {self.bad}. of that"
            f" kind. {_samples(keys)}"
        )
        if self.bad > self._most:
            raise FloatingPointError(
                f"{text}. Stopped, for train.bad_updates is {self._most}; a greater one goes past"
                " them"
            )
        self._meter.tell(text)


def _samples(keys: list) -> str:
    """Keys of a step's samples, on all processes."""
    return f"Its samples: {', '.join(str(row) for rows in allgather_json(keys) for row in rows)}"


class Due:
    """Decides when a save is due: each `save_every` updates, and each `save_minutes` by the clock
    of the first process, checked when metrics are logged.
    """

    def __init__(self, cfg: TrainConfig):
        self._cfg, self._since, self._owed = cfg, time.monotonic(), False

    def __call__(self, step: int) -> bool:
        """After update `step`; what is due stays due until it is done."""
        late = False
        if self._cfg.save_minutes and step % self._cfg.log_every == 0:
            late = allgather_json(time.monotonic() - self._since)[0] >= 60 * self._cfg.save_minutes
        self._owed |= step % self._cfg.save_every == 0 or late
        return self._owed

    def done(self) -> None:
        """Records that a save was made."""
        self._owed, self._since = False, time.monotonic()


class Trace:
    """JAX's profile of the updates (first, last), in `folder`; nothing where there is no such
    span.
    """

    def __init__(self, folder: epath.Path, span: tuple[int, int] | None):
        self._folder, self._span, self._files = folder, span, None

    def before(self, step: int) -> None:
        """Starts the trace before the first update."""
        if self._span and step == self._span[0]:
            self._files = Mirror(self._folder)
            jax.profiler.start_trace(str(self._files.here))

    def after(self, step: int, last: bool, state: Any) -> None:
        """Stops the trace after the last update of the span, or of the run."""
        if self._files and (last or step == self._span[1]):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._files.close()
            self._files = None
