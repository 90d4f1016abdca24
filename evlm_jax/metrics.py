"""What a run reports: a progress bar, DIR/metrics.jsonl (journal.py) and, where asked, TensorBoard.

Values arrive on the host some steps after they were dispatched, so reporting never makes the device
wait. Between two lines losses are averaged over targets, rates over time, used shares of the
budgets over steps; samples that the data left out are counted by cause, updates that were not
finite as "bad_updates"; FLOPs needed are means over steps; time and goodput are of the run so far
(goodput.py); the other values are those of the line's own step."""

import json
import os
import time
from collections import Counter
from collections.abc import Collection
from typing import Self

import jax
import numpy as np
from tqdm import tqdm

from evlm_jax import flops
from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.data.pack import Drop
from evlm_jax.flops import real_tokens, seen_images
from evlm_jax.goodput import Goodput
from evlm_jax.journal import Journal, read_lines
from evlm_jax.parallel.chips import peak_flops
from evlm_jax.parallel.distributed import allgather_json, is_first
from evlm_jax.paths import COPIES, Mirror, place

SECONDS = "monitor/seconds"  # that were spent on something else than training


class Meter:
    """Collects the values of every step and writes a line each `train.log_every` steps."""

    def __init__(
        self,
        cfg: EVLMConfig,
        workdir: str,
        step: int,
        devices: int,
        tensorboard: bool,
        began: float | None = None,
    ):
        """Continues the files of `workdir` behind `step`; later lines, of a run that was cut off,
        are dropped.

        `began`: when this process began with the run (time.monotonic); now where left out.

        Raises:
          ImportError: `tensorboard` is asked for and tensorboardX is not installed.
        """
        self._cfg = cfg
        self._peak = devices * (cfg.train.peak_flops or peak_flops(jax.devices()[0]))

        def finished(line):
            return json.loads(line)["step"] <= step

        self._journal = Journal(place(workdir) / "metrics.jsonl", finished) if is_first() else None
        former = _last_line(workdir) if is_first() else {}
        self.goodput = Goodput(time.monotonic() if began is None else began, former)
        self._files = Mirror(place(workdir) / "tensorboard") if tensorboard and is_first() else None
        self._board = _board(self._files.here, step) if self._files else None
        bar = {
            "total": cfg.train.steps,
            "initial": step,
            "unit": "step",
            "dynamic_ncols": True,
            "disable": not is_first(),
        }
        self._bar = tqdm(
            desc=_title(cfg.name, workdir), **bar, delay=1e-6
        )  # not drawn before the first update
        self._dropped, self._notes = {}, {}
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self.flush()
        if self._board:
            self._board.close()
            self._files.close()

    def flush(self) -> None:
        """Writes all lines that are still buffered."""
        if self._journal:
            self._journal.flush()

    def add(self, step: int, batch: dict[str, float], values: dict) -> None:
        """Adds the values of update `step` (1-based), on the host; `batch` is the result of `work`
        for its batch.
        """
        good = bool(values["good"])
        self._own.update(batch)
        self._sums.update(_sums(self._cfg, values) if good else {"bad_updates": 1.0})
        self._steps += 1
        self._bar.update()
        self._bar.delay = 0  # there is a bar: it ends with its last numbers and a line
        noted = self._notes.pop(step, {})
        if step % self._cfg.train.log_every == 0 or step == self._cfg.train.steps:
            now = {"lr": values["lr"]} | _gates(self._cfg, values.get("gates", {}))
            if good:
                now |= {"grad_norm": values["grad_norm"]} | _routing(
                    self._cfg, values.get("routing")
                )
            self._write(step, self._summary() | self.goodput.line() | now | noted)
            self._reset()
        elif noted:
            self._write(step, noted)

    def note(self, step: int, values: dict[str, float] | None) -> None:
        """Adds other values of update `step`, before `add`; they become part of its line, or of one
        of their own.

        SECONDS among them count in no rate.
        """
        if values:
            self._notes[step] = values
            self._since += values.get(SECONDS, 0.0)

    def _summary(self) -> dict[str, float]:
        """Means over the targets and rates since the last line."""
        shares = allgather_json(self._own)  # each process has seen its own rows
        seconds, sums, totals = time.monotonic() - self._since, self._sums, Counter()
        for share in shares:
            totals.update(share)
        out = {"bad_updates": sums["bad_updates"]} if sums["bad_updates"] else {}
        if sums["bad_updates"] < self._steps:
            out["loss"] = sums["loss"] / max(sums["count"], 1)
        for source in self._cfg.data.sources:
            if count := sums[f"count/{source}"]:
                out[f"loss/{source}"] = sums[f"loss/{source}"] / count
        out |= {f"{name}_per_s": totals[name] / seconds for name in ("tokens", "images")} | {
            "step_seconds": seconds / self._steps
        }
        out |= {name: totals[name] / self._steps for name in ("flops", "flops/vision")}
        if self._peak:
            out["mfu"] = totals["flops"] / (seconds * self._peak)
        out |= {
            name: value / (self._steps * len(shares))
            for name, value in totals.items()
            if name.startswith("fill/")
        }
        return out | {
            name: value for name, value in totals.items() if name.startswith(("dropped/", "cut"))
        }

    def dropped(self, drops: list[Drop]) -> None:
        """Reports samples that were left out: the first of each cause in words, all of them by
        number on the bar.
        """
        for drop in drops:
            self._dropped[drop.cause] = self._dropped.get(drop.cause, 0) + 1
            if self._dropped[drop.cause] == 1:
                self._bar.write(
                    f"left out, {drop.cause}: {drop.message}; further ones are counted only"
                )

    def tell(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if is_first():
            self._bar.write(text)

    def _write(self, step: int, line: dict) -> None:
        if not is_first():
            return
        line = {name: np.asarray(value, np.float64).tolist() for name, value in line.items()}
        self._journal.append([json.dumps({"step": step, **line})])
        for name, value in line.items() if self._board else ():
            for part, number in enumerate(value) if isinstance(value, list) else ():
                self._board.add_scalar(f"{name}/{part}", number, step)
            if not isinstance(value, list):
                self._board.add_scalar(name, value, step)
        if self._files:
            self._files.copy(COPIES)
        if "loss" in line:
            rates = {name: f"{line[f'{name}_per_s']:.1f}/s" for name in ("tokens", "images")}
            self._bar.set_postfix({"loss": f"{line['loss']:.3f}"} | rates | self._dropped)

    def _reset(self) -> None:
        self._own, self._sums, self._steps, self._since = Counter(), Counter(), 0, time.monotonic()


def training_lines(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl about updates, without those that have notes alone."""
    return [line for line in map(json.loads, read_lines(path)) if "loss" in line]


def _last_line(workdir: str) -> dict:
    """The last line about updates of a run; empty where there is none."""
    return ([{}] + training_lines(place(workdir) / "metrics.jsonl"))[-1]


def work(cfg: EVLMConfig, batch: Batch, info: dict, trained: Collection[str]) -> dict[str, float]:
    """Counts of a batch of NumPy arrays, without padding: text tokens, images, FLOPs needed, of
    them those of the vision tower, and the counts of `info`.

    `trained`: canonical names of the parameters that train.
    """
    counts = {"tokens": float(real_tokens(batch).sum()), "images": float(seen_images(batch))}
    needed = flops.needed(cfg, trained, flops.Work.of(cfg, batch))
    counts["flops"] = sum(cost.total for cost in needed.values())
    counts["flops/vision"] = sum(
        needed[part].total for part in (flops.FROZEN_VIT, flops.TRAINED_VIT) if part in needed
    )
    counts |= {f"fill/{name}": share for name, share in info["fill"].items()} | {
        "cut": float(info["cut"])
    }
    return counts | {
        f"dropped/{cause}": float(n)
        for cause, n in Counter(drop.cause for drop in info["drops"]).items()
    }


def _title(name: str, workdir: str) -> str:
    """The config's name, and the run's where it is another: experiments are often made from one
    another and keep the name.
    """
    folder = place(workdir).name
    return name if folder in ("", name) else f"{name}, {folder}"


def _sums(cfg: EVLMConfig, values: dict) -> dict[str, float]:
    """Losses and counts of a step, overall and per source."""
    loss, count = values["source_loss"], values["source_count"]
    named = {
        f"{kind}/{name}": array[i]
        for kind, array in (("loss", loss), ("count", count))
        for i, name in enumerate(cfg.data.sources)
    }
    return named | {"loss": loss.sum(), "count": count.sum()}


def _gates(cfg: EVLMConfig, gates: dict) -> dict[str, float]:
    """{name of a gate: its opening in all blocks [X]} -> {name of one: its opening}."""
    return {
        f"xattn/{layer}/{name}": opening
        for name, openings in gates.items()
        for layer, opening in zip(cfg.cross_layers, openings, strict=True)
    }


def _routing(cfg: EVLMConfig, routing: dict | None) -> dict:
    """models/moe.py's Routing of all blocks, as {field: [blocks, ...]} -> means over tokens by
    canonical name; loads are shares [E].
    """
    if routing is None:
        return {}
    tokens, load = np.maximum(routing["tokens"], 1), routing["load"]
    mean = {name: routing[name] / tokens for name in ("entropy", "balance", "z")}
    out = {"auxiliary_loss": (cfg.moe.balance * mean["balance"] + cfg.moe.z * mean["z"]).sum()}
    for i, layer in enumerate(cfg.cross_layers):
        shares = {"load": load[i].sum(0), "load_text": load[i, 0], "load_media": load[i, 1]}
        values = {name: count / max(count.sum(), 1) for name, count in shares.items()}
        values |= {name: value[i] for name, value in mean.items()} | {
            "dropped": routing["dropped"][i]
        }
        out |= {f"xattn/{layer}/ffn/{name}": value for name, value in values.items()}
    return out


def _board(folder: os.PathLike, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'TensorBoard was asked for: pip install "evlm-jax[demo]", or train with'
            " tensorboard=False"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=COPIES)
