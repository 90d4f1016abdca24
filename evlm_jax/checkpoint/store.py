"""Checkpoints of a run: what changes at every save, and what it rests on, once.

    DIR/steps/120/params   trainable parameters        by canonical name, one array per layer:
    DIR/steps/120/groups   Adam state of every group   independent of stacks, cuts, mesh and stage
    DIR/steps/120/digests  of all that, chunk by chunk (digests.py): a damaged step is refused by
                           name
    DIR/steps/120/meta     format, step, phase, data position, config, names trained so far, and the
                           hash of what is in
    DIR/frozen/HASH        the frozen parameters in safetensors files, finalised before the first
                           step that names it
    DIR/owner.json         who trains there (owner.py)

The hash is of the content (frozen_store.py). A store is written again only where it does not hold
what a phase freezes: a phase that unfreezes more rests on the store of the phase before, and its
own trained values lie over it. What a store holds is known by where values were read, so nothing
that is frozen leaves the devices. Saves are asynchronous and atomic: written aside and renamed; in
a bucket a mark comes last and goes first. A store is deleted only when no step names it any more. A
model that was imported or upcycled is a store and a step 0 without trained parameters beside it."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from evlm_jax import paths
from evlm_jax.checkpoint import digests
from evlm_jax.checkpoint.frozen_store import read_store, write_store
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, read_all
from evlm_jax.checkpoint.owner import Owner
from evlm_jax.checkpoint.run_layout import (
    ASIDE,
    COMMITTED,
    FROZEN,
    MANIFEST,
    STEPS,
    atomicity,
    finished,
    free_name,
    half_written,
    read_object,
)
from evlm_jax.checkpoint.step_arrays import nest, open_arrays
from evlm_jax.config import EVLMConfig, compat, from_saved, to_saved
from evlm_jax.parallel.distributed import allgather_json, barrier, check_devices, is_first, log_once

Arrays = dict[str, np.ndarray]  # by canonical name
THREADS = 8  # that read a whole step
STEP = re.compile("0|[1-9][0-9]*")  # name of a step's folder


class Snapshot(NamedTuple):
    """One finalised step: tensors that are read when they are asked for, or arrays on the host."""

    params: Tensors | Arrays  # trainable
    frozen: Tensors | Arrays
    groups: Tensors | Arrays  # Adam states: "0/count", "0/mu/NAME", "0/nu/NAME", "1/count", ...
    meta: dict  # format, step, phase, data, config, trained, store

    def read(self) -> "Snapshot":
        """With all tensors as arrays; each is compared with its digest. Raises ValueError."""
        return Snapshot(*(read_all(tensors, THREADS) for tensors in self[:-1]), self.meta)


class Checkpoints:
    """Writer of a run directory.

    There is at most one per directory; readers use `read` and `load_params`.
    """

    def __init__(self, workdir: str, keep: int, keep_every: int = 0):
        """Opens or creates `workdir`; removes, and says, what an interrupted run left half-written.

        Args:
          keep: newest steps that stay.
          keep_every: steps that are multiples of it stay too; 0 for none.
        Raises ValueError where another process trains there, or where it cannot be written.
        """
        self.root, self._keep, self._keep_every = paths.place(workdir), keep, keep_every
        self._owner = _own(self.root)
        for part in (STEPS, FROZEN) if is_first() else ():
            paths.make(self.root / part)
            for path in paths.children(self.root / part):
                if half_written(path):
                    log_once(f"checkpoint: removing the half-written {path}")
                    path.rmtree()
        barrier("checkpoint: the directory is tidy")
        self._manager = ocp.CheckpointManager(self.root / STEPS, options=self._options())
        self._store, self._frozen = None, {}  # name and tensors of the store that steps rest on

    def resume(self, step: int | None = None) -> Snapshot | None:
        """Opens the newest finalised step, None in a new directory; or the given one. `go_on` is
        called when it has been read.

        Raises as `open_run` does.
        """
        if step is None and not steps(self.root):
            return None
        return open_run(self.root, step)

    def go_on(self, snapshot: Snapshot) -> None:
        """Continues from a step that `resume` opened: later ones are moved to DIR/aside."""
        self._store, self._frozen = snapshot.meta["store"], snapshot.frozen
        for later in (
            [found for found in steps(self.root) if found > snapshot.meta["step"]]
            if is_first()
            else ()
        ):
            log_once(
                f"checkpoint: going on from step {snapshot.meta['step']}, step {later} is put into"
                f" {self.root / ASIDE}"
            )
            paths.move(
                self.root / STEPS / str(later), free_name(self.root / ASIDE, later), COMMITTED
            )
        barrier("checkpoint: later steps are put aside")
        self._manager.reload()

    def freeze(self, tensors: Tensors) -> Tensors:
        """Writes a store of `tensors` unless all were opened from the one that steps rest on; steps
        that are saved from now on refer to it. Returns them as they are opened from there.
        """
        if not self._store or any(self._frozen.get(name) is not tensors[name] for name in tensors):
            written = write_store(self.root, tensors) if is_first() else None
            self._store = allgather_json(written)[0]
            self._frozen = read_store(self.root, self._store)
        return {name: self._frozen[name] for name in tensors}

    def save(
        self, step: int, params: dict[str, jax.Array], groups: dict[str, jax.Array], meta: dict
    ) -> None:
        """Begins to save, after the save before has ended; returns when the arrays have been copied
        from the devices.

        Raises ValueError where another process has locked the directory.
        """
        meta = meta | {"format": compat.FORMAT, "step": step, "store": self._store}
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(nest(params)),
            groups=ocp.args.PyTreeSave(nest(groups)),
            meta=ocp.args.JsonSave(meta),
            digests=ocp.args.JsonSave(digests.step_digests(meta, params=params, groups=groups)),
        )
        self._tidy()
        if self._owner:
            self._owner.check()
        if not self._manager.save(step, args=items):
            raise ValueError(
                f"{self.root}: step {step} was not saved, for there is a later one: give another"
                " --workdir"
            )

    def check(self) -> None:
        """Raises OSError where the save in progress has failed. Does not block."""
        if not self._manager.is_saving_in_progress():
            self._finished()

    def close(self) -> None:
        """Blocks until the save in progress has ended, and releases the directory."""
        try:
            self._tidy()
            self._manager.close()
        finally:
            if self._owner:
                self._owner.close()

    def _finished(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise errors of any kind
            newest = max(steps(self.root), default="none")
            raise OSError(
                f"{self.root}: a save failed, the newest step that was saved is {newest}: {error}"
            ) from error

    def _options(self) -> ocp.CheckpointManagerOptions:
        """On a disk what keep-n drops is renamed first, so that deleting is atomic too; in a bucket
        `_tidy` deletes, the mark first.
        """
        if paths.remote(self.root):
            return ocp.CheckpointManagerOptions(atomicity_options=atomicity(self.root))
        return ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            keep_period=self._keep_every or None,
            todelete_subdir="deleted",
        )

    def _tidy(self) -> None:
        """With no save under way: deletes what keep-n has put aside,
        and stores that no step names.
        """
        self._finished()
        if not is_first():
            return
        for step in steps(self.root)[: -self._keep] if paths.remote(self.root) else ():
            if not self._keep_every or step % self._keep_every:
                paths.remove(self.root / STEPS / str(step), COMMITTED)
        kept = [
            path
            for part in (STEPS, ASIDE)
            for path in paths.children(self.root / part)
            if path.name[0].isdigit()
        ]
        named = {_store(path) for path in kept} | {self._store}
        unused = (
            [path for path in paths.children(self.root / FROZEN) if path.name not in named]
            if None not in named
            else []
        )
        for path in [*unused, *paths.children(self.root / STEPS / "deleted")]:
            paths.remove(path, MANIFEST)


def write_imported(
    root: epath.Path, cfg: EVLMConfig, store: str, origin: dict, trained: Iterable[str] = ()
) -> None:
    """Writes step 0 of a model whose parameters are all in `store`.

    Args:
      origin: where the model comes from.
      trained: names that had been trained there.
    """
    meta = {
        "format": compat.FORMAT,
        "step": 0,
        "phase": 0,
        "data": None,
        "config": to_saved(cfg),
        "trained": sorted(trained),
    }
    meta |= {"store": store, "origin": origin}
    items = {
        "meta": ocp.args.JsonSave(meta),
        "digests": ocp.args.JsonSave(digests.step_digests(meta, params={}, groups={})),
    }
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(), atomicity_options=atomicity(root)
    ) as writer:
        writer.save(root / STEPS / "0", args=ocp.args.Composite(**items))


def identity(workdir: str, step: int | None) -> list:
    """[place, number, time] of a step, which distinguishes it from any other."""
    path = _find(workdir, step)[0]
    return [str(path), paths.version(path / "meta" / "metadata")]


def steps(workdir: str) -> list[int]:
    """Finalised steps, ascending."""
    found = paths.children(paths.place(workdir) / STEPS)
    return sorted(int(path.name) for path in found if STEP.fullmatch(path.name) and finished(path))


def check_step(workdir: str, step: int | None) -> int:
    """A finalised step, the newest for None. Raises FileNotFoundError where there is none."""
    found, folder = steps(workdir), paths.place(workdir)
    above = [up.parent for up in (folder, folder.parent) if up.name == STEPS]
    if run := next(filter(steps, above), None):
        raise FileNotFoundError(
            f"{folder} lies within a run: give {run}, and the number of the step apart"
        )
    if not found and step is None and not paths.remote(workdir):
        if folder.is_file():
            raise FileNotFoundError(f"{folder} is a file: give the folder of a run")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        if (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no run but a folder for transformers; `evlm convert import --model`"
                " makes a run of an export of ours, `--vision` and `--llm` of towers"
            )
    if not found or step not in (None, *found):
        raise FileNotFoundError(
            f"{folder} has no checkpoint{'' if step is None else f' of step {step}'};"
            f" finalised steps: {found or 'none'}"
        )
    return found[-1] if step is None else step


def open_step(workdir: str, step: int | None = None) -> Snapshot:
    """Opens a finalised step, the newest where `step` is None. What is read of it is compared with
    its digests.

    Raises:
      FileNotFoundError: no such step.
      ValueError: the step is damaged, named with the file or array; or the frozen store is missing
        or another one, with both hashes. Reading its tensors raises likewise.
    """
    path, meta, sums = _find(workdir, step)
    params, groups = (_item(path, item, sums) for item in ("params", "groups"))
    return Snapshot(params, read_store(path.parent.parent, meta["store"]), groups, meta)


def open_run(workdir: str, step: int | None = None) -> Snapshot:
    """`open_step` of a run that can go on. Raises as that does, and ValueError for an imported
    model.
    """
    snapshot = open_step(workdir, step)
    if not snapshot.groups:
        raise ValueError(
            f"{paths.place(workdir)} was imported or upcycled and is no run: give another workdir,"
            " and this as --init"
        )
    return snapshot


def read(workdir: str, step: int | None = None) -> Snapshot:
    """`open_step` as arrays in memory."""
    return open_step(workdir, step).read()


def open_params(workdir: str, step: int | None = None) -> tuple[dict[str, Tensor], EVLMConfig]:
    """All parameters of the model, of the step and of its frozen store, read lazily; and the
    config. Raises as `open_step` does.
    """
    path, meta, sums = _find(workdir, step)
    tensors = read_store(path.parent.parent, meta["store"]) | _item(path, "params", sums)
    return tensors, from_saved(meta["config"])


def load_params(workdir: str, step: int | None = None) -> tuple[Arrays, EVLMConfig]:
    """`open_params` as arrays in memory."""
    tensors, cfg = open_params(workdir, step)
    return read_all(tensors, THREADS), cfg


def trained(workdir: str, step: int | None = None) -> frozenset[str]:
    """Canonical names that this run or one before it trained: the next stage keeps their dtype."""
    return frozenset(_find(workdir, step)[1]["trained"])


def _own(root: epath.Path) -> Owner | None:
    """The directory is this run's, or ValueError on all of its processes."""
    owner, refusal = None, None
    if is_first():
        try:
            paths.make(root)
            owner = Owner(root)
        except (ValueError, OSError) as error:
            refusal = str(error)
    if refusals := list(filter(None, allgather_json(refusal))):
        raise ValueError(refusals[0])
    return owner


def _find(workdir: str, step: int | None) -> tuple[epath.Path, dict, dict | None]:
    """Where a step lies, its meta, and its digests; None for one of a format that had none."""
    path = paths.place(workdir) / STEPS / str(check_step(workdir, step))
    with _blamed(path):
        meta = read_object(path / "meta" / "metadata")
        if compat.check(meta.get("format", 0), str(path)) == 0 and not (path / "digests").exists():
            return path, meta, None
        sums = read_object(path / "digests" / "metadata")
        if digests.json_digest(meta) != sums["meta"]:
            raise ValueError("meta/metadata is not what was saved there (its digest differs)")
        if meta["step"] != int(path.name):
            raise ValueError(f"it is step {meta['step']} under another name")
    return path, meta, sums


def _item(path: epath.Path, item: str, sums: dict | None) -> dict[str, Tensor]:
    """The arrays of an item of a step."""
    blamed = partial(_blamed, path)
    with blamed():
        return open_arrays(path / item, sums and sums[item], blamed)


@contextlib.contextmanager
def _blamed(path: epath.Path) -> Iterator[None]:
    """Whatever goes wrong in reading a step, the error names the step and says how to go on."""
    check_devices()  # that there is none is no fault of the step
    try:
        yield
    except Exception as error:  # of orbax, tensorstore, JSON, or ours
        before = [step for step in steps(path.parent.parent) if step < int(path.name)]
        mend = (
            f"go on from the step before it with --step {before[-1]}"
            if before
            else "copy the original there"
        )
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"step {path.name} cannot be read from {path}: {what[:300]}; {mend}"
        ) from error


def _store(path: epath.Path) -> str | None:
    """The store that a step names; None where that cannot be read."""
    try:
        return read_object(path / "meta" / "metadata")["store"]
    except (ValueError, KeyError, OSError):
        return None
