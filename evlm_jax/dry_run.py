"""`evlm train --dry-run`: all that comes before the first step, but weights are looked up and not
read."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from evlm_jax import optim, paths
from evlm_jax.batch import Batch
from evlm_jax.checkpoint import continuity, store
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.context import check_length
from evlm_jax.convert.engine import open_towers
from evlm_jax.convert.importer import vocabulary
from evlm_jax.data.tokenizer import source_of_run
from evlm_jax.launch import next_stage
from evlm_jax.models import quant
from evlm_jax.parallel.compiler import told
from evlm_jax.parallel.distributed import check_devices, log_once
from evlm_jax.parallel.mesh import Layout, make_layout
from evlm_jax.phase import TrainPhase


def dry_run(
    cfg: EVLMConfig,
    workdir: str,
    init: str | None = None,
    resume: int | None = None,
    other_data: bool = False,
) -> None:
    """Checks what `launch.train_run` would meet before its first step, and prints what would run.

    Config, devices, mesh, sources and a first image group of theirs, towers or checkpoint, what
    trains in each phase, and whether `workdir` can be written: a small object is written there and
    removed, nothing else. No parameter is read, nothing is compiled but a probe of the compiler's
    options.

    Raises as `launch.train_run` does.
    """
    check_devices()
    paths.probe(workdir)
    tokenizer = vocabulary(cfg, source_of_run(workdir, cfg.init.llm))
    layout, meta = make_layout(cfg), None
    if resume is not None or store.steps(workdir):
        meta = store.open_run(workdir, resume).meta
        log_once(f"would go on from step {meta['step']} of {workdir}")
    else:
        check_length(cfg)
        _look_up(cfg, init)
    _tell_mesh(cfg, layout)
    from evlm_jax.data.pipeline import batches  # what only training needs takes a while to import

    # taps would need the tower
    plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_features=False))
    first = layout.own_groups(cfg.image_groups)[:1]
    with contextlib.closing(batches(plain, tokenizer, None, first)) as data:
        if meta:
            continuity.check(cfg, meta, data, other_data)
            data.set_state(meta["data"])
        _tell_data(cfg, data)
    _tell_phases(cfg, layout, meta["step"] if meta else 0)
    log_once("dry run: all is well; no step was made")


def _look_up(cfg: EVLMConfig, init: str | None) -> None:
    """What a new run would read."""
    tensors = next_stage(cfg, init)[0] if init else open_towers(cfg)
    size = sum(tensor.size for tensor in tensors.values()) / 1e9
    what = init or f"{cfg.init.vision} and {cfg.init.llm}"
    log_once(f"would begin with {what}: {len(tensors):,} arrays, {size:,.2f} GB")


def _tell_mesh(cfg: EVLMConfig, layout: Layout) -> None:
    devices, rows = layout.mesh.devices.flat, layout.parts("rows")
    mesh = " ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    log_once(
        f"{len(devices)} devices ({devices[0].device_kind}) of {jax.process_count()} processes:"
        f" {mesh}"
    )
    train = cfg.train
    log_once(
        f"a step: {train.batch} rows of {cfg.data.length} tokens in {train.accumulate}"
        f" micro-batches, {train.batch // train.accumulate // rows} rows a device in each"
    )


def _tell_data(cfg: EVLMConfig, data: Iterator[tuple[Batch, dict]]) -> None:
    batch, info = next(data)
    found = data.get_state()["sources"]
    for name, weight in zip(cfg.data.sources, cfg.data.weights):
        log_once(f"source {name}: {found[name]['samples']:,} samples, weight {weight:g}")
    used = ", ".join(f"{100 * share:.0f}% of {name}" for name, share in info["fill"].items())
    size = sum(np.asarray(array).nbytes for array in batch if array is not None) / 1e6
    log_once(f"first image group: {used}; {len(info['drops'])} left out; {size:,.1f} MB")


def _tell_phases(cfg: EVLMConfig, layout: Layout, step: int) -> None:
    first = [*optim.starts(cfg), cfg.train.steps]
    for number in range(optim.phase_at(cfg, step), len(cfg.optim.phases)):
        phase = TrainPhase(cfg, number, layout)
        sizes = [0, 0]
        for path, variable in nnx.to_flat_state(phase.shapes):
            sizes[phase.plan.trains(path)] += quant.parameters(cfg, path, variable)
        log_once(
            f"phase {number}, steps {max(step, first[number])} to {first[number + 1]}: trains"
            f" {sizes[1]:,} parameters, freezes {sizes[0]:,}"
        )
    if phase.options:
        log_once(told(phase.options))
