"""Every kernel of ops/ beside XLA's form, on the accelerator at hand, in less than 15 minutes:
`python -m benchmarks.accelerator`.

First the numbers: outputs and gradients of q, k and v in float32, as the largest difference from
XLA's form over the largest magnitude. Then both passes in bfloat16 at the sizes of the first stage
and of 448 px: seconds of both forms (the median of runs in turn), how many times faster the kernel
is, MiB of temporaries, and what the kernel's bfloat16 loses against float32, in units of what XLA's
loses. It ends with status 1 where a number is too far away.

Kernels are for TPUs. On a CPU they are interpreted, which says whether they are right and nothing
about time. On a GPU cuDNN's attention is in their place, of text and ViT, in bfloat16 alone."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parser
from evlm_jax.models.attention import attention, text_mask
from evlm_jax.ops.attention_plan import attention_plan, block_pair_count
from evlm_jax.ops.fused_attention import fused_attention
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from evlm_jax.ops.image_attention import image_attention
from evlm_jax.ops.packed_attention import packed_attention

BOUND = {"cpu": 1e-5, "tpu": 1e-4}  # of float32; a TPU's exp is not the host's
LOSS = 2.0  # of bfloat16, times that of XLA's form
REPEATS, SECONDS = 10, 600  # after so many seconds nothing more is timed


class Case(NamedTuple):
    """One attention in two or three forms: functions of q, k and v of these shapes."""

    name: str
    kernel: Callable
    xla: Callable
    shapes: tuple[tuple[int, ...], ...]
    cudnn: Callable | None = None


def cross(rows: int, tokens: int, images: int, keys: int, heads: int, width: int) -> Case:
    """Rows of one image group whose tokens see an image each, the last image with them a video
    of two.
    """
    start = np.sort(np.random.default_rng(0).integers(0, images, rows * tokens))
    stop = np.minimum(start + 1 + (start == images - 2), images)
    pairs = block_pair_count(start, stop, 64)
    made = attention_plan(start, stop, 64, pairs)
    plan = AttentionPlan(*(made[name][None] for name in AttentionPlan._fields))

    def form(name):
        return lambda q, k, v: grouped_attention(q, k, v, plan, 1, form=name)

    shared = (1, images, keys, heads, width)
    name = (
        f"cross-attention, {rows} x {tokens} tokens, {images} images of {keys}, {heads} x {width}"
    )
    return Case(name, form("pallas"), form("xla"), ((rows, tokens, heads, width), shared, shared))


def packed(rows: int, tokens: int, heads: int, width: int, texts: int, window: int = 0) -> Case:
    """Rows of equally long texts."""
    size = tokens // texts
    until = np.repeat((np.arange(texts, dtype=np.int32) + 1) * size, size)
    until, place = (
        np.tile(a, (rows, 1)) for a in (until, np.arange(tokens, dtype=np.int32) % size)
    )

    def kernel(q, k, v):
        return packed_attention(q, k, v, jnp.asarray(until), jnp.asarray(place), 0, (window,))

    def masked(attend):
        def form(q, k, v):
            mask = text_mask(jnp.asarray(until))
            near = place[:, :, None] - place[:, None] < (window or tokens)
            return attend(q, k, v, mask & near)

        return form

    of = f"{texts} texts" if texts > 1 else "one text"
    name = f"text, {rows} x {tokens} tokens, {of}, {heads} x {width}"
    name += f", window {window}" if window else ""
    shapes = ((rows, tokens, heads, width),) * 3
    return Case(name, kernel, masked(attention), shapes, masked(fused_attention))


def image(images: int, tokens: int, heads: int, width: int) -> Case:
    """The ViT's."""
    name = f"ViT, {images} images of {tokens}, {heads} x {width}"
    shapes = ((images, tokens, heads, width),) * 3
    return Case(name, image_attention, attention, shapes, fused_attention)


NUMBERS = [
    *(cross(2, 96, 5, 33, 2, width) for width in (64, 96, 112, 128)),
    *(packed(2, 300, 2, width, 3) for width in (64, 128)),
    packed(1, 400, 2, 64, 1, 70),
    *(image(3, tokens, 2, width) for tokens, width in ((257, 112), (50, 64))),
]
TIMES = [
    cross(2, 2048, 96, 257, 20, 128),
    cross(1, 2048, 12, 1025, 20, 128),
    packed(5, 2048, 20, 128, 4),
    packed(1, 8192, 2, 128, 1),
    packed(1, 8192, 2, 128, 1, 1024),
    image(208, 257, 16, 112),
    image(24, 1025, 16, 112),
]
SMOKE = [cross(1, 8, 2, 5, 1, 8), packed(1, 16, 1, 8, 2, 3), image(1, 5, 1, 8)]


def arrays(case: Case, dtype: str) -> list[jax.Array]:
    """q, k and v."""
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, case.shapes)]


def both_passes(form: Callable, inputs: list[jax.Array]):
    """The compiled program of outputs and gradients."""

    def weighed(*qkv):
        out = form(*qkv).astype(jnp.float32)
        return (
            out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        ).sum(), out

    step = jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(lambda *qkv: jax.tree.leaves(step(*qkv))[1:]).lower(*inputs).compile()


def difference(found: list[jax.Array], wanted: list[jax.Array]) -> float:
    """The largest of all arrays, each over its own largest magnitude."""
    pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(found, wanted, strict=True)]
    return max(np.abs(mine - theirs).max() / np.abs(theirs).max() for mine, theirs in pairs)


def numbers(case: Case) -> float:
    """`difference` of the two forms in float32."""
    inputs = arrays(case, "float32")
    with jax.default_matmul_precision("highest"):
        return difference(*(both_passes(form, inputs)(*inputs) for form in case[1:3]))


def compare(case: Case) -> tuple[list[float], list[float], float]:
    """(seconds, MiB of temporaries) of the kernel and of XLA's form, and what the kernel loses over
    what the other does.
    """
    inputs = arrays(case, "bfloat16")
    programs = [both_passes(form, inputs) for form in case[1:3]]
    seconds = [[], []]
    for _ in range(1 + REPEATS):
        for own, run in zip(seconds, programs):
            begin = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            own.append(time.perf_counter() - begin)
    wide = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        wanted = both_passes(case.xla, wide)(*wide)
    kernel, xla = (difference(run(*inputs), wanted) for run in programs)
    sizes = [run.memory_analysis().temp_size_in_bytes / 2**20 for run in programs]
    return [float(np.median(own[1:])) for own in seconds], sizes, kernel / xla


def main() -> None:
    """Measures and prints."""
    args = parser(__doc__).parse_args()
    device, begin, wrong = jax.devices()[0], time.monotonic(), []
    print(f"{len(jax.devices())} x {device.device_kind}, jax {jax.__version__}")
    if device.platform not in (*BOUND, "gpu"):
        sys.exit(f"no form of attention but XLA's is for {device.platform}")
    checked, timed = (SMOKE, []) if args.smoke else (NUMBERS, TIMES)
    if device.platform == "gpu":
        both = (case._replace(kernel=case.cudnn) for case in (*checked, *timed) if case.cudnn)
        checked, timed = [], list(both)
    elif device.platform == "cpu":
        print("kernels are interpreted on a CPU: nothing is timed")
        timed = []
    if checked:
        bound = BOUND[device.platform]
        print(f"\nfloat32, largest difference over largest magnitude (bound {bound:g})")
    for case in checked:
        found = numbers(case)
        wrong += [case.name] * (not found <= bound)
        print(f"{found:9.1e}  {case.name}", flush=True)
    if timed:
        print("\nbfloat16, both passes\n  kernel ms   XLA ms  ratio  MiB  MiB, XLA  loss")
    for case in timed:
        if time.monotonic() - begin > SECONDS:
            print(f"not timed, {SECONDS} s are over: {case.name}")
            continue
        (kernel, xla), sizes, lost = compare(case)
        wrong += [case.name] * (not lost <= LOSS)
        figures = f"{1e3 * kernel:11.2f}{1e3 * xla:9.2f}{xla / kernel:7.2f}"
        print(f"{figures}{sizes[0]:5.0f}{sizes[1]:10.0f}{lost:6.2f}  {case.name}", flush=True)
    if wrong:
        sys.exit("\ntoo far away: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
