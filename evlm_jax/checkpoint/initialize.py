"""Where a run starts: canonical arrays on the host become the model's State on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from evlm_jax import optim
from evlm_jax.checkpoint.store import Arrays, Snapshot
from evlm_jax.config import EVLMConfig
from evlm_jax.models import param_names
from evlm_jax.models.evlm import PARTS, TOWERS
from evlm_jax.models.initializers import media_embedding

Place = Callable[
    [Any], Any
]  # a tree of parameters or moments, or of their shapes -> a tree of their shardings


def initialize(
    cfg: EVLMConfig, shapes: nnx.State, place: Place, params: Arrays, keep: frozenset[str]
) -> nnx.State:
    """Returns the whole model before its first step: `params`, and new cross-attention, bridge and
    media embeddings where `params` has none.

    Args:
      shapes: of the whole model.
      keep: names whose dtype is kept: what is trained, or was in an earlier stage. Frozen towers
        are cast to train.frozen_dtype.
    Raises:
      ValueError: listing missing, unexpected and wrongly shaped parameters.
    """
    values = {
        name: array if name in keep else array.astype(cfg.train.frozen_dtype)
        for name, array in params.items()
    }
    parts = {path[0] for path, _ in nnx.to_flat_state(shapes)}
    if "media" in parts and "media/embedding" not in params and "llm/embed" in params:
        values["media/embedding"] = media_embedding(cfg, params["llm/embed"])
    begin = parts - {*TOWERS} - {name.partition("/")[0] for name in values}
    given = nnx.filter_state(shapes, lambda path, _: path[0] not in begin)
    rest = put_sharded(param_names.unflatten(cfg, values, given), place)
    if not begin:
        return rest

    def new() -> nnx.State:
        made = {part: PARTS[part](cfg, nnx.Rngs(cfg.train.seed)) for part in sorted(begin)}
        return nnx.state(nnx.Dict(made))

    return nnx.merge_state(rest, jax.jit(new, out_shardings=place(jax.eval_shape(new)))())


def restored(
    cfg: EVLMConfig, shapes: nnx.State, place: Place, plan: optim.OptimizerPlan, snapshot: Snapshot
) -> tuple[nnx.State, optim.Groups]:
    """The whole model and the Adam states of a checkpoint, bit for bit."""
    whole = param_names.unflatten(cfg, snapshot.frozen | snapshot.params, shapes)
    return put_sharded(whole, place), put_sharded(
        optim.unflatten(cfg, plan, snapshot.groups, shapes), place
    )


def put_sharded(tree: Any, place: Place) -> Any:
    """Copies a tree of NumPy arrays to the devices; each process supplies the shards of its own
    devices.
    """
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        tree,
        place(tree),
    )
