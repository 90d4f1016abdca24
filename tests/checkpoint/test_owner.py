"""One process trains in a directory: a live owner is left alone, a dead one is followed at once, a
silent one after a while.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from evlm_jax.checkpoint import owner
from evlm_jax.checkpoint.owner import NAME, Owner

HOLD = """
import pathlib, sys, time
from evlm_jax.checkpoint.owner import Owner
Owner(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_owner_is_named_and_left_alone(tmp_path, other):
    before = (tmp_path / NAME).read_text()
    with pytest.raises(
        ValueError,
        match=(
            f"process {other.pid} on {socket.gethostname()} trains there: stop it, or give another"
            " --workdir"
        ),
    ):
        Owner(tmp_path)
    assert (tmp_path / NAME).read_text() == before and other.poll() is None


def test_a_killed_owner_is_followed_at_once(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    mine = Owner(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    mine.close()
    assert not (tmp_path / NAME).exists()


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path, other):
    found = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(found | {"started": "1"}))
    Owner(tmp_path).close()


def elsewhere(folder, count=0):
    (folder / NAME).write_text(
        json.dumps({"host": "another", "pid": 1, "started": "1", "token": "x", "count": count})
    )


def test_a_silent_owner_on_another_host_is_followed_after_a_while(tmp_path, capsys):
    elsewhere(tmp_path)
    Owner(tmp_path, beat=0.2, silence=0.5).close()
    assert "process 1 on another; waiting 0.5 s" in capsys.readouterr().out


def test_an_owner_on_another_host_that_lives_is_left_alone(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    counts = iter(range(1, 100))
    monkeypatch.setattr(owner.time, "sleep", lambda _: elsewhere(tmp_path, next(counts)))
    with pytest.raises(ValueError, match="process 1 on another trains there"):
        Owner(tmp_path, beat=0.2, silence=5)
    assert json.loads((tmp_path / NAME).read_text())["host"] == "another"


def test_who_is_followed_notices_it(tmp_path):
    mine = Owner(tmp_path, beat=0.05)
    mine.check()
    elsewhere(tmp_path)
    mine._thread.join(10)
    with pytest.raises(
        ValueError,
        match="another process has begun to train there: process 1 on another; this one stops",
    ):
        mine.check()
    mine.close()
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"host": 3}'])
def test_a_file_that_names_nobody_holds_nothing(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    Owner(tmp_path, beat=0.05, silence=0.1).close()
