"""Starts a training run, or goes on with one: from its config to towers, batches and monitors."""

import contextlib
from collections.abc import Collection

from evlm_jax import paths
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.initialize import frozen_as_held
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, read_all
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.context import check_length
from evlm_jax.convert.engine import open_towers, parameter_shapes
from evlm_jax.convert.importer import vocabulary
from evlm_jax.convert.interpolate import resized_positions
from evlm_jax.data.tokenizer import keep_tokenizer, source_of_run
from evlm_jax.models import lora, quant
from evlm_jax.parallel.distributed import check_devices, is_first, log_once
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.runs import feature_store


def train_run(
    cfg: EVLMConfig,
    workdir: str,
    init: str | None = None,
    tensorboard: bool = False,
    profile: tuple[int, int] | None = None,
    resume: int | None = None,
    other_data: bool = False,
) -> int:
    """Trains `cfg` in `workdir`, or continues there, from step `resume` or the newest. Returns the
    number of finished updates.

    A run that continues reads its checkpoint alone; a new one the towers, or `init`, the run of an
    earlier stage.

    Raises:
      OSError: nothing can be written in `workdir`; raised before anything is read.
      ValueError: rows are longer than what the language model was trained on, or its vocabulary
        does not fit it.
    """
    from evlm_jax.data.pipeline import batches  # what only training needs takes a while to import
    from evlm_jax.evals.monitor import monitor
    from evlm_jax.train import train

    check_devices()
    paths.probe(workdir)
    if resume is not None:
        store.check_step(workdir, resume)
    tokenizer = vocabulary(cfg, source_of_run(workdir, cfg.init.llm))
    params, trained = {}, frozenset()
    if not store.steps(workdir):
        check_length(cfg)
        log_once(f"reading {init or f'{cfg.init.vision} and {cfg.init.llm}'}")
        params, trained = next_stage(cfg, init) if init else (open_towers(cfg), frozenset())
    features = None
    if cfg.data.cache_features:
        begun = _tower(cfg, params, trained) if params else _saved_tower(workdir, resume)
        features = feature_store(cfg, read_all(begun))
    layout = make_layout(cfg)
    if is_first():
        keep_tokenizer(tokenizer, workdir)
    follow = monitor(cfg, tokenizer, features, layout)
    with contextlib.closing(
        batches(cfg, tokenizer, features, layout.own_groups(cfg.image_groups))
    ) as data:
        return train(
            cfg, workdir, data, params, trained, follow, tensorboard, profile, resume, other_data
        )


def next_stage(cfg: EVLMConfig, init: str) -> tuple[dict[str, Tensor], frozenset[str]]:
    """All parameters of an earlier stage's run, read lazily, positions resampled for `cfg`'s image
    size, and the names of those that it trained.

    Raises ValueError where the run is dense and `cfg` has experts, or is of another kind of model.
    """
    params, before = store.open_params(init)
    if before.baseline != cfg.baseline:
        kinds = [kind or "no such change" for kind in (before.baseline, cfg.baseline)]
        raise ValueError(
            f"{init} has {kinds[0]}, the config {kinds[1]}: start a baseline from init.vision and"
            " init.llm, or from its own kind"
        )
    if cfg.moe.copies and not before.moe.copies:
        raise ValueError(
            f"{init} is dense and the config has moe.copies = {cfg.moe.copies}: make experts of its"
            " FFNs with `evlm upcycle`"
        )
    check_adapters(cfg, before, init, params)
    quant.check_taken_up(cfg, before, init, parameter_shapes(cfg), params)
    if "vit/pos" in params:
        params["vit/pos"] = resized_positions(
            params["vit/pos"], before.vit.table_grid, cfg.vit.table_grid, cfg.vit.interpolation
        )
    return params, store.trained(init)


def check_adapters(cfg: EVLMConfig, before: EVLMConfig, init: str, params: Collection[str]) -> None:
    """Raises ValueError where the adapters of an earlier stage, among the names `params` of its
    run `init`, would be left out or count otherwise. Further ones begin anew.
    """
    held = set(filter(lora.is_adapter, params))
    lacking = sorted(held - parameter_shapes(cfg).keys()) if held else []
    scales = [c.lora.scale for c in (before, cfg)]
    if lacking or (held and scales[0] != scales[1]):
        what = (
            f"{lacking[0]}, for which the config has no place"
            if lacking
            else f"adapters of lora.alpha / lora.rank = {scales[0]:g}, the config has {scales[1]:g}"
        )
        raise ValueError(
            f"{init} has {what}: give its lora.patterns = {before.lora.patterns}, or merge them"
            " with `evlm convert merge`"
        )


def _tower(cfg: EVLMConfig, params: Tensors, trained: frozenset[str]) -> dict[str, Tensor]:
    """The vision tower as the checkpoint will hold it, so that a run that goes on has its taps."""
    names, tower = (
        [name for name in whole if name.startswith("vit/")]
        for whole in (parameter_shapes(cfg), params)
    )
    return frozen_as_held(cfg, names, {name: params[name] for name in tower}, trained)


def _saved_tower(workdir: str, step: int | None) -> dict[str, Tensor]:
    """The vision tower of a checkpoint."""
    tensors = store.open_params(workdir, step)[0]
    return {name: tensor for name, tensor in tensors.items() if name.startswith("vit/")}
