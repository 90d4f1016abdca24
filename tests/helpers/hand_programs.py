"""Small programs whose costs are counted by hand, for 8 devices:
`python -m tests.helpers.hand_programs FOLDER` compiles them for CPUs.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 8
LAYERS, ROWS, WIDTH, HIDDEN = 5, 64, 128, 256
KEPT = 16384  # rows; so many that a TPU keeps them in HBM


def build(devices: list) -> dict[str, jax.stages.Lowered]:
    """{name: lowered program}."""
    mesh = Mesh(np.array(devices).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def put(spec, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows, whole = P(("a", "b")), P()
    programs = {
        "layers": (
            _layers,
            put(rows, ROWS, WIDTH),
            put(P(None, ("a", "b")), LAYERS, WIDTH, HIDDEN),
            put(whole, LAYERS, HIDDEN, WIDTH),
        ),
        "attention": (_attention, put(rows, 8, 16, 4, 32), put(rows, 8, 24, 4, 32)),
        "nested": (_nested, put(whole, 64, 64), put(whole, 3, 64, 64)),
        "open": (_open, put(whole, 64, 64), put(whole, dtype=jnp.int32)),
        "branches": (_branches, put(whole, 64, 64), put(whole, dtype=jnp.bool)),
        "convolution": (_convolution, put(whole, 2, 9, 3), put(whole, 3, 3, 4)),
        "exchange": (_exchange(mesh), put(P("a", "b"), 64, 256)),
        "slices": (_slices, put(whole, 32, 256, 512)),
        "residuals": (_residuals, put(whole, KEPT, 256), put(whole, 20, 256, 256)),
    }
    return {name: jax.jit(f).lower(*arguments) for name, (f, *arguments) in programs.items()}


def _layers(x, first, second):
    """6 products a layer: 2 forward, 4 backward."""

    def loss(first, second):
        with jax.named_scope("stack"):
            y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, (first, second))
        return jnp.square(y).sum()

    return jax.value_and_grad(loss, (0, 1))(first, second)


def _attention(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)


def _nested(x, w):
    """3 times 4 products."""

    def outer(x, w):
        return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w), x), None

    return jax.lax.scan(outer, x, w)[0]


def _open(x, n):
    """As many products as n says."""
    with jax.named_scope("endless"):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)


def _branches(x, yes):
    """One product or two."""
    return jax.lax.cond(yes, lambda x: jnp.tanh(x @ x) @ x, lambda x: x @ x, x)


def _convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def _exchange(mesh):
    """Of [16, 128] float32 on each device, one collective of each kind."""

    def f(x):
        x = jax.lax.psum(jnp.sin(x), "a")
        gathered = jax.lax.all_gather(jnp.cos(x), "b", axis=0, tiled=True)
        swapped = jax.lax.all_to_all(jnp.tanh(gathered), "a", 0, 1, tiled=True)
        return jax.lax.ppermute(jnp.exp(swapped), "b", [(0, 1), (1, 0)])

    return jax.shard_map(
        f, mesh=mesh, in_specs=P("a", "b"), out_specs=P(("a", "b")), check_vma=False
    )


def _slices(x):
    """A scan that reads a stack and writes a stack, slice by slice."""
    return jax.lax.scan(lambda c, row: (c + row[0], jnp.sin(row + c[None])), jnp.zeros(512), x)[1]


def _residuals(x, w):
    """What the backward pass needs of every layer is kept."""
    return jax.grad(
        lambda w: jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).sum()
    )(w)


def memory(executable: jax.stages.Compiled) -> dict[str, int]:
    """XLA's own account: bytes of temporaries and of arguments."""
    found = executable.memory_analysis()
    return {
        "temporaries": found.temp_size_in_bytes,
        "arguments": found.argument_size_in_bytes,
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    for name, lowered in build(jax.devices()).items():
        executable = lowered.compile()
        Path(sys.argv[1], f"{name}.txt").write_text(executable.as_text())
        Path(sys.argv[1], f"{name}.json").write_text(json.dumps(memory(executable)))
