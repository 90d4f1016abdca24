"""Why ops/matmul.py is as it is: a linear layer of SmolLM2, forward and with the gradient of x:
`python -m benchmarks.products`.

1,024 positions, 576 -> 1,536, in GFLOP/s; the ratio is to float32. On CPUs without AMX all lines
are about the same."""

import time

import jax
import jax.numpy as jnp

from benchmarks import parser
from evlm_jax.ops.matmul import product

POSITIONS, WIDTH, HIDDEN, REPEATS = 1024, 576, 1536, 50
SMOKE = (16, 24, 32, 1)


def plain(result: str | None):
    """einsum, its result asked for in a dtype."""
    return lambda x, kernel: jnp.einsum("td,df->tf", x, kernel, preferred_element_type=result)


def speed(layer, dtype: str, backward: bool, sizes: tuple[int, ...]) -> float:
    """GFLOP/s."""
    positions, width, hidden, repeats = sizes
    key, flops = jax.random.key(0), 2 * positions * width * hidden * (2 if backward else 1)
    x, kernel = (
        jax.random.normal(key, (positions, width), dtype),
        jax.random.normal(key, (width, hidden), dtype),
    )
    g = jax.random.normal(key, (positions, hidden), dtype)

    def both(x):
        y, transpose = jax.vjp(
            lambda x: layer(x, kernel).astype(dtype), x
        )  # layers hand on what has their dtype
        return y, transpose(g)

    run = jax.jit(both if backward else lambda x: layer(x, kernel).astype(dtype))
    jax.block_until_ready(run(x))
    begin = time.perf_counter()
    for _ in range(repeats):
        out = run(x)
    jax.block_until_ready(out)
    return flops * repeats / (time.perf_counter() - begin) / 1e9


def main() -> None:
    """Measures and prints."""
    sizes = SMOKE if parser(__doc__).parse_args().smoke else (POSITIONS, WIDTH, HIDDEN, REPEATS)
    forms = {
        "float32": (plain(None), "float32"),
        "bfloat16 -> bfloat16": (plain(None), "bfloat16"),
        "bfloat16 -> float32, JAX's gradient": (plain("float32"), "bfloat16"),
        "bfloat16 -> float32, ours": (
            lambda x, kernel: product("td,df->tf", x, kernel),
            "bfloat16",
        ),
    }
    print(f"{'GFLOP/s':<38}{'forward':>16}{'with gradient':>16}")
    base = None
    for name, (layer, dtype) in forms.items():
        speeds = [speed(layer, dtype, backward, sizes) for backward in (False, True)]
        base = base or speeds
        print(
            f"{name:<38}" + "".join(f"{s:8.0f} ({s / b:4.2f}x)" for s, b in zip(speeds, base)),
            flush=True,
        )


if __name__ == "__main__":
    main()
