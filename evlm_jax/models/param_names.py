"""Canonical parameter names: one per layer, `vit/blocks/37/attn/q/kernel`, whatever the stacks,
mesh or stage.

In memory layers are stacked; rules, checkpoints and conversion speak canonical names. This file is
the only bridge."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.checkpoint.lazy_tensors import Stack, Tensor, Tensors, aligned
from evlm_jax.config import EVLMConfig
from evlm_jax.config.xattn import PLAIN
from evlm_jax.models.vit import stack_bounds
from evlm_jax.models.xattn import Block


def canonical(cfg: EVLMConfig, path: tuple) -> tuple[str, ...]:
    """Names that the in-memory leaf at `path` covers: one per layer of a stack, in order, or a
    single one.
    """
    match tuple(map(str, path)):
        case ("vit", "stacks", index, *rest):
            first, last = stack_bounds(cfg.vit)[int(index)]
            return tuple(f"vit/blocks/{i}/{tail(rest)}" for i in range(first, last))
        case ("llm", "layers", *rest):
            return tuple(f"llm/layers/{i}/{tail(rest)}" for i in range(cfg.llm.layers))
        case ("xattn", *rest):
            return tuple(f"xattn/{i}/{tail(rest)}" for i in cfg.cross_layers)
        case ("bridge", "layers" | "norms" as stack, *rest):
            count = cfg.bridge.depth if stack == "layers" else len(cfg.vit.taps)
            return tuple(f"bridge/{stack}/{i}/{tail(rest)}" for i in range(count))
        case rest:
            return (tail(rest),)


def is_stacked(path: tuple) -> bool:
    """Whether the leaf at `path` has a leading layer axis."""
    stacks = ("vit", "stacks"), ("llm", "layers"), ("bridge", "layers"), ("bridge", "norms")
    return path[0] == "xattn" or tuple(map(str, path[:2])) in stacks


def absent(cfg: EVLMConfig) -> tuple[str, ...]:
    """Names that EVLM has and `cfg` has not: its first block of cross-attention, where `cfg` has
    none or another, and the media embeddings.
    """
    evlm = replace(cfg, xattn=replace(cfg.xattn, **PLAIN))
    block = (
        ()
        if cfg.cross_layers and not cfg.xattn.unlike(PLAIN)
        else nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Block(evlm, nnx.Rngs(0)))))
    )
    media = ("media/embedding",) if cfg.bridge.kind == "llava" else ()
    return (*(f"xattn/0/{tail(path)}" for path, _ in block), *media)


def flatten(cfg: EVLMConfig, state: nnx.State) -> dict[str, jax.Array]:
    """{canonical name: array of one layer} of a State, or of moments in the shape of one."""
    out = {}
    for path, variable in nnx.to_flat_state(state):
        leaf, names = _leaf(variable), canonical(cfg, path)
        out |= (
            {name: leaf[i] for i, name in enumerate(names)}
            if is_stacked(path)
            else {names[0]: leaf}
        )
    return out


def unflatten(
    cfg: EVLMConfig, arrays: dict[str, np.ndarray] | Tensors, like: nnx.State
) -> nnx.State:
    """Inverse of `flatten`: stacks `arrays` into the structure of `like` (arrays or shapes),
    keeping their dtype. Tensors become a `Stack` a leaf.

    Raises:
      ValueError: listing every missing, unexpected or wrongly shaped name.
    """
    problems, leaves, used = [], [], set()
    for path, variable in nnx.to_flat_state(like):
        names, shape = canonical(cfg, path), _leaf(variable).shape[is_stacked(path) :]
        used |= set(names)
        missing = [n for n in names if n not in arrays]
        wrong = [n for n in names if n in arrays and arrays[n].shape != shape]
        problems += [f"missing {n} {shape}" for n in missing]
        problems += [f"{n} has shape {arrays[n].shape}, the model needs {shape}" for n in wrong]
        if not missing and not wrong:
            value = _joined([arrays[n] for n in names], is_stacked(path))
            leaves.append((path, variable.replace(value)))
    problems += [f"unexpected {n}" for n in arrays if n not in used]
    if problems:
        raise ValueError("parameters do not fit the model:\n  " + "\n  ".join(problems))
    return nnx.from_flat_state(leaves)


def fitting(like: nnx.State, params: nnx.State) -> nnx.State:
    """`params`, whose leaves must be those of `like` in number and shape, whatever holds them.

    Raises ValueError naming the first that is not.
    """
    own, given = jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(params)
    if len(own) != len(given):
        raise ValueError(
            f"params have {len(given)} arrays, the model {len(own)}: give Model.params, its arrays"
            " changed by jax.tree.map"
        )
    for (path, leaf), array in zip(own, given):
        if (shape := jnp.shape(array)) != leaf.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"params: {name} is {shape}, the model's is {leaf.shape}")
    return params


def _joined(
    values: Sequence[np.ndarray | jax.Array | Tensor], stacked: bool
) -> np.ndarray | jax.Array | Stack:
    """The value of a leaf, of those of its names."""
    if isinstance(values[0], Tensor):
        return Stack(tuple(values), stacked)
    if not stacked:
        return values[0]
    return (_stack if all(isinstance(x, np.ndarray) for x in values) else jnp.stack)(values)


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Equal shapes as one array."""
    stacked = aligned((len(arrays), *arrays[0].shape), np.result_type(*arrays))
    with (
        ThreadPoolExecutor() as pool
    ):  # memory that is touched first, and files that are mapped: copying waits for pages
        list(pool.map(np.copyto, (stacked[i : i + 1] for i in range(len(arrays))), arrays))
    return stacked


def _leaf(variable):
    return jax.tree.leaves(variable)[0]


def tail(path: Iterable[str | int]) -> str:
    """The name of a leaf within its layer. A gate that is one number has the name of its place
    alone.
    """
    return "/".join(map(str, path)).removesuffix("/scalar")
