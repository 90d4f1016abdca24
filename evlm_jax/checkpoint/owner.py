"""Who trains in a directory: one process at a time.

DIR/owner.json names the host, the process and a count that grows while it lives. A process that
finds the file takes over at once where the owner ran on its own host and is dead; that of another
host is waited for, until its count has stood still for a minute."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from etils import epath

from evlm_jax import paths

NAME = "owner.json"
BEAT, SILENCE = (
    10.0,
    60.0,
)  # seconds between two beats; without one, after which an owner on another host is dead


class Owner:
    """A lock on a run directory, from construction until `close`."""

    def __init__(self, root: epath.Path, beat: float = BEAT, silence: float = SILENCE):
        """Takes `root` over. Raises ValueError naming the process that trains there."""
        self._file, self._beat, self._lost = paths.place(root) / NAME, beat, False
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        _wait_for_former(self._file, beat, silence)
        self._write(0)
        self._check()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ValueError where another process has locked the directory meanwhile."""
        if self._lost:
            self._check()

    def close(self) -> None:
        """Releases the lock."""
        self._done.set()
        self._thread.join()
        found = read(self._file)
        if found and found.get("token") == self._me["token"]:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()

    def _live(self) -> None:
        count = 0
        while not self._done.wait(self._beat):
            count += 1
            try:
                if (read(self._file) or {}).get("token") != self._me[
                    "token"
                ]:  # another process has it, or it was removed
                    self._lost = True
                    return
                self._write(count)
            except (
                OSError
            ) as error:  # a disk that is full, a bucket out of reach: the next beat may pass
                print(f"{self._file}: {error}", flush=True)

    def _write(self, count: int) -> None:
        paths.write(self._file, json.dumps(self._me | {"count": count}))

    def _check(self) -> None:
        found = read(self._file)
        if not found or found.get("token") != self._me["token"]:
            raise ValueError(
                f"{self._file.parent}: another process has begun to train there: {_name(found)};"
                " this one stops"
            )


def read(file: epath.Path) -> dict | None:
    """The owner of a directory; None where there is none, or its file is incomplete."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _wait_for_former(file: epath.Path, beat: float, silence: float) -> None:
    """Until no other process holds the directory. Raises ValueError where one does."""
    first = found = read(file)
    if found is None or _dead(found):
        return
    refusal = f"{file.parent}: {_name(found)} trains there: stop it, or give another --workdir"
    if found.get("host") == socket.gethostname():
        raise ValueError(refusal)
    print(
        f"{file.parent}: was held by {_name(found)}; waiting {silence:g} s for a sign of life",
        flush=True,
    )
    end = time.monotonic() + silence
    while time.monotonic() < end:
        time.sleep(min(beat, silence) / 4)
        if (found := read(file)) is None:
            return
        if found != first:
            raise ValueError(refusal)


def _dead(found: dict) -> bool:
    """Whether the owner was a process of this host that is gone; one that has its number now began
    at another time.
    """
    if found.get("host") != socket.gethostname():
        return False
    return _started(found.get("pid")) != found.get("started") or found.get("pid") == os.getpid()


def _started(pid: int) -> str | None:
    """When a process of this host began; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc: only whether it lives
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError):
        return None
    except PermissionError:
        pass
    return "alive"


def _name(found: dict | None) -> str:
    return f"process {found.get('pid')} on {found.get('host')}" if found else "nobody any more"
