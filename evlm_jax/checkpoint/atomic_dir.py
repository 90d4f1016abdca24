"""A directory that is there whole or not at all, and whose writing goes on where it was cut off."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from evlm_jax import paths

PLAN = "plan.json"


@contextmanager
def new_folder(out: str, plan: dict) -> Iterator[epath.Path]:
    """Context with a folder to write into: OUT.incomplete, which is renamed to `out` at the end. In
    a bucket it is `out` itself, incomplete while PLAN is in it.

    After a kill or an interrupt it stays, and the next writing of the same `plan` continues in it.
    After an error it is removed.

    Args:
      plan: what decides the content, JSON-able.
    Raises:
      FileExistsError: `out` exists.
    """
    check_free(out)
    out = paths.place(out)
    folder = out if paths.remote(out) else out.parent / f"{out.name}.incomplete"
    text = json.dumps(plan, sort_keys=True)
    if folder.exists() and not ((folder / PLAN).exists() and (folder / PLAN).read_text() == text):
        folder.rmtree()
    paths.make(folder)
    (folder / PLAN).write_text(text)
    try:
        yield folder
    except Exception:
        folder.rmtree()
        raise
    (folder / PLAN).unlink()
    if folder != out:
        folder.rename(out)


def check_free(out: str) -> None:
    """Raises FileExistsError where `out` exists, and is not one that `new_folder` left unfinished
    in a bucket.
    """
    out = paths.place(out)
    there = out.exists() or os.path.islink(out)  # a link to nothing cannot be replaced by a folder
    if there and not (paths.remote(out) and (out / PLAN).exists()):
        raise FileExistsError(f"{out} exists; give a new directory, or remove it")


def check(folder: epath.Path) -> None:
    """Raises ValueError for a folder in a bucket that is incomplete."""
    if paths.remote(folder) and (folder / PLAN).exists():
        raise ValueError(
            f"{folder} is unfinished ({PLAN} is in it): run the command that writes it again"
        )
