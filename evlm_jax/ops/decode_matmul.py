"""Stacks of matrices laid out for decoding: a token costs one reading of all weights, and nothing
else counts.

On CPU, XLA's own products copy a layer out of its stack first and widen 16-bit weights into memory.
For a single row of x, written as a sum of scaled rows, they become one fused loop that reads each
weight once, straight from the stack. Rows 2i and 2i+1 of bfloat16 stand in one uint32, so that
widening them is a shift and a mask:

    uint32                   odd row | even row
    float32 of the even row  word << 16
    float32 of the odd row   word & 0xffff0000

Elsewhere a kernel stays a plain array and the product a plain product: the platform is chosen here,
when weights are packed."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from evlm_jax.ops.matmul import product
from evlm_jax.ops.platform import platform
from evlm_jax.ops.quantised import Quantised

UNROLL = 16  # matrix rows summed inside the fused loop
COLUMNS = 4096  # of one piece of the output head: its partial sums stay in the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Linear layers of a stack, one of which is `layer`.

    Called as a Linear: x [..., in] -> [..., out].
    """

    kernel: jax.Array  # [L, in, out], or uint32 [L, in / 2, out] that holds pairs of bfloat16 rows
    bias: jax.Array | None  # [L, out]
    layer: jax.Array | int = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _product(x.reshape(-1, x.shape[-1]), self.kernel, self.layer).astype(x.dtype)
        y = y if self.bias is None else y + self.bias[self.layer].astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)


def compute_dtype(dtype: str) -> jnp.dtype:
    """The dtype of activations beside weights of `dtype`: on CPUs everything but a product is
    slower in 16 bits, so there it is float32.
    """
    return jnp.dtype(jnp.float32 if platform() == "cpu" else dtype)


def pack(kernel: jax.Array, dtype: str) -> jax.Array:
    """[L, in, out] -> the kernel of a Packed, with weights of `dtype`."""
    kernel = kernel.astype(dtype)
    if platform() != "cpu" or kernel.dtype != jnp.bfloat16 or kernel.shape[1] % 2:
        return kernel
    pairs = kernel.reshape(kernel.shape[0], -1, 2, kernel.shape[2]).swapaxes(2, 3)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint32)


def pack_head(kernel: jax.Array, dtype: str) -> Packed:
    """[in, vocab] cut into pieces of columns, as the layers of a Packed;
    the last piece is padded.
    """
    pieces = max(1, kernel.shape[1] // COLUMNS) if platform() == "cpu" else 1
    padded = jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % pieces)))
    return Packed(pack(padded.reshape(len(kernel), pieces, -1).swapaxes(0, 1), dtype), None)


@jax.named_scope("head")
def logits(head: Packed | Quantised, x: jax.Array, vocab: int) -> jax.Array:
    """x [B, in] -> float32 [B, vocab]."""
    if isinstance(head, Quantised):  # its tiles lie along `in`
        return product("bx,xy->by" if head.axis == -2 else "bx,yx->by", x, head)
    pieces = jax.lax.map(lambda i: _product(x, head.kernel, i), jnp.arange(head.kernel.shape[0]))
    return pieces.swapaxes(0, 1).reshape(len(x), -1)[:, :vocab].astype(jnp.float32)


def _product(x: jax.Array, kernel: jax.Array, layer: jax.Array | int) -> jax.Array:
    """x [B, in] times one layer.

    From two rows on, copying and widening the layer costs less than the loop's arithmetic.
    """
    return (_one if len(x) == 1 and platform() == "cpu" else _many)(x, kernel, layer)


def _widen(words: jax.Array) -> tuple[jax.Array, ...]:
    """Rows of a kernel as one or two arrays of rows: float32 of the even and of the odd rows where
    they are paired.
    """
    if words.dtype != jnp.uint32:
        return (words,)
    return tuple(
        jax.lax.bitcast_convert_type(half, jnp.float32)
        for half in (words << 16, words & jnp.uint32(0xFFFF0000))
    )


def _one(x: jax.Array, kernel: jax.Array, layer: jax.Array | int) -> jax.Array:
    """x [1, in] as sums of `chunk` scaled rows [groups, out], in one fused loop, and the sum of
    those as a product with ones.
    """
    (layers, rows, out), width = kernel.shape, x.shape[1]
    chunk = math.gcd(rows, UNROLL * rows // width)
    grouped, scales = (
        kernel.reshape(layers, -1, chunk, out),
        x.reshape(rows // chunk, chunk, width // rows),
    )
    total = 0.0
    for j in range(chunk):
        words = jax.lax.dynamic_slice(grouped, (layer, 0, j, 0), (1, rows // chunk, 1, out))[
            0, :, 0
        ]
        for half, row in enumerate(_widen(words)):
            total += scales[:, j, half, None] * row
    return jnp.ones((1, rows // chunk), x.dtype) @ total


def _many(x: jax.Array, kernel: jax.Array, layer: jax.Array | int) -> jax.Array:
    """A plain product with the layer taken out of the stack; operands of the weights' dtype, sums
    in float32.
    """
    rows = jax.lax.dynamic_index_in_dim(kernel, layer, 0, False)
    pairs = rows.dtype == jnp.uint32
    parts = (
        [
            jax.lax.bitcast_convert_type((rows >> s).astype(jnp.uint16), jnp.bfloat16)
            for s in (0, 16)
        ]
        if pairs
        else [rows]
    )
    return sum(
        product("bx,xy->by", x[:, i :: len(parts)].astype(part.dtype), part)
        for i, part in enumerate(parts)
    )
