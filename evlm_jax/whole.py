"""A directory that is there whole or not at all, and whose writing goes on where it was cut off."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

PLAN = "plan.json"


@contextmanager
def whole(out: str, plan: dict) -> Iterator[epath.Path]:
    """A folder to write into, OUT.incomplete, which becomes `out` at the end.

    A kill or an interrupt leaves it: the next writing of the same `plan` finds what is there. After an error it is removed.

    Args:
      plan: what decides the content, for JSON.
    Raises:
      FileExistsError: `out` is there already.
    """
    out = epath.Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new directory, or remove it")
    folder = out.parent / f"{out.name}.incomplete"
    text = json.dumps(plan, sort_keys=True)
    if folder.exists() and not ((folder / PLAN).exists() and (folder / PLAN).read_text() == text):
        folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(text)
    try:
        yield folder
    except Exception:
        folder.rmtree()
        raise
    (folder / PLAN).unlink()
    folder.rename(out)
