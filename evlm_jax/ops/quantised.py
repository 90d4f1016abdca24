"""Matrices held in 8 or 4 bits: bytes, and a float32 scale for each `tile` of values along the axis
that products sum over.

    int8    a byte is a value from -128 to 127
    int4    a byte is two values from -8 to 7, those of places 2i (low half) and 2i + 1 of the axis
    nf4     likewise two numbers of NF4

They are made by qwix (extra `quant`); to compute with them takes this file alone. Bytes, not arrays
of 4-bit dtypes: they have one size on disk, in NumPy and in memory, and are cut like any others."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from evlm_jax.ops.platform import platform

BLOCK = 2**22  # values that are quantised at a time on the host
NF4 = (  # quantiles of a normal distribution: appendix E of arXiv 2305.14314
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix, or a stack or rows of one; `ops.matmul.product` takes it as its second operand."""

    bits: jax.Array  # uint8
    scale: jax.Array  # float32
    kind: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})  # of the tiles: -1 or -2

    def __getitem__(self, index: jax.Array) -> "Quantised":
        """Rows of a table whose tiles lie along its last axis."""
        return dataclasses.replace(self, bits=self.bits[index], scale=self.scale[index])

    @property
    def T(self) -> "Quantised":
        """The matrix with its axes swapped; tiles lie where they did."""
        return Quantised(self.bits.T, self.scale.T, self.kind, -3 - self.axis)

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix itself; its products of value and scale are float32 before."""
        values, axis = _values(self.bits, self.kind, self.axis), self.bits.ndim + self.axis
        tiles = (*values.shape[:axis], self.scale.shape[axis], -1, *values.shape[axis + 1 :])
        scaled = values.reshape(tiles) * jnp.expand_dims(self.scale, axis + 1)
        return scaled.reshape(values.shape).astype(dtype)

    def parts(self, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """The matrix cut along the axis of tiles: of n values a byte its places 0, n, 2n, .., its
        places 1, n + 1, .. and so on. For TPUs: scales are spread over their tiles by a product
        with ones, for libtpu would write a broadcast in five times as long.
        """
        tiles, places = self.scale.shape[self.axis], self.bits.shape[self.axis]
        within = jnp.arange(places)[:, None] // (places // tiles) == jnp.arange(tiles)
        spec = "pt,...to->...po" if self.axis == -2 else "pt,...ot->...op"
        scale = jnp.einsum(spec, within.astype(jnp.float32), self.scale, precision="highest")
        return tuple((part * scale).astype(dtype) for part in values_of(self.bits, self.kind))


def shapes(
    shape: tuple[int, ...], kind: str, tile: int, axis: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the bytes and of the scales of a matrix."""

    def divided(by):
        return tuple(n // by if i == len(shape) + axis else n for i, n in enumerate(shape))

    return divided(1 if kind == "int8" else 2), divided(tile)


def quantise(matrix: np.ndarray, kind: str, tile: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a matrix, and its scales.

    Raises ImportError where qwix is not installed.
    """
    rows = max(1, BLOCK // matrix.shape[1] // tile) * tile
    parts = [
        jax.device_get(_parts(matrix[first : first + rows], kind, tile, axis))
        for first in range(0, len(matrix), rows)
    ]
    bits, scales = map(np.concatenate, zip(*parts))
    return bits, scales


def dequantise(bits: np.ndarray, scale: np.ndarray, kind: str, axis: int) -> np.ndarray:
    """The float32 matrix of what `quantise` made."""
    return np.asarray(_whole(Quantised(bits, scale, kind, axis)))


_whole = jax.jit(partial(Quantised.astype, dtype=jnp.float32))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _parts(matrix: jax.Array, kind: str, tile: int, axis: int) -> tuple[jax.Array, jax.Array]:
    codes, scale = coded(matrix, kind, tile, axis)
    return packed(codes, kind, axis), scale


def coded(matrix: jax.Array, kind: str, tile: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """A byte a value, in 4 bits its lower half, and scales, as qwix rounds.

    Raises ImportError where qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError('quantising needs qwix: pip install "evlm-jax[quant]"') from error
    axis %= matrix.ndim
    dtype = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}[kind]
    made = qwix.quantize(
        matrix.astype(jnp.float32),
        dtype,
        channelwise_axes=[other for other in range(matrix.ndim) if other != axis],
        tiled_axes={axis: tile},
    )
    values = made.qvalue
    if kind != "nf4":
        values = jax.lax.bitcast_convert_type(values.astype(jnp.int8), jnp.uint8)
    codes = values.astype(jnp.uint8)
    return codes if kind == "int8" else codes & 15, made.scale


def packed(codes: jax.Array, kind: str, axis: int) -> jax.Array:
    """The bytes of a matrix of `coded`."""
    if kind == "int8":
        return codes
    low, high = (jax.lax.slice_in_dim(codes, side, None, 2, axis % codes.ndim) for side in (0, 1))
    return low | (high << 4)


def values_of(bits: jax.Array, kind: str) -> tuple[jax.Array, ...]:
    """The values of bytes, before the scale, float32: of "int8" one array, else those of the low
    and those of the high halves.
    """
    if kind == "int8":
        return (number_of(bits, kind),)
    wide = bits.astype(jnp.int32)
    return number_of(wide & 15, kind), number_of(wide >> 4, kind)


def joined(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Places 0 of all parts along `axis`, then their places 1, and so on."""
    stacked = jnp.stack(parts, axis + 1)
    return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])


def row_product(x: jax.Array, matrix: Quantised) -> jax.Array:
    """x [in] times a matrix whose tiles lie along `in`, as sums of scaled rows: float32 [out]. XLA
    writes those of a tile for GPUs as one loop over the bytes, and makes no matrix of them.
    """
    axis, other = 2 + matrix.axis, -1 - matrix.axis
    parts = values_of(matrix.bits, matrix.kind)
    scales = x.reshape(-1, len(parts)).astype(jnp.float32)
    total = sum(jnp.expand_dims(scales[:, i], other) * part for i, part in enumerate(parts))
    tiles = (*total.shape[:axis], matrix.scale.shape[axis], -1, *total.shape[axis + 1 :])
    return (total.reshape(tiles).sum(axis + 1) * matrix.scale).sum(axis)


def _values(bits: jax.Array, kind: str, axis: int) -> jax.Array:
    """What the bytes say, before the scale: float32."""
    if kind == "int8":
        return values_of(bits, kind)[0]
    axis += bits.ndim
    if platform() == "cpu":  # where joined halves take ten times as long; libtpu would store these
        wide = jnp.repeat(bits, 2, axis).astype(jnp.int32)
        odd = jax.lax.broadcasted_iota(jnp.int32, wide.shape, axis) % 2 == 1
        return number_of(jnp.where(odd, wide >> 4, wide & 15), kind)
    return number_of(joined((bits & 15, bits >> 4), axis), kind)


def number_of(code: jax.Array, kind: str) -> jax.Array:
    """The number that a byte, in 4 bits half a byte, 0 to 15, stands for: float32."""
    if kind == "int8":
        return jax.lax.bitcast_convert_type(code, jnp.int8).astype(jnp.float32)
    return _nf4(code) if kind == "nf4" else ((code.astype(jnp.int32) ^ 8) - 8).astype(jnp.float32)


def _nf4(index: jax.Array) -> jax.Array:
    """NF4[index], by choices between neighbours: vector units gather one number at a time. GPUs
    gather well, and XLA would keep the choices' 16 constants there, each as large as the matrix.
    """
    if platform() == "gpu":
        return jnp.take(jnp.array(NF4, jnp.float32), index, mode="clip")
    found = [jnp.float32(number) for number in NF4]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2])]
    return found[0]
