"""The names in a run's directory (store.py draws it), and which of its parts are whole."""

import json

import orbax.checkpoint as ocp
from etils import epath

from evlm_jax import paths

STEPS, FROZEN, ASIDE = "steps", "frozen", "aside"
MANIFEST, CHUNKS, INCOMPLETE = "manifest.json", "chunks.json", ".incomplete"
COMMITTED = "commit_success.txt"  # orbax writes it into a step when all else is there


def free_name(folder: epath.Path, step: int) -> epath.Path:
    """An unused name in `folder`."""
    names = (f"{step}" if count == 0 else f"{step}.{count}" for count in range(1000))
    return next(folder / name for name in names if not (folder / name).exists())


def atomicity(root: epath.Path) -> ocp.options.AtomicityOptions | None:
    """Options of orbax for a folder: a bucket has no atomic rename."""
    if not paths.remote(root):
        return None
    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


def finished(path: epath.Path) -> bool:
    """Whether a step or a store is complete: its last file exists, or a step has its final name on
    a disk.
    """
    if path.parent.name == FROZEN:
        return (path / MANIFEST).exists()
    return (path / COMMITTED).exists() if paths.remote(path) else path.exists()


def half_written(path: epath.Path) -> bool:
    """Whether something below steps/ or frozen/ is the rest of a killed save."""
    if ".orbax-checkpoint-tmp" in path.name or path.name.endswith(INCOMPLETE):
        return True
    return (path.name.isdigit() or path.parent.name == FROZEN) and not finished(path)


def read_object(file: epath.Path) -> dict:
    """Reads a JSON object. Raises ValueError naming the file where it is not one."""
    try:
        found = json.loads(file.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object")
    return found
