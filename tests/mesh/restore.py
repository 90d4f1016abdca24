"""One of several processes that restore a checkpoint, and what that takes: `python -m
tests.mesh.restore PROCESS PROCESSES PORT WORKDIR SIZE MESH`.

One process alone writes the checkpoint, from all devices of its mesh. SIZE is the width of the
model's layers; bytes are counted where arrays are read, memory by the kernel."""

import ast
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax import optim
from evlm_jax.checkpoint import by_shard
from evlm_jax.checkpoint.initialize import restored
from evlm_jax.checkpoint.lazy_tensors import Chunk, Tensor, Tensors
from evlm_jax.checkpoint.store import Checkpoints, Snapshot, open_step
from evlm_jax.config import EVLMConfig, to_saved
from evlm_jax.models import param_names
from evlm_jax.parallel import distributed
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase, TrainState
from tests.helpers.tiny import tiny_config


def config(mesh: tuple, size: int) -> EVLMConfig:
    """A model whose layers are `size` wide; what is stored is in pieces."""
    axes = dict(zip(("data", "fsdp", "expert", "tensor"), mesh))
    return tiny_config(
        llm={
            "hidden": size,
            "heads": 8,
            "kv_heads": 8,
            "head_dim": size // 8,
            "mlp": 4 * size,
            "layers": 8,
            "vocab": 16 * size,
        },
        xattn={"heads": 8, "kv_heads": 8, "head_dim": size // 8, "ffn": size},
        vit={"width": 64, "heads": 8, "mlp": 128},
        data={"images": 8},
        train={"batch": 8},
        mesh=axes | {"zero": 3, "frozen": "sharded", "images": "all"},
    )


def values(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Finite numbers that are a function of the name and of the place."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    bits = np.arange(seed, seed + int(np.prod(shape)), dtype=np.uint64) * 2654435761
    kind = np.uint16 if dtype.itemsize == 2 else np.uint32
    return (bits.astype(kind) >> 2).view(dtype).reshape(shape)


def named(cfg: EVLMConfig, phase: TrainPhase) -> tuple[dict, dict, dict]:
    """{name: (shape, dtype)} of what trains, of what is frozen and of Adam's states."""
    frozen = nnx.split_state(phase.shapes, phase.plan.trains, ...)[1]
    parts = jax.eval_shape(
        lambda state, frozen: (
            param_names.flatten(cfg, state.params),
            param_names.flatten(cfg, frozen),
            optim.flatten(cfg, state.groups),
        ),
        phase.spec(),
        frozen,
    )
    params, frozen, groups = (
        {name: (about.shape, np.dtype(about.dtype)) for name, about in part.items()}
        for part in parts
    )
    half = np.dtype(jnp.bfloat16)
    return params, {name: (shape, half) for name, (shape, _) in frozen.items()}, groups


def write(cfg: EVLMConfig, phase: TrainPhase, workdir: str) -> None:
    """A checkpoint, as the devices of the phase's mesh save it."""
    params, frozen, groups = named(cfg, phase)

    def made(names: dict) -> dict[str, Tensor]:
        return {
            name: Tensor(*about, partial(values, name, *about)) for name, about in names.items()
        }

    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.freeze(made(frozen))
    trainable = nnx.split_state(phase.shapes, phase.plan.trains, ...)[0]
    counts = {name: np.int32(3) for name in groups if name.endswith("/count")}
    state = by_shard.put_tensors(
        (
            param_names.unflatten(cfg, made(params), trainable),
            optim.unflatten(cfg, phase.plan, made(groups) | counts, phase.shapes),
        ),
        phase.layout.trained,
    )
    saved = phase.on_disk(TrainState(jnp.int32(3), *state))
    meta = {"phase": 0, "data": {}, "config": to_saved(cfg), "trained": sorted(params), "bad": 0}
    checkpoints.save(3, *saved, meta)
    checkpoints.close()


def kernel(key: str) -> int:
    """Bytes that a line of this process's status says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measured(cfg: EVLMConfig, phase: TrainPhase, workdir: str) -> dict[str, int]:
    """Restores. Returns the bytes that this process has read, of the shards that it holds, of all
    arrays, of those that every device holds whole, and by which its memory has grown at most.
    """
    checkpoints, read = Checkpoints(workdir, keep=1), []

    def counted(tensors: Tensors) -> dict[str, Tensor]:
        def load(chunk: Chunk) -> np.ndarray:
            read.append((array := chunk.read()).nbytes)
            return array

        return {
            name: tensor._replace(
                chunks=tuple(chunk._replace(read=partial(load, chunk)) for chunk in tensor.boxes)
            )
            for name, tensor in tensors.items()
        }

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kernel("VmRSS")
    snapshot = checkpoints.resume()
    snapshot = Snapshot(*map(counted, snapshot[:-1]), snapshot.meta)
    arrays = restored(cfg, phase.shapes, phase.place, phase.plan, snapshot)
    grown = kernel("VmHWM") - before
    checkpoints.close()
    leaves = jax.tree.leaves(arrays)
    check(cfg, arrays)
    return {
        "read": sum(read),
        "held": sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards),
        "all": sum(leaf.nbytes for leaf in leaves if leaf.ndim),
        "replicated": sum(leaf.nbytes for leaf in leaves if leaf.is_fully_replicated),
        "grown": grown,
    }


def check(cfg: EVLMConfig, arrays: tuple[nnx.State, optim.Groups]) -> None:
    """Every shard on this process has the values of its names."""
    whole, groups = arrays
    trees = [("", whole)]
    trees += [(f"{g}/{kind}/", getattr(groups[g], kind)) for g in groups for kind in ("mu", "nu")]
    for prefix, tree in trees:
        for path, variable in nnx.to_flat_state(tree):
            leaf, stacked = variable[...], param_names.is_stacked(path)
            for number, name in enumerate(param_names.canonical(cfg, path)):
                wanted = values(prefix + name, leaf.shape[stacked:], leaf.dtype)
                for shard in leaf.addressable_shards:
                    held = np.asarray(shard.data)[number] if stacked else np.asarray(shard.data)
                    assert (held == wanted[shard.index[stacked:]]).all(), prefix + name


def refused(cfg: EVLMConfig, phase: TrainPhase, workdir: str) -> str:
    """What this process says of a frozen store whose last bit is another."""
    if distributed.is_first():
        (file,) = Path(workdir).glob("frozen/*/model.safetensors")
        with file.open("r+b") as held:
            held.seek(-1, os.SEEK_END)
            last = held.read(1)[0]
            held.seek(-1, os.SEEK_END)
            held.write(bytes([last ^ 1]))
    distributed.barrier("damaged")
    try:
        restored(cfg, phase.shapes, phase.place, phase.plan, open_step(workdir))
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    process, count, port, workdir, size, mesh = sys.argv[1:]
    if int(count) > 1:
        distributed.initialize_distributed(f"localhost:{port}", int(count), int(process))
    cfg = config(ast.literal_eval(mesh), int(size))
    phase = TrainPhase(cfg, 0, make_layout(cfg))
    if int(count) > 1:
        found = measured(cfg, phase, workdir)
        print(json.dumps(found | {"refused": refused(cfg, phase, workdir)}), flush=True)
    else:
        write(cfg, phase, workdir)
