"""Position tables for another image size, as weight matrices in NumPy: one small product at load
time, no framework's resize.

Two cubic rules are in use for the same checkpoints. EVA and DINOv2 call torch's bicubic (Keys a =
-0.75, edges clamped, no antialias); timm antialiases (a = -0.5, the kernel widened when shrinking,
weights renormalised at the edges)."""

import math

import numpy as np

from evlm_jax.checkpoint.lazy_tensors import Tensor

RULES = {"bicubic": (-0.75, False), "antialias": (-0.5, True)}


def keys(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at distances x."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def weights(size: int, target: int, rule: str) -> np.ndarray:
    """[target, size] matrix that resamples one axis, as
    torch.nn.functional.interpolate(align_corners=False) does.
    """
    a, antialias = RULES[rule]
    scale = size / target
    centers = (np.arange(target) + 0.5) * scale
    if antialias:
        widen = max(scale, 1.0)
        inside = np.abs(np.arange(size) + 0.5 - centers[:, None]) / widen
        matrix = keys(inside, a)
        return matrix / matrix.sum(1, keepdims=True)
    left = np.floor(centers - 0.5).astype(int)
    matrix = np.zeros((target, size))
    for offset in (-1, 0, 1, 2):
        at = left + offset
        np.add.at(
            matrix, (np.arange(target), np.clip(at, 0, size - 1)), keys(at + 0.5 - centers, a)
        )
    return matrix


Grid = tuple[int, int]  # patches down and across


def resize_positions(table: np.ndarray, grid: Grid, target: Grid, rule: str) -> np.ndarray:
    """[prefix + patches of `grid`, V] -> [prefix + patches of `target`, V]; the prefix (class) row
    stays. Computed in float64.

    At the same size the table keeps its bits, signs of zeros included.
    """
    if grid == target:
        return table
    prefix, patches = np.split(table, [len(table) - math.prod(grid)])
    patches = np.einsum(
        "oi,pj,ijv->opv",
        *(weights(size, to, rule) for size, to in zip(grid, target, strict=True)),
        patches.reshape(*grid, -1).astype(np.float64),
        optimize=True,
    )
    return np.concatenate([prefix, patches.reshape(-1, table.shape[1]).astype(table.dtype)])


def resized_positions(table: Tensor, grid: Grid, target: Grid, rule: str) -> Tensor:
    """`resize_positions` of a table that is read when it is asked for."""
    if grid == target:
        return table
    count = table.shape[0] - math.prod(grid) + math.prod(target)
    return Tensor(
        (count, table.shape[1]),
        table.dtype,
        lambda: resize_positions(table.read(), grid, target, rule),
    )
