"""Pictures on a grid of tiles that is chosen for each by its size, as Llama 3.2 Vision's processor
does it (transformers' MllamaImageProcessor).
"""

import math

import numpy as np
from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from evlm_jax.config import ViTConfig

BILINEAR = ResizeOptions(ResizeAlg.convolution(FilterType.bilinear))


def best_grid(vit: ViTConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Tiles down and across for a picture of `size` (width, height): of the grids that it fits in
    the one that leaves least room, else the one that it shrinks least for; of several the smallest.
    """
    side, (width, height) = vit.pretrained_size, size
    scales = {(a, b): min(a * side / height, b * side / width) for a, b in vit.grids}
    scale = min((s for s in scales.values() if s >= 1), default=max(scales.values()))
    return min((grid for grid in vit.grids if scales[grid] == scale), key=math.prod)


def fitted_size(vit: ViTConfig, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture on its grid: as it is, but one side is a tile at least and none
    more than the grid.
    """
    side, (width, height), (down, across) = vit.pretrained_size, size, grid
    wide, high = min(max(width, side), across * side), min(max(height, side), down * side)
    if wide / width < high / height:
        return wide, min(max(math.floor(height * (wide / width)), 1), high)
    return min(max(math.floor(width * (high / height)), 1), wide), high


def laid_on_tiles(image: Image.Image, vit: ViTConfig) -> np.ndarray:
    """An RGB picture as ViTConfig.input_shape has it: in the upper left of its grid, black around,
    its tiles below one another, row by row, and the number of the grid beside every pixel.
    """
    side, (down, across) = vit.pretrained_size, best_grid(vit, image.size)
    fitted = Image.new("RGB", fitted_size(vit, image.size, (down, across)), None)
    Resizer().resize_pil(image, fitted, BILINEAR)
    canvas = Image.new("RGB", (across * side, down * side))
    canvas.paste(fitted)
    tiles = np.asarray(canvas).reshape(down, side, across, side, 3).swapaxes(1, 2)
    made = np.zeros(vit.input_shape, np.uint8)
    made[: down * across * side, :, :3] = tiles.reshape(-1, side, 3)
    made[..., 3] = 1 + vit.grids.index((down, across))
    return made
