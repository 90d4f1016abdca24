"""A damaged step is refused by name, with the step to go on from; what is not refused is equal bit
for bit.
"""

import json
import shutil

import numpy as np
import pytest

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.store import Checkpoints
from tests.checkpoint.test_checkpoint import arrays, run, same

FROZEN = arrays(0, "vit/cls", "llm/layers/0/mlp/up/kernel")
FLIPS = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two steps, and what its newest holds."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, FROZEN, 3, 6)
    return folder, store.read(folder)


def files(folder):
    """Of the newest step and of the frozen store."""
    return sorted(
        path
        for part in ("steps/6", "frozen")
        for path in (folder / part).rglob("*")
        if path.is_file()
    )


def equal(a, b):
    return (
        all(same(getattr(a, part), getattr(b, part)) for part in ("params", "frozen", "groups"))
        and a.meta == b.meta
    )


def test_flipped_bits_are_found_or_change_nothing(whole, tmp_path):
    """Over parameters, moments, frozen store, data position and config: every file in turn, at a
    random bit.
    """
    folder, expected = whole
    rng, found = np.random.default_rng(0), 0
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    places = [path for path in files(copy) if path.stat().st_size]
    for flip in range(FLIPS):
        path = places[flip % len(places)]
        content = path.read_bytes()
        at, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        try:
            assert equal(store.read(copy), expected), (
                f"{path.relative_to(copy)}: bit {bit} of byte {at} passed unseen"
            )
        except ValueError as error:
            found += 1
            assert (
                ("step 6" in str(error) or "frozen" in str(error))
                and str(copy) in str(error)
                and "\n" not in str(error)
            )
        finally:
            path.write_bytes(content)
    assert equal(store.read(copy), expected) and found > FLIPS / 3


@pytest.mark.parametrize("what", ["params", "groups", "data", "config", "store"])
def test_a_changed_value_is_named(whole, tmp_path, what):
    """Not noise but a valid value: another number in the JSON, or the arrays of another step."""
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    if what in ("params", "groups"):
        shutil.rmtree(copy / "steps/6" / what)
        shutil.copytree(copy / "steps/3" / what, copy / "steps/6" / what)
        name = f"{what}/.* is not what was saved there"
    else:
        file = copy / "steps/6/meta/metadata"
        meta = json.loads(file.read_text())
        if what == "config":
            meta["config"]["optim"]["lr"] *= 2
        else:
            meta[what] = {"next": 5} if what == "data" else "0" * 16
        file.write_text(json.dumps(meta))
        name = "meta/metadata is not what was saved there"
    with pytest.raises(
        ValueError,
        match=(
            f"step 6 cannot be read from .*: {name}.*; go on from the step before it with --step 3"
        ),
    ):
        store.read(copy)


def test_a_cut_off_step_is_named_and_the_one_before_goes_on(whole, tmp_path):
    """Twenty places; then the run goes on from step 3 and saves step 6 anew."""
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    places = [
        path
        for path in files(copy)
        if path.stat().st_size > 20 and "steps" in path.parts and "commit" not in path.name
    ]
    cut = 0
    for path in places * 3:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * (cut % 3) // 3])
        checkpoints = Checkpoints(copy, keep=2)
        try:
            snapshot = checkpoints.resume().read()
            assert equal(snapshot, whole[1]), path  # a file that restoring does not need
        except ValueError as error:
            cut += 1
            assert (
                "step 6 cannot be read" in str(error)
                and "--step 3" in str(error)
                and "\n" not in str(error)
            )
        finally:
            checkpoints.close()
            path.write_bytes(content)
        if cut == 20:
            break
    assert cut == 20
    path.write_bytes(content[:10])
    checkpoints = Checkpoints(copy, keep=2)
    snapshot = checkpoints.resume(3)
    assert snapshot.meta["step"] == 3 and store.steps(copy) == [3, 6]
    checkpoints.go_on(snapshot)
    checkpoints.close()
    assert store.steps(copy) == [3] and [path.name for path in (copy / "aside").iterdir()] == ["6"]
    run(copy, FROZEN, 6)
    assert store.read(copy).meta["step"] == 6


def test_digests_that_are_missing_are_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/steps/6/digests")
    with pytest.raises(ValueError, match="step 6 cannot be read .*digests"):
        store.read(tmp_path / "copy")


def test_a_step_under_another_name_is_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    (tmp_path / "copy/steps/6").rename(tmp_path / "copy/steps/7")
    with pytest.raises(ValueError, match="step 7 cannot be read .*: it is step 6 under another"):
        store.read(tmp_path / "copy")
    (tmp_path / "copy/steps/7").rename(tmp_path / "copy/steps/06")
    assert store.steps(tmp_path / "copy") == [3]
