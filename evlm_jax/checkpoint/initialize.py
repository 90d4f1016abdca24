"""Where a run starts: named tensors become the model's State on the mesh, read shard by shard."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from evlm_jax import optim
from evlm_jax.checkpoint.by_shard import Place, put_tensors
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, opened
from evlm_jax.checkpoint.store import Snapshot
from evlm_jax.config import EVLMConfig
from evlm_jax.models import lora, param_names, quant
from evlm_jax.models.evlm import EVLM, PARTS, TOWERS
from evlm_jax.models.initializers import media_embedding


def begin_with(
    cfg: EVLMConfig,
    shapes: nnx.State,
    params: Mapping[str, np.ndarray | Tensor],
    keep: frozenset[str],
) -> dict[str, Tensor]:
    """What a run begins with, of `params`: frozen towers in train.frozen_dtype or quantised, and
    new media embeddings where `params` has none.

    Args:
      shapes: of the whole model.
      keep: names whose dtype is kept: what is trained, or was in an earlier stage.
    Raises:
      ValueError: a matrix that is to be quantised begins anew.
    """
    params = opened(params)
    names = [n for path, _ in nnx.to_flat_state(shapes) for n in param_names.canonical(cfg, path)]
    tensors = frozen_as_held(cfg, names, params, keep)
    parts = {path[0] for path, _ in nnx.to_flat_state(shapes)}
    if "media" in parts and "media/embedding" not in params and "llm/embed" in params:
        table = {name: params[name] for name in params if name.startswith("llm/embed")}
        media = media_embedding(cfg, quant.whole(cfg, table)["llm/embed"].read())
        tensors["media/embedding"] = Tensor.of(media)
    return tensors


def frozen_as_held(
    cfg: EVLMConfig, names: Collection[str], tensors: Tensors, keep: Collection[str]
) -> dict[str, Tensor]:
    """Tensors as a model with parameters of these names holds them: quantised, or in
    train.frozen_dtype where their dtype is not to be kept.

    Raises ValueError as quant.quantised.
    """
    made = quant.quantised(cfg, names, tensors)
    cast = quant.plain(made) - {*keep}
    return {n: t.astype(cfg.train.frozen_dtype) if n in cast else t for n, t in made.items()}


def initialize(cfg: EVLMConfig, shapes: nnx.State, place: Place, tensors: Tensors) -> nnx.State:
    """Returns the whole model before its first step: `tensors` of `begin_with`, and new
    cross-attention, bridge and adapters where they have none.

    Args:
      shapes: of the whole model.
    Raises:
      ValueError: listing missing, unexpected and wrongly shaped parameters.
    """
    parts = {path[0] for path, _ in nnx.to_flat_state(shapes)}
    begin = parts - {*TOWERS} - {name.partition("/")[0] for name in tensors}

    def adapts(path, _):
        return path[-1] in lora.NAMES and param_names.canonical(cfg, path)[0] not in tensors

    given, adapters, _ = nnx.split_state(
        shapes, lambda path, _: not adapts(path, _) and path[0] not in begin, adapts, ...
    )
    rest = put_tensors(param_names.unflatten(cfg, tensors, given), place)
    if not begin and not nnx.to_flat_state(adapters):
        return rest

    def new() -> nnx.State:
        made = {part: PARTS[part](cfg, nnx.Rngs(cfg.train.seed)) for part in sorted(begin)}
        state = nnx.state(nnx.Dict(made))
        if not nnx.to_flat_state(adapters):
            return state
        whole = nnx.state(EVLM(cfg, nnx.Rngs(cfg.train.seed)))
        return nnx.merge_state(state, nnx.filter_state(whole, adapts))

    return nnx.merge_state(rest, jax.jit(new, out_shardings=place(jax.eval_shape(new)))())


def restored(
    cfg: EVLMConfig, shapes: nnx.State, place: Place, plan: optim.OptimizerPlan, snapshot: Snapshot
) -> tuple[nnx.State, optim.Groups]:
    """The whole model and the Adam states of an opened checkpoint, bit for bit."""
    counts = {n: t.read() for n, t in snapshot.groups.items() if n.endswith("/count")}
    whole = param_names.unflatten(cfg, {**snapshot.frozen, **snapshot.params}, shapes)
    groups = optim.unflatten(cfg, plan, {**snapshot.groups, **counts}, shapes)
    return put_tensors((whole, groups), lambda trees: tuple(map(place, trees)))


def put_sharded(tree: Any, place: Place) -> Any:
    """Copies a tree of NumPy arrays to the devices; each process supplies the shards of its own
    devices.
    """
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        tree,
        place(tree),
    )
