"""The arrays of one item of a step, as orbax saved them, held against their digests."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from evlm_jax.checkpoint import digests


def read_arrays(
    path: epath.Path, saved: dict | None, sums: digests.Chunks | None
) -> dict[str, np.ndarray]:
    """NumPy arrays that orbax saved at `path`, or those of them named in `saved`, compared with
    their digests where there are any.
    """
    if not path.exists():
        check_names(path, {}, sums)
        return {}
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree if saved is None else nest(saved)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    part = {"item": tree, "partial_restore": True} if saved else {}
    arrays = flatten_dict(
        handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy, **part)), sep="/"
    )
    if sums is not None:
        check_names(path, arrays, sums)
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            list(
                pool.map(
                    lambda name: digests.check(f"{path.name}/{name}", arrays[name], sums[name]),
                    arrays,
                )
            )
    return arrays


def check_names(path: epath.Path, found: dict, sums: digests.Chunks | None) -> None:
    """Raises ValueError where an item has other arrays than were saved."""
    if sums is not None and (wrong := sorted(found.keys() ^ sums.keys())):
        raise ValueError(
            f"{path.name} has other arrays than were saved there, first of them {wrong[0]}"
        )


def nest(arrays: dict) -> dict:
    """Nested dicts by the parts of the names, the form that orbax expects."""
    return unflatten_dict(arrays, sep="/")
