"""A dense FFN of the gated cross-attention becomes a mixture of experts (paper section 2):
`evlm upcycle`.

The FFN is copied, each copy is cut into slices along its hidden dimension: expert copy * slices + i
is slice i of a copy. The world expert is the whole FFN. A token's k experts beside it would be
another function than the FFN was, so there are policies:

    preserve        the slices of a copy share a column of the router, so the k = slices best are
                    one whole copy (arXiv 2410.07524); routed fc2 is scaled by k / 2 (gates are
                    1 / k), the world's by 1 / 2: the sum is what it was
    preserve_zero   a random router; routed fc2 is 0, the world expert alone is the FFN: exact for
                    any k, gates and capacity
    paper           a random router; slices and copies as they are

All factors are in the weights; models/moe.py knows nothing of them. One layer is made at a time,
from names without their prefix."""

import functools
from collections.abc import Callable
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from evlm_jax.checkpoint import store as checkpoint
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, read_all
from evlm_jax.checkpoint.store import Arrays
from evlm_jax.config import EVLMConfig, MoEConfig
from evlm_jax.data.tokenizer import source_of_run
from evlm_jax.models.layers import MLP
from evlm_jax.models.moe import MoE
from evlm_jax.runs import write_model

TOKENS = 512  # of the batch that the receipt is about
FC1, FC2 = "ffn/fc1/kernel", "ffn/fc2/kernel"


def check(moe: MoEConfig) -> None:
    """Raises ValueError where a dense FFN cannot become these experts, or not by this policy."""
    if not moe.copies:
        raise ValueError(
            "upcycle: moe.copies is 0, the target is dense; choose a config with experts, such as"
            " experiments/evlm_14b.py:moe"
        )
    fits = moe.top_k == moe.slices and moe.gates == "renormalise" and not moe.capacity
    if moe.upcycle == "preserve" and not fits:
        raise ValueError(
            "upcycle: moe.upcycle=preserve needs moe.top_k = moe.slices, moe.gates=renormalise and"
            f" moe.capacity = 0, not top_k {moe.top_k}, slices {moe.slices}, gates {moe.gates},"
            f" capacity {moe.capacity}: use moe.upcycle=preserve_zero"
        )


def upcycle_layer(layer: Arrays, moe: MoEConfig, rng: np.random.Generator) -> Arrays:
    """The arrays of one block with experts in place of its FFN; dtypes stay, the router is float32.
    Raises ValueError as `check`.

    Args:
      layer: "ffn/fc1/kernel" [D, F], "ffn/fc2/kernel" [F, D], and others, which are handed on.
      rng: of the router, normal with deviation D**-0.5.
    """
    check(moe)
    fc1, fc2 = layer[FC1], layer[FC2]
    (width, hidden), routed, world = fc1.shape, 1.0, 1.0
    router = rng.standard_normal((width, moe.experts)) * width**-0.5
    if moe.upcycle == "preserve":
        routed, world, router = (
            moe.top_k / 2,
            0.5,
            router[:, :: moe.slices].repeat(moe.slices, axis=1),
        )
    elif moe.upcycle == "preserve_zero":
        routed = 0.0

    def scaled(array, factor):
        return (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)

    def of_copies(slices):
        return np.concatenate([slices] * moe.copies)

    return {name: array for name, array in layer.items() if name not in (FC1, FC2)} | {
        "ffn/router/kernel": router.astype(np.float32),
        "ffn/experts/fc1/kernel": of_copies(fc1.reshape(width, moe.slices, -1).transpose(1, 0, 2)),
        "ffn/experts/fc2/kernel": of_copies(
            scaled(fc2, routed).reshape(moe.slices, hidden // moe.slices, width)
        ),
        "ffn/world/fc1/kernel": fc1,
        "ffn/world/fc2/kernel": scaled(fc2, world),
    }


def upcycle(
    tensors: Tensors, cfg: EVLMConfig, say: Callable[[str], None] = print
) -> dict[str, Tensor]:
    """All tensors of a dense model, with the experts of `cfg`: a layer is made, and its receipt
    said, when it is read.

    Raises:
      ValueError: as `check`, and where a block has no dense FFN.
    """
    prefixes = {layer: f"xattn/{layer}/" for layer in cfg.cross_layers}
    if missing := [
        p + name for p in prefixes.values() for name in (FC1, FC2) if p + name not in tensors
    ]:
        raise ValueError(
            f"upcycle: the checkpoint has no {', '.join(missing)}; it must be of a dense model with"
            " moe.copies = 0"
        )

    @functools.lru_cache(maxsize=1)  # a layer's tensors are read one after another
    def block(layer: int) -> Arrays:
        prefix = prefixes[layer]
        before = read_all(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        )
        after = upcycle_layer(before, cfg.moe, np.random.default_rng([cfg.train.seed, layer]))
        difference, largest, load = receipt(before, after, cfg.moe)
        chosen = f"{(load > 0).sum()} of {len(load)} experts chosen"
        say(f"layer {layer}: |dense - moe| <= {difference:.2e}, |dense| <= {largest:.2e}, {chosen}")
        return after

    out, like = (
        {name: tensor for name, tensor in tensors.items() if not name.startswith("xattn/")},
        block(cfg.cross_layers[0]),
    )
    for layer, prefix in prefixes.items():
        for name, array in like.items():
            out[prefix + name] = Tensor(
                array.shape, array.dtype, lambda layer=layer, name=name: block(layer)[name]
            )
    return out


def receipt(
    before: Arrays, after: Arrays, moe: MoEConfig, seed: int = 0
) -> tuple[float, float, np.ndarray]:
    """What one layer's FFN and its experts make of TOKENS standard normal tokens behind the layer's
    norm, in float32.

    Returns:
      (largest difference, largest magnitude of the dense FFN, load [E])
    """
    x = jnp.asarray(
        np.random.default_rng(seed).standard_normal((1, TOKENS, len(before[FC1]))), jnp.float32
    )
    x = x * before["ffn_norm/scale"] + before["ffn_norm/bias"]
    width, hidden = before[FC1].shape
    dense = _filled(lambda: MLP(width, hidden, "gelu", False, nnx.Rngs(0)), before)
    y, (routed, routing) = _both(
        dense, _filled(lambda: MoE(width, hidden, moe, nnx.Rngs(0)), after), x
    )
    return (
        float(jnp.abs(y - routed).max()),
        float(jnp.abs(y).max()),
        np.asarray(routing.load.sum(0)),
    )


@jax.jit
def _both(dense: MLP, moe: MoE, x: jax.Array):
    with jax.default_matmul_precision("highest"):
        return dense(x), moe(x)


def _filled(make, arrays: Arrays) -> nnx.Module:
    """The module with float32 arrays by name, behind "ffn/"."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    leaves = [
        (path, leaf.replace(jnp.asarray(arrays["ffn/" + "/".join(path)], jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def upcycle_run(source: str, cfg: EVLMConfig, out: str) -> None:
    """Writes the newest step of the dense run `source` as a model with the experts of `cfg`, to
    start a stage from (`evlm train --init`).

    Tensors pass one layer at a time, whatever the model's size.

    Raises:
      FileExistsError: `out` is there already.
      ValueError: as `upcycle`; the run has adapters or is quantised; or towers or
        cross-attention of `cfg` are not those of the checkpoint.
    """
    check(cfg.moe)
    tensors, before = checkpoint.open_params(source)
    if before.lora.patterns or before.quant.patterns:
        raise ValueError(
            f"upcycle: {source} has adapters or is quantised: `evlm convert merge` it first"
        )
    if wrong := [
        name
        for name in ("llm", "xattn", "media", "bridge")
        if getattr(cfg, name) != getattr(before, name)
    ]:
        raise ValueError(
            f"upcycle: sections {', '.join(wrong)} of the config are not those of {source}; give"
            " the config of its next stage"
        )
    after, plan = (
        replace(before, moe=cfg.moe),
        {
            "source": checkpoint.identity(source, None),
            "moe": asdict(cfg.moe),
        },
    )
    made = upcycle(tensors, after, tqdm.write)
    trained = {name for name in checkpoint.trained(source) if name in made} | {
        name for name in made if name.startswith("xattn/")
    }
    tokenizer = source_of_run(source, "")  # runs of former versions kept none
    write_model(after, made, out, plan, tokenizer, {"upcycled": source}, trained)
