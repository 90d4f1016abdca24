"""A run's checkpoint as a model, a model as a checkpoint, and the cache of its taps."""

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from evlm_jax import assets
from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.atomic_dir import new_folder
from evlm_jax.checkpoint.frozen_store import write_store
from evlm_jax.checkpoint.initialize import put_sharded
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, opened, read_all
from evlm_jax.config import EVLMConfig, MeshConfig, QuantConfig
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.data.features import FeatureStore, fingerprint
from evlm_jax.data.tokenizer import Tokenizer, keep_tokenizer, load_tokenizer, source_of_run
from evlm_jax.models import param_names, quant
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.mesh import Layout, make_layout


class Trained(NamedTuple):
    """A model from a checkpoint, with its config, tokenizer and parameters."""

    model: EVLM
    tokenizer: Tokenizer
    params: dict[str, np.ndarray]  # by canonical name
    layout: Layout | None = None  # of the mesh that holds the model; None: one device does


def feature_store(cfg: EVLMConfig, params: dict[str, np.ndarray]) -> FeatureStore:
    """The disk cache of the frozen tower's taps, in the assets' cache."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))

    def is_vit(path, _):
        return path[0] == "vit"

    tower = {name: array for name, array in params.items() if name.startswith("vit/")}
    vit = jax.device_put(param_names.unflatten(cfg, tower, nnx.filter_state(shapes, is_vit)))
    rest = nnx.filter_state(
        shapes, lambda *leaf: not is_vit(*leaf)
    )  # shapes only: encoding reads none of it
    encode = jax.jit(
        lambda vit, pixels: nnx.merge(graphdef, nnx.merge_state(vit, rest)).encode(pixels)
    )
    return FeatureStore(
        assets.cache_root() / "features" / fingerprint(cfg, params),
        lambda pixels: encode(vit, pixels),
        cfg,
    )


def features_of(trained: Trained) -> FeatureStore | None:
    """The cache of a trained model's taps, where it was trained with one."""
    return (
        feature_store(trained.model.cfg, trained.params)
        if trained.model.cfg.data.cache_features
        else None
    )


def load_trained(
    workdir: str, step: int | None = None, mesh: MeshConfig | None = None, rows: int = 1
) -> Trained:
    """The model of the newest (or given) checkpoint of a run, on one device, or on all of them.

    Args:
      mesh: of the devices.
      rows: of batches, which the devices share.
    Raises:
      ValueError: the mesh does not fit the devices, the rows or the model.
    """
    params, cfg = store.load_params(workdir, step)
    model, layout = model_of(cfg, params, mesh, rows)
    return Trained(model, load_tokenizer(source_of_run(workdir, cfg.init.llm)), params, layout)


def model_of(
    cfg: EVLMConfig,
    params: dict[str, np.ndarray],
    mesh: MeshConfig | None = None,
    rows: int = 1,
    devices: Sequence[jax.Device] = (),
) -> tuple[EVLM, Layout | None]:
    """The model with these parameters, by canonical name, on the first of the devices, or on the
    mesh that they make; () are all.
    """
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    state = param_names.unflatten(cfg, params, shapes)
    if mesh is None:
        return nnx.merge(graphdef, jax.device_put(state, *devices[:1])), None
    layout = make_layout(
        replace(cfg, mesh=mesh, train=replace(cfg.train, batch=rows, accumulate=1)), devices
    )
    return nnx.merge(graphdef, put_sharded(state, layout.frozen)), layout


def random_params(cfg: EVLMConfig, seed: int) -> dict[str, np.ndarray]:
    """New weights of the whole model, towers included, by canonical name."""
    whole = replace(cfg, quant=QuantConfig())
    params = jax.device_get(param_names.flatten(whole, _new(whole, np.uint32(seed))))
    return read_all(quant.quantised(cfg, parameter_shapes(cfg), opened(params)))


@functools.partial(jax.jit, static_argnums=0)
def _new(cfg: EVLMConfig, seed: jax.Array) -> nnx.State:
    return nnx.state(EVLM(cfg, nnx.Rngs(jax.random.key(seed))))


def write_model(
    cfg: EVLMConfig,
    tensors: Tensors,
    out: str,
    plan: dict,
    tokenizer: str,
    origin: dict,
    trained: Iterable[str],
) -> None:
    """Writes step 0 of a run, tensor by tensor, with a bar of progress.

    Args:
      plan: what decides the content, as of `new_folder`.
      tokenizer: its folder or asset; "": none is kept.
      origin: where the model comes from.
      trained: names that had been trained there, whose dtype later stages keep.
    Raises:
      FileExistsError: `out` exists.
      ValueError: a tensor contains NaN or infinity.
    """
    size = sum(tensor.size for tensor in tensors.values())
    with new_folder(out, plan) as folder:
        with tqdm(total=size, unit="B", unit_scale=True, desc=folder.stem) as bar:
            stored = write_store(folder, tensors, bar.update)
        if tokenizer:
            keep_tokenizer(load_tokenizer(tokenizer), folder)
        store.write_imported(folder, cfg, stored, origin, trained)


def save_model(
    cfg: EVLMConfig, params: dict[str, np.ndarray], tokenizer: Tokenizer, out: str
) -> None:
    """Writes step 0 of a run with these parameters, by canonical name. All count as trained, so a
    run that begins from it keeps their dtype.

    Raises FileExistsError where `out` exists.
    """
    with new_folder(
        out, {"saved": time.time_ns()}
    ) as folder:  # takes up nothing of an earlier attempt
        tensors = {name: Tensor.of(array) for name, array in params.items()}
        stored = write_store(folder, tensors)
        keep_tokenizer(tokenizer, folder)
        store.write_imported(folder, cfg, stored, {}, trained=tensors)
