"""Checkpoints of a run: what changes at every save, and what it rests on, once.

    DIR/steps/120/params   trainable parameters          by canonical name, one array per layer: independent of stacks,
    DIR/steps/120/groups   Adam state of every group     cuts, mesh and stage
    DIR/steps/120/meta     step, phase, data position, config, names trained so far, and the hash of
    DIR/frozen/HASH        the frozen parameters, finalised before the first step that names it

The hash is of the content. A store is written again only where it does not hold what a phase freezes: a phase that unfreezes
more rests on the store of the phase before, and its own trained values lie over it. Saves are asynchronous and atomic (orbax
writes aside and renames); a store is deleted only when no step names it any more.
"""

import hashlib
import json
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from evlm_jax.config import EVLMConfig, from_config_dict

Arrays = dict[str, np.ndarray]  # by canonical name
STEPS, FROZEN = "steps", "frozen"


class Snapshot(NamedTuple):
    """One finalised step, on the host."""

    params: Arrays  # trainable
    frozen: Arrays
    groups: Arrays  # Adam states: "0/count", "0/mu/NAME", "0/nu/NAME", "1/count", ...
    meta: dict  # step, phase, data, config, trained, store


class Checkpoints:
    """The writer of a run directory. At most one per directory; readers use `read` and `load_params`."""

    def __init__(self, workdir: str, keep: int):
        """Opens or creates `workdir`; removes, and says, what an interrupted run left half-written."""
        self.root = epath.Path(workdir).resolve()
        for part in (STEPS, FROZEN):
            (self.root / part).mkdir(parents=True, exist_ok=True)
            for path in (self.root / part).glob("*.orbax-checkpoint-tmp*"):
                print(f"checkpoint: removing the half-written {path}", flush=True)
                path.rmtree()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, todelete_subdir="deleted")  # renamed first: deleting is atomic too
        self._manager = ocp.CheckpointManager(self.root / STEPS, options=options)
        self._store = None

    def resume(self) -> Snapshot | None:
        """The newest finalised step, None in a new directory. Raises as `read` does."""
        if not steps(self.root):
            return None
        snapshot = read(self.root)
        self._store = snapshot.meta["store"]
        return snapshot

    def freeze(self, arrays: Arrays) -> None:
        """Makes sure that a store holds `arrays`; the steps saved from now on rest on it."""
        manifest = _manifest(arrays)
        if self._store and manifest.items() <= json.loads(_manifest_file(self.root, self._store).read_text()).items():
            return
        self._store = _digest(manifest)
        if not (self.root / FROZEN / self._store).exists():
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                items = ocp.args.Composite(params=ocp.args.PyTreeSave(_nest(arrays)), manifest=ocp.args.JsonSave(manifest))
                writer.save(self.root / FROZEN / self._store, args=items)

    def save(self, step: int, params: dict[str, jax.Array], groups: dict[str, jax.Array], meta: dict) -> None:
        """Starts saving, after a save still under way has ended; returns when the arrays have left the devices."""
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(_nest(params)),
            groups=ocp.args.PyTreeSave(_nest(groups)),
            meta=ocp.args.JsonSave(meta | {"step": step, "store": self._store}),
        )
        self._tidy()
        self._manager.save(step, args=items)

    def close(self) -> None:
        """Waits for the save under way."""
        self._tidy()
        self._manager.close()

    def _tidy(self) -> None:
        """With no save under way: deletes what keep-n has put aside, and stores that no step names."""
        self._manager.wait_until_finished()
        named = {_meta(self.root, step)["store"] for step in steps(self.root)} | {self._store}
        unused = [path for path in (self.root / FROZEN).iterdir() if path.name not in named]
        for path in [*unused, *(self.root / STEPS / "deleted").glob("*")]:
            path.rmtree()


def steps(workdir: str) -> list[int]:
    """Finalised steps, ascending."""
    return sorted(int(path.name) for path in (epath.Path(workdir) / STEPS).glob("*") if path.name.isdigit())


def read(workdir: str, step: int | None = None, groups: bool = True) -> Snapshot:
    """A finalised step, the newest where `step` is None.

    Raises:
      FileNotFoundError: no such step.
      ValueError: the frozen store is missing or another one; names the hash needed and the hash found.
    """
    root = epath.Path(workdir).resolve()
    found = steps(root)
    if not found or (step is not None and step not in found):
        raise FileNotFoundError(f"{root} has no checkpoint{'' if step is None else f' of step {step}'}; finalised steps: {found or 'none'}")
    path = root / STEPS / str(found[-1] if step is None else step)
    meta = _meta(root, path.name)
    return Snapshot(_arrays(path / "params"), _frozen(root, meta["store"]), _arrays(path / "groups") if groups else {}, meta)


def load_params(workdir: str, step: int | None = None) -> tuple[Arrays, EVLMConfig]:
    """All parameters of the model, trained ones over the frozen store, and the config. Raises as `read` does."""
    snapshot = read(workdir, step, groups=False)
    return snapshot.frozen | snapshot.params, from_config_dict(snapshot.meta["config"])


def trained(workdir: str, step: int | None = None) -> frozenset[str]:
    """Names that this run or one before it trained: the next stage keeps their bits."""
    found = steps(workdir)
    return frozenset(_meta(epath.Path(workdir), found[-1] if step is None else step)["trained"])


def _frozen(root: epath.Path, store: str) -> Arrays:
    path = root / FROZEN / store
    if not path.exists():
        present = ", ".join(sorted(p.name for p in (root / FROZEN).glob("*"))) or "none"
        raise ValueError(f"the checkpoint needs the frozen store {store}, {root / FROZEN} has {present}: copy {store} there")
    arrays = _arrays(path / "params")
    if (digest := _digest(_manifest(arrays))) != store:
        raise ValueError(f"the checkpoint needs the frozen store {store}, the content of {path} has hash {digest}: copy the original there")
    return arrays


def _meta(root: epath.Path, step: int | str) -> dict:
    return json.loads((root / STEPS / str(step) / "meta" / "metadata").read_text())


def _manifest_file(root: epath.Path, store: str) -> epath.Path:
    return root / FROZEN / store / "manifest" / "metadata"


def _arrays(path: epath.Path) -> Arrays:
    """What was saved at `path`, as NumPy."""
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
    return flatten_dict(handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)), sep="/")


def _nest(arrays: dict) -> dict:
    return unflatten_dict(arrays, sep="/")


def _manifest(arrays: Arrays) -> dict[str, str]:
    """{name: hash of dtype, shape and bytes}."""
    content = lambda a: hashlib.sha256(f"{a.dtype} {a.shape} ".encode() + np.ascontiguousarray(a).tobytes()).hexdigest()
    return {name: content(np.asarray(array)) for name, array in arrays.items()}


def _digest(manifest: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
