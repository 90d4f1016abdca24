"""The mixture of experts, forward and backward, beside a dense FFN of the same active FLOPs:
`python -m benchmarks.moe`.

16 experts of which a token has 4, and the world expert. The dense FFN is as wide as what a token
uses of both. Loads are balanced, or as a random router makes them ("skewed": a common vector in all
tokens draws most of them to few experts). XLA's ragged_dot, with the same routing, is the naive
form. All sides take turns, round after round. Printed are the fastest and the median round, the
median of processor time (of all cores; what others on the machine disturb least), each with its
ratio to the dense FFN's, and the peak of temporaries (compiled.memory_analysis()). One core:
`taskset -c 0`."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import parser
from evlm_jax.config import MoEConfig
from evlm_jax.models import moe
from evlm_jax.models.layers import ACTIVATIONS, MLP

SIZES = {
    "demo": (1024, 576, 288),
    "paper": (2048, 5120, 2560),
    "smoke": (64, 32, 16),
}  # tokens, hidden, FFN
ROUNDS = {"demo": 60, "paper": 5, "smoke": 1}


def mixture(width: int, hidden: int, block: int) -> moe.MoE:
    """Random, with the paper's numbers of experts."""
    cfg = MoEConfig(
        copies=4,
        slices=4,
        top_k=4,
        gates="renormalise",
        capacity=0.0,
        balance=0.01,
        z=0.001,
        expert_block=block,
        upcycle="preserve",
    )
    return jax.jit(lambda: moe.MoE(width, hidden, cfg, nnx.Rngs(0)))()


def ragged(model: moe.MoE, x: jax.Array) -> jax.Array:
    """The same layer by jax.lax.ragged_dot."""
    flat, k = x[0], model.cfg.top_k
    gates, chosen = jax.lax.top_k(jax.nn.softmax(model.router(flat)), k)
    gates = gates / gates.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=model.cfg.experts)
    rows = flat[order // k]
    hidden = (
        ACTIVATIONS["gelu"](jax.lax.ragged_dot(rows, model.experts.fc1.kernel[...], sizes))
        * gates.reshape(-1)[order][:, None]
    )
    out = jax.lax.ragged_dot(hidden, model.experts.fc2.kernel[...], sizes)
    return model.world(x) + jnp.zeros_like(flat).at[order // k].add(out)


def compiled(layer: Callable, model: nnx.Module, x: jax.Array) -> jax.stages.Compiled:
    """The gradients with respect to the model and x."""
    weight = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return (
        jax.jit(jax.grad(lambda model, x: (layer(model, x) * weight).sum(), argnums=(0, 1)))
        .lower(model, x)
        .compile()
    )


def measure(sides: dict[str, tuple], rounds: int) -> dict[str, np.ndarray]:
    """{name: seconds of the clock and of processors [rounds, 2]} of {name: (compiled, model, x)}; a
    first round is not counted.
    """
    seconds = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, (step, model, x) in sides.items():
            begin = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(model, x))
            seconds[name].append(np.subtract((time.perf_counter(), time.process_time()), begin))
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Measures and prints."""
    asked = parser(__doc__)
    asked.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo", "paper"])
    asked.add_argument("--block", type=int, default=64)
    asked.add_argument("--rounds", type=int, help="instead of the size's own")
    asked.add_argument(
        "--no-naive",
        action="store_true",
        help="leave ragged_dot out: at the paper's size a round of it takes minutes",
    )
    args = asked.parse_args()
    for size in ["smoke"] if args.smoke else args.sizes:
        tokens, width, hidden = SIZES[size]
        model = mixture(width, hidden, args.block)
        even = jax.random.normal(jax.random.key(0), (1, tokens, width))
        inputs = {
            "balanced": even,
            "skewed": 0.5 * even + jax.random.normal(jax.random.key(1), (width,)),
        }
        dense = jax.jit(lambda w=width, h=2 * hidden: MLP(w, h, "gelu", False, nnx.Rngs(0)))()
        sides = {"dense": (compiled(lambda model, x: model(x), dense, even), dense, even)}
        print(
            f"{size}: {tokens} tokens, hidden {width}, experts of {hidden // 4}, blocks of"
            f" {args.block}",
            flush=True,
        )
        for form, layer in {"experts": lambda model, x: model(x)[0], "ragged_dot": ragged}.items():
            step = None if form == "ragged_dot" and args.no_naive else compiled(layer, model, even)
            sides |= {f"{form}, {name}": (step, model, x) for name, x in inputs.items() if step}
        for name, x in inputs.items():
            load = np.asarray(jax.jit(lambda model, x: model(x)[1].load.sum(0))(model, x))
            print(
                f"  load, {name}: {load.min():.0f} to {load.max():.0f} tokens an expert", flush=True
            )
        found = measure(sides, args.rounds or ROUNDS[size])
        print(f"  {'':<22}{'fastest':>18}{'median':>20}{'processors':>20}{'temporaries':>14}")
        figures = {
            name: (s[:, 0].min(), np.median(s[:, 0]), np.median(s[:, 1]))
            for name, s in found.items()
        }
        for name in sides:
            values = [
                f"{mine:9.4f} s ({mine / bar:5.2f}x)"
                for mine, bar in zip(figures[name], figures["dense"])
            ]
            print(
                f"  {name:<22}{' '.join(values)}"
                f" {sides[name][0].memory_analysis().temp_size_in_bytes / 2**20:8.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
