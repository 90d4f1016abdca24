"""What a run leaves on disk: steps over a frozen store, found again with equal bits or refused by
name.
"""

import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from evlm_jax.checkpoint import lazy_tensors
from evlm_jax.checkpoint import store as checkpoint
from evlm_jax.checkpoint.lazy_tensors import opened
from evlm_jax.checkpoint.store import Checkpoints
from evlm_jax.config import to_dict
from tests.helpers.tiny import tiny_config

CFG = tiny_config()


def arrays(seed, *names):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((3, 2)).astype(ml_dtypes.bfloat16 if "llm" in name else np.float32)
        )
        for name in names
    }


def save(checkpoints, step, params, trained=()):
    meta = {"phase": 0, "data": {"next": step}, "config": to_dict(CFG), "trained": sorted(trained)}
    groups = {"0/count": jnp.int32(step)} | {
        f"0/{m}/{name}": array for m in ("mu", "nu") for name, array in params.items()
    }
    checkpoints.save(
        step, {name: jnp.asarray(array) for name, array in params.items()}, groups, meta
    )


def run(workdir, frozen, *steps, keep=2):
    """A run directory with these steps; the trained values of step k are arrays(k, ...)."""
    checkpoints = Checkpoints(workdir, keep)
    checkpoints.freeze(opened(frozen))
    for step in steps:
        save(
            checkpoints,
            step,
            arrays(step, "xattn/0/q/kernel", "xattn/10/attn_gate"),
            ["xattn/0/q/kernel", "xattn/10/attn_gate"],
        )
    checkpoints.close()


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
    )


def stores(workdir):
    return sorted(path.name for path in (workdir / "frozen").iterdir())


def test_round_trip(tmp_path):
    frozen, trained = (
        arrays(0, "vit/cls", "llm/layers/0/mlp/up/kernel"),
        arrays(7, "xattn/0/q/kernel", "xattn/10/attn_gate"),
    )
    run(tmp_path, frozen, 5, 6, 7)
    assert checkpoint.steps(tmp_path) == [6, 7]
    snapshot = checkpoint.read(tmp_path)
    assert same(snapshot.params, trained) and same(snapshot.frozen, frozen)
    assert (
        snapshot.groups["0/count"] == 7
        and snapshot.groups["0/nu/xattn/0/q/kernel"].tobytes()
        == trained["xattn/0/q/kernel"].tobytes()
    )
    assert (snapshot.meta["step"], snapshot.meta["data"]) == (7, {"next": 7})
    params, config = checkpoint.load_params(tmp_path, step=6)
    assert same(params, frozen | arrays(6, *trained)) and config == CFG
    assert checkpoint.trained(tmp_path) == set(trained)


def test_a_missing_step_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        checkpoint.load_params(tmp_path)
    run(tmp_path, arrays(0, "vit/cls"), 5)
    with pytest.raises(FileNotFoundError, match=r"of step 6; finalised steps: \[5\]"):
        checkpoint.load_params(tmp_path, step=6)
    for inside in ("steps", "steps/5"):
        with pytest.raises(
            FileNotFoundError, match=f"{inside} lies within a run: give {tmp_path},"
        ):
            checkpoint.load_params(tmp_path / inside)


def test_a_missing_or_different_store_is_refused_with_both_hashes(tmp_path):
    run(tmp_path / "a", arrays(0, "vit/cls"), 1)
    run(tmp_path / "b", arrays(1, "vit/cls"), 1)
    (mine,), (other,) = stores(tmp_path / "a"), stores(tmp_path / "b")
    shutil.move(tmp_path / "a/frozen" / mine, tmp_path / "aside")
    shutil.copytree(tmp_path / "b/frozen" / other, tmp_path / "a/frozen" / other)
    with pytest.raises(ValueError, match=f"store {mine}, .* has {other}"):
        checkpoint.load_params(tmp_path / "a")
    shutil.move(
        tmp_path / "a/frozen" / other, tmp_path / "a/frozen" / mine
    )  # another content under the right name
    with pytest.raises(ValueError, match=f"store {mine}, the content of .* has hash {other}"):
        Checkpoints(tmp_path / "a", keep=2).resume()


def test_a_damaged_store_is_refused_by_name(tmp_path):
    run(tmp_path, arrays(0, "vit/cls", "vit/pos"), 1)
    (file,) = tmp_path.glob("frozen/*/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="vit/pos is not what was written there"):
        checkpoint.load_params(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="2 tensors are not there, first of them vit/cls, vit/pos"):
        checkpoint.open_params(tmp_path)


def test_a_large_tensor_of_a_store_is_read_and_checked_by_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensors, "BLOCK", 48)  # two rows
    table = np.arange(30, dtype=np.float32).reshape(5, 6)
    run(tmp_path, {"vit/pos": table}, 1)
    tensor = checkpoint.open_step(tmp_path).frozen["vit/pos"]
    assert [chunk.start for chunk in tensor.chunks] == [(0, 0), (2, 0), (4, 0)]
    assert (np.concatenate([chunk.read() for chunk in tensor.chunks]) == table).all()
    (file,) = tmp_path.glob("frozen/*/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for read in (tensor.chunks[-1].read, tensor.read):
        with pytest.raises(ValueError, match="vit/pos is not what was written there"):
            read()
    assert (tensor.chunks[1].read() == table[2:4]).all()
    next(tmp_path.glob("frozen/*/chunks.json")).unlink()  # as in stores of former versions
    assert not checkpoint.open_step(tmp_path).frozen["vit/pos"].chunks


def test_one_store_serves_the_phases_that_freeze_less(tmp_path):
    """The trained values lie over the store, which is not written again for a part of it."""
    run(tmp_path, arrays(0, "vit/cls", "vit/pos"), 1)
    (store,) = stores(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    snapshot = checkpoints.resume()
    checkpoints.go_on(snapshot)
    checkpoints.freeze({"vit/cls": snapshot.frozen["vit/cls"]})
    save(checkpoints, 2, arrays(2, "vit/pos"))
    checkpoints.close()
    assert stores(tmp_path) == [store]
    assert (
        checkpoint.load_params(tmp_path)[0]["vit/pos"].tobytes()
        == arrays(2, "vit/pos")["vit/pos"].tobytes()
    )


def test_a_store_stays_while_a_step_names_it(tmp_path):
    run(tmp_path, arrays(0, "vit/cls"), 1, 2)
    (old,) = stores(tmp_path)
    kept = []
    for step in (3, 4):
        run(tmp_path, arrays(1, "vit/cls"), step)
        assert same(checkpoint.read(tmp_path, step - 1).frozen, arrays(int(step > 3), "vit/cls"))
        kept.append(old in stores(tmp_path))
    assert kept == [True, False] and checkpoint.steps(tmp_path) == [3, 4]
    assert not list((tmp_path / "steps/deleted").iterdir())


def test_multiples_of_keep_every_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4)
    checkpoints.freeze(opened(arrays(0, "vit/cls")))
    for step in range(2, 12, 2):
        save(checkpoints, step, arrays(step, "vit/pos"))
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [4, 8, 10]
    assert same(checkpoint.read(tmp_path, 4).params, arrays(4, "vit/pos"))
    with pytest.raises(ValueError, match="train.keep_every must be a multiple of train.save_every"):
        tiny_config(train={"save_every": 4, "keep_every": 6})


def test_half_written_directories_are_named_and_removed(tmp_path, capsys):
    run(tmp_path, arrays(0, "vit/cls"), 1)
    half = [
        tmp_path / "steps/2.orbax-checkpoint-tmp",
        tmp_path / "frozen/0123.orbax-checkpoint-tmp",
    ]
    for path in half:
        (path / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=2)
    said = capsys.readouterr().out
    assert all(str(path) in said and not path.exists() for path in half)
    assert checkpoints.resume().meta["step"] == 1


def test_reading_changes_nothing(tmp_path):
    """A reader beside a running trainer leaves what is being written alone."""
    run(tmp_path, arrays(0, "vit/cls"), 1)
    (tmp_path / "steps/2.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    checkpoint.load_params(tmp_path)
    checkpoint.trained(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
