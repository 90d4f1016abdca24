"""The mixture of experts, forward and backward, beside a dense FFN of the same active FLOPs: `python -m benchmarks.moe`.

16 experts of which a token has 4, and the world expert. The dense FFN is as wide as what a token uses of both. Loads are balanced, or
as a random router makes them ("skewed": a common vector in all tokens draws most of them to few experts). XLA's ragged_dot, with the
same routing, is the naive form. The second figure is the peak of temporaries (compiled.memory_analysis()).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.config import MoEConfig
from evlm_jax.models import moe
from evlm_jax.models.layers import ACTIVATIONS, MLP

SIZES = {"demo": (1024, 576, 288), "paper": (2048, 5120, 2560)}  # tokens, hidden, FFN
TILES = {"demo": 64, "paper": 64}
REPEATS = {"demo": 30, "paper": 3}  # of which the fastest counts


def mixture(width: int, hidden: int, tile: int) -> moe.MoE:
    """Random, with the paper's numbers of experts."""
    cfg = MoEConfig(copies=4, slices=4, top_k=4, gates="renormalise", capacity=0.0, balance=0.01, z=0.001, tile=tile, upcycle="preserve")
    return jax.jit(lambda: moe.MoE(width, hidden, cfg, nnx.Rngs(0)))()


def ragged(model: moe.MoE, x: jax.Array) -> jax.Array:
    """The same layer by jax.lax.ragged_dot."""
    flat, k = x[0], model.cfg.top_k
    gates, chosen = jax.lax.top_k(jax.nn.softmax(model.router(flat)), k)
    gates = gates / gates.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=model.cfg.experts)
    rows = flat[order // k]
    hidden = ACTIVATIONS["gelu"](jax.lax.ragged_dot(rows, model.experts.fc1.kernel[...], sizes)) * gates.reshape(-1)[order][:, None]
    out = jax.lax.ragged_dot(hidden, model.experts.fc2.kernel[...], sizes)
    return model.world(x) + jnp.zeros_like(flat).at[order // k].add(out)


def measure(layer, model: nnx.Module, x: jax.Array, repeats: int) -> tuple[float, float]:
    """(seconds, MB of temporaries) of the gradients with respect to the model and x."""
    weight = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    step = jax.jit(jax.grad(lambda model, x: (layer(model, x) * weight).sum(), argnums=(0, 1))).lower(model, x).compile()
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        jax.block_until_ready(step(model, x))
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]), step.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tile", type=int, help="rows of a tile, instead of the size's own")
    parser.add_argument("--no-naive", action="store_true", help="leave ragged_dot out: at the paper's size it takes minutes")
    args = parser.parse_args()
    for size in args.sizes:
        tokens, width, hidden = SIZES[size]
        model = mixture(width, hidden, args.tile or TILES[size])
        even = jax.random.normal(jax.random.key(0), (1, tokens, width))
        skewed = 0.5 * even + jax.random.normal(jax.random.key(1), (width,))
        dense = jax.jit(lambda w=width, h=2 * hidden: MLP(w, h, "gelu", False, nnx.Rngs(0)))()
        bar = measure(lambda model, x: model(x), dense, even, REPEATS[size])
        print(
            f"{size}: {tokens} tokens, hidden {width}, experts of {hidden // 4}\n  dense{'':<24}{bar[0]:8.3f} s {bar[1]:8.0f} MB",
            flush=True,
        )
        for name, x in (("balanced", even), ("skewed", skewed)):
            load = np.asarray(jax.jit(lambda model, x: model(x)[1].load.sum(0))(model, x))
            print(f"  load, {name}: {load.min():.0f} to {load.max():.0f} tokens an expert")
            forms = {"experts": lambda model, x: model(x)[0]} | ({} if args.no_naive else {"ragged_dot": ragged})
            for form, layer in forms.items():
                seconds, megabytes = measure(layer, model, x, REPEATS[size])
                print(f"  {form + ', ' + name:<29}{seconds:8.3f} s ({seconds / bar[0]:5.2f}x) {megabytes:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
