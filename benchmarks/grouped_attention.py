"""Cross-attention of a packed sequence, forward and backward:
`python -m benchmarks.grouped_attention`.

64 images of 257 visual tokens beside 2048 text tokens, each of which sees one image; 8 heads of
128, float32 (performance.md). A loop over the images in PyTorch is the bar: it does the needed work
only, one image at a time.
"""

import importlib.util
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parser
from evlm_jax.ops.attention_plan import attention_plan, block_pair_count
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention

REPEATS = 3  # of which the fastest counts


def ours(form: str, block: int, start: np.ndarray, sinks: int):
    """The form of ops/, with the plan that the packer would make."""
    made = attention_plan(start, start + 1, block, block_pair_count(start, start + 1, block))
    arrays = AttentionPlan(*(made[name][None] for name in AttentionPlan._fields))
    return lambda q, k, v: grouped_attention(q, k, v, arrays, sinks, form=form)


def dense(start: np.ndarray, sinks: int):
    """Every token against every image under a mask, the zero keys materialised: the oracle of the
    tests.
    """

    def attend(q, k, v):
        keys, values = (
            jnp.pad(a.reshape(1, -1, *a.shape[3:]), ((0, 0), (0, sinks), (0, 0), (0, 0)))
            for a in (k, v)
        )
        image = np.concatenate([np.repeat(np.arange(k.shape[1]), k.shape[2]), np.full(sinks, -1)])
        scores = jnp.einsum("btnh,bsnh->bnts", q, keys) * q.shape[-1] ** -0.5
        scores = jnp.where((image == start[:, None]) | (image < 0), scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), values)

    return attend


def torch_loop(start: np.ndarray, sinks: int):
    """scaled_dot_product_attention image by image."""
    import torch
    import torch.nn.functional as F

    counts = np.bincount(start).tolist()

    def attend(q, k, v):
        out = []
        for queries, keys, values in zip(q[0].split(counts), k[0].unbind(), v[0].unbind()):
            keys, values = (F.pad(a.transpose(0, 1), (0, 0, 0, sinks)) for a in (keys, values))
            out.append(
                F.scaled_dot_product_attention(queries.transpose(0, 1), keys, values).transpose(
                    0, 1
                )
            )
        return torch.cat(out)[None]

    return attend


def measure_jax(attend, arrays, weight) -> tuple[float, float]:
    """(seconds, MB of temporaries) of value and gradients."""
    step = (
        jax.jit(jax.value_and_grad(lambda *a: (attend(*a) * weight).sum(), argnums=(0, 1, 2)))
        .lower(*arrays)
        .compile()
    )
    seconds = fastest(lambda: jax.block_until_ready(step(*arrays)))
    return seconds, step.memory_analysis().temp_size_in_bytes / 2**20


def measure_torch(attend, arrays, weight) -> tuple[float, float]:
    """(seconds, MB by which the process grew)."""
    import torch

    leaves, weight = [torch.tensor(a, requires_grad=True) for a in arrays], torch.tensor(weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step():
        for leaf in leaves:
            leaf.grad = None
        (attend(*leaves) * weight).sum().backward()

    return fastest(step), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def fastest(step) -> float:
    """Seconds."""
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def main() -> None:
    """Measures and prints."""
    asked = parser(__doc__)
    asked.add_argument("--images", type=int, default=64)
    asked.add_argument("--tokens", type=int, default=2048)
    args = asked.parse_args()
    if args.smoke:
        args.images, args.tokens = 3, 48
    rng, visual, heads, width, sinks = np.random.default_rng(0), 257, 8, 128, 1
    start = np.sort(
        np.concatenate(
            [np.arange(args.images), rng.integers(0, args.images, args.tokens - args.images)]
        )
    )
    shapes = ((1, args.tokens, heads, width), *[(1, args.images, visual, heads, width)] * 2)
    arrays, weight = (
        [rng.standard_normal(s, np.float32) for s in shapes],
        rng.standard_normal(shapes[0], np.float32),
    )
    forms = {}
    if importlib.util.find_spec("torch") and not args.smoke:
        forms |= {"torch, loop over images": (measure_torch, torch_loop(start, sinks))}
    forms |= {
        f"{form}, query block {block}": (measure_jax, ours(form, block, start, sinks))
        for form in ("loop", "xla")
        for block in (16, 32, 64)
    }
    forms |= {"dense with mask": (measure_jax, dense(start, sinks))}
    bar = None
    for name, (measure, attend) in forms.items():
        seconds, megabytes = measure(attend, arrays, weight)
        bar = bar or seconds
        print(f"{name:<26}{seconds:8.3f} s ({seconds / bar:5.2f}x) {megabytes:8.0f} MB", flush=True)


if __name__ == "__main__":
    main()
