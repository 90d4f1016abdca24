"""The leaves of the model: linear, norms, and stacks of equal blocks.

Unusual: parameters keep their own dtype and every layer computes in the dtype of its input, so
precision is decided once, where activations enter the model. Norms compute in float32. Parameters
carry their logical axes as metadata (`axes`)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evlm_jax.ops.matmul import operand_dtype, product
from evlm_jax.ops.quantised import Quantised, shapes
from evlm_jax.parallel.sharding import gathered_weight


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float | None = None,
    value: float = 0.0,
) -> nnx.Param:
    """A float32 parameter: normal with deviation `std`, or the constant `value`; `axes` names every
    dimension for mesh.py.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} must name every dimension of shape {shape}")
    array = (
        jnp.full(shape, value, jnp.float32)
        if std is None
        else std * jax.random.normal(rngs.params(), shape, jnp.float32)
    )
    return nnx.Param(array, axes=axes)


class Fill(NamedTuple):
    """Heads of `width` numbers, each with zeros behind it up to `lanes`."""

    width: int
    lanes: int

    def __call__(self, x: jax.Array, axis: int) -> jax.Array:
        """x whose `axis` >= 0 is heads side by side, filled."""
        *before, count = x.shape[: axis + 1]
        split = x.reshape(*before, count // self.width, self.width, *x.shape[axis + 1 :])
        sizes = [(0, 0)] * split.ndim
        sizes[axis + 1] = (0, self.lanes - self.width)
        return jnp.pad(split, sizes).reshape(*before, -1, *x.shape[axis + 1 :])


class Linear(nnx.Module):
    """x [..., in] -> [..., out]. The one place where a matrix of the model becomes the operand of a
    product: what adapts or quantises matrices changes this class.
    """

    kernel_scale: nnx.Param | None = None  # [in / tile, out] of a quantised kernel
    kind = ""  # of its quantisation
    lora_a: nnx.Param | None = None  # [in, rank]
    lora_b: nnx.Param | None = None  # [rank, out]
    lora_scale = 0.0

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs, bias: bool = False
    ):
        self.kernel = param(rngs, shape, axes, std=shape[0] ** -0.5)
        self.bias = param(rngs, shape[1:], axes[1:]) if bias else None

    def adapt(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Adds `scale` times a product of this rank, which begins at 0, also to each of a stack;
        `lora_a` is drawn as PEFT draws it.
        """
        *layers, before, behind = self.kernel.shape
        first, last = self.kernel.get_metadata()["axes"]
        spread = before**-0.5
        drawn = jax.random.uniform(
            rngs.params(), (*layers, before, rank), minval=-spread, maxval=spread
        )
        zeros = jnp.zeros((*layers, rank, behind))
        self.lora_a = nnx.Param(drawn, axes=(first, "rank"), uneven=True)
        self.lora_b = nnx.Param(zeros, axes=("rank", last), uneven=True)
        self.lora_scale = scale

    def hold(self, kind: str, tile: int) -> None:
        """Holds the kernel quantised, also those of a stack; its values are still to come."""
        self.kernel, self.kernel_scale = held(self.kernel, kind, tile, -2)
        self.kind = kind

    def operand(self, dtype: jnp.dtype) -> jax.Array | Quantised:
        """The kernel as `product` takes it; on a mesh it is gathered, in `dtype` or quantised."""
        return operand(self.kernel, self.kernel_scale, self.kind, -2, dtype)

    @property
    def plain(self) -> bool:
        """Whether it is one matrix, neither adapted nor quantised."""
        return self.kernel_scale is None and self.lora_a is None

    def __call__(
        self, x: jax.Array, read: Fill | None = None, written: Fill | None = None
    ) -> jax.Array:
        """`read`, `written`: of a plain one, x and what is returned are filled so, by zeros in the
        matrix: laying out heads of 112 again to lanes of 128 costs more (D-OPS-16).
        """
        dtype = operand_dtype(x)
        matrix = self.operand(dtype)
        matrix = matrix if read is None else read(matrix, 0)
        matrix = matrix if written is None else written(matrix, 1)
        y = _times(x, matrix, x.dtype if self.lora_a is None else jnp.float32)
        if self.lora_a is not None:
            inner = _times(x, gathered_weight(self.lora_a, dtype), x.dtype)
            inner = checkpoint_name(inner, "linear")
            y = y + self.lora_scale * _times(inner, gathered_weight(self.lora_b, dtype))
        y = checkpoint_name(y.astype(x.dtype), "linear")
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        return y + (bias if written is None else written(bias, 0))

    def matrix(self) -> jax.Array | Quantised:
        """[in, out], or [layers, in, out] of a stack: what a product with x is by, as it lies. An
        adapter is part of it, unless it stands beside a quantised kernel.
        """
        if self.kernel_scale is not None:
            return Quantised(self.kernel[...], self.kernel_scale[...], self.kind, -2)
        if self.lora_a is None:
            return self.kernel[...]
        added = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
        return self.kernel[...] + self.lora_scale * added


def _times(
    x: jax.Array, matrix: jax.Array | Quantised, result: jnp.dtype = jnp.float32
) -> jax.Array:
    """x [..., in] by a matrix [in, out], in float32 and rounded to `result`."""
    return product("...x,xy->...y", x, matrix, result=result)


def held(matrix: nnx.Param, kind: str, tile: int, axis: int) -> tuple[nnx.Param, nnx.Param]:
    """Parameters, without values, of a quantised matrix: its bytes, and the scales of tiles along
    `axis`.
    """
    axes, (bits, scale) = matrix.get_metadata()["axes"], shapes(matrix.shape, kind, tile, axis)
    return (
        nnx.Param(jnp.zeros(bits, jnp.uint8), axes=axes),
        nnx.Param(jnp.zeros(scale, jnp.float32), axes=axes, uneven=True),
    )


def operand(
    matrix: nnx.Param, scale: nnx.Param | None, kind: str, axis: int, dtype: jnp.dtype
) -> jax.Array | Quantised:
    """A parameter as `product` takes it. On a mesh it is gathered: in `dtype`, or as the bytes and
    scales that it is held in.
    """
    if scale is None:
        return gathered_weight(matrix, dtype)
    parts = (gathered_weight(part, part.dtype) for part in (matrix, scale))
    return Quantised(*parts, kind, axis)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in float32."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), ("norm",), value=1.0)
        self.bias = param(rngs, (width,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (
            y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        ).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis, in float32; cast before the scale, as Llama and Qwen do. With
    `plus_one` by 1 + scale, cast behind it, as Gemma does.
    """

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs, plus_one: bool = False):
        self.scale = param(rngs, (width,), ("norm",), value=1.0 - plus_one)
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (y * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's mass below it, in float32, as PyTorch has it. JAX's form
    calls erfc, which takes TPUs more than a product does and rounds to 16 bits before (D-OPS-27).
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class MLP(nnx.Module):
    """Two matrices around an activation, gated a third beside the first: x [..., D] -> [..., D]."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        bias: bool,
        rngs: nnx.Rngs,
        axes: tuple[str, str] = ("embed", "mlp"),
        gated: bool = False,
    ):
        self.fc1 = Linear((width, hidden), axes, rngs, bias)
        self.up = Linear((width, hidden), axes, rngs, bias) if gated else None
        self.fc2 = Linear((hidden, width), axes[::-1], rngs, bias)
        self.activation = activation

    @jax.named_scope("ffn")
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ACTIVATIONS[self.activation](self.fc1(x))
        return self.fc2(y if self.up is None else y * self.up(x))


def heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[..., N*H] -> [..., N, H]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def stack(block: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks as one Module whose parameters have a leading layer axis: compile time does
    not grow with depth.
    """
    return jax.vmap(block)(rngs.split(count))


_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(
        "weight"
    ),  # a gathered matrix is never kept
    "dots": jax.checkpoint_policies.save_only_these_names("linear"),
    "full": None,
}
REMAT = {
    name: partial(jax.checkpoint, policy=policy, prevent_cse=False)
    for name, policy in _POLICIES.items()
}  # for bodies of scans
