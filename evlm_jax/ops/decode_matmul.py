"""Stacks of matrices laid out for decoding: a token costs one reading of all weights, and nothing
else counts.

On CPU, XLA's own products copy a layer out of its stack first and widen 16-bit weights into memory.
For a single row of x, written as a sum of scaled rows, they become one fused loop that reads each
weight once, straight from the stack. Rows 2i and 2i+1 of bfloat16 stand in one uint32, so that
widening them is a shift and a mask:

    uint32                   odd row | even row
    float32 of the even row  word << 16
    float32 of the odd row   word & 0xffff0000

Quantised matrices are read by the same loop, byte by byte.

Elsewhere a kernel stays a plain array: the platform is chosen here, when weights are packed. On
GPUs a single row is a sum of scaled rows as well, else the product is a plain one."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from evlm_jax.ops.matmul import product
from evlm_jax.ops.platform import platform
from evlm_jax.ops.quantised import Quantised, values_of

UNROLL = 16  # matrix rows summed inside the fused loop
COLUMNS = 4096  # of one piece of the output head: its partial sums stay in the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Linear layers of a stack, one of which is `layer`.

    Called as a Linear: x [..., in] -> [..., out].
    """

    # [L, in, out], or uint32 [L, in / 2, out] that holds pairs of bfloat16 rows
    kernel: jax.Array | Quantised
    bias: jax.Array | None  # [L, out]
    layer: jax.Array | int = 0
    # operands of products with several rows, where the kernel is quantised
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x.reshape(-1, x.shape[-1]), self.layer).astype(x.dtype)
        y = y if self.bias is None else y + self.bias[self.layer].astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    @property
    def pieces(self) -> int:
        """L, of a head how many pieces it is cut into."""
        return len(jax.tree.leaves(self.kernel)[0])

    def product(self, x: jax.Array, layer: jax.Array | int) -> jax.Array:
        """x [B, in] times one layer, in float32.

        From two rows on, copying and widening the layer costs less than the loop's arithmetic.
        """
        if len(x) == 1 and platform() == "cpu":
            return _one(x, self.kernel, layer)
        if len(x) == 1 and platform() == "gpu":
            return _summed(x, self.kernel, layer)
        return _many(x, self.kernel, layer, self.dtype)


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


def pack_head(kernel: jax.Array | Quantised, dtype: str) -> Packed:
    """[in, vocab] cut into pieces of columns, as the layers of a Packed; the last piece is
    padded.
    """
    if not isinstance(kernel, Quantised):
        return Packed(pack(_pieces(kernel), dtype), None)
    pieces = Quantised(_pieces(kernel.bits), _pieces(kernel.scale), kernel.kind, -2)
    return Packed(pieces, None, dtype=dtype)


def _pieces(matrix: jax.Array) -> jax.Array:
    """[n, vocab] -> [pieces, n, columns]."""
    pieces = max(1, matrix.shape[1] // COLUMNS) if platform() == "cpu" else 1
    padded = jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % pieces)))
    return padded.reshape(len(matrix), pieces, -1).swapaxes(0, 1)


@jax.named_scope("head")
def logits(head: Packed | Quantised, x: jax.Array, vocab: int) -> jax.Array:
    """x [B, in] -> float32 [B, vocab]."""
    if isinstance(head, Quantised):  # its tiles lie along `in`
        return product("bx,xy->by" if head.axis == -2 else "bx,yx->by", x, head)
    pieces = jax.lax.map(partial(head.product, x), jnp.arange(head.pieces))
    return pieces.swapaxes(0, 1).reshape(len(x), -1)[:, :vocab].astype(jnp.float32)


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


def _one(x: jax.Array, kernel: jax.Array | Quantised, layer: jax.Array | int) -> jax.Array:
    """x [1, in] as sums of `chunk` scaled rows [groups, out], in one fused loop, and the sum of
    those as a product with ones. A group lies within a tile of what is quantised.
    """
    quantised = isinstance(kernel, Quantised)
    words, tiles = (kernel.bits, kernel.scale.shape[1]) if quantised else (kernel, 1)
    widen = partial(values_of, kind=kernel.kind) if quantised else _widen
    (layers, rows, out), width = words.shape, x.shape[1]
    chunk = math.gcd(rows // tiles, UNROLL * rows // width)
    groups = rows // chunk
    grouped, scales = (
        words.reshape(layers, groups, chunk, out),
        x.reshape(groups, chunk, width // rows),
    )
    total = 0.0
    for j in range(chunk):
        row = jax.lax.dynamic_slice(grouped, (layer, 0, j, 0), (1, groups, 1, out))[0, :, 0]
        for half, values in enumerate(widen(row)):
            total += scales[:, j, half, None] * values
    if quantised:
        of_tile = jax.lax.dynamic_index_in_dim(kernel.scale, layer, 0, False)
        total *= jnp.repeat(of_tile, groups // tiles, 0)
    return jnp.ones((1, groups), x.dtype) @ total


def _summed(x: jax.Array, kernel: jax.Array, layer: jax.Array | int) -> jax.Array:
    """x [1, in] as the sum of scaled rows, which XLA writes for GPUs as one loop that reads the
    layer from its stack; for a product it copies it first.
    """
    rows = jax.lax.dynamic_index_in_dim(kernel, layer, 0, False)
    x = x.astype(rows.dtype).astype(jnp.float32)
    return (x[0, :, None] * rows.astype(jnp.float32)).sum(0, keepdims=True)


def _many(
    x: jax.Array, kernel: jax.Array | Quantised, layer: jax.Array | int, dtype: str
) -> jax.Array:
    """A plain product with the layer taken out of the stack; operands of the weights' dtype, or of
    `dtype` where those are quantised, sums in float32.
    """
    rows = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, False), kernel)
    if isinstance(rows, Quantised):
        return product("bx,xy->by", x.astype(dtype), rows)
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
