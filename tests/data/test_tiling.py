"""Grids of tiles against the processor of Llama 3.2 Vision."""

import math

import numpy as np
import pytest
from PIL import Image

from evlm_jax.data import image, tiling
from tests.helpers.parity import needs_transformers
from tests.helpers.tiny import tiny_config

SECTIONS = {"tiles": 4, "global_blocks": 1, "grid_by_picture": True, "image_size": (32, 8)}
CFG = tiny_config(vit=SECTIONS)


@needs_transformers
@pytest.mark.parametrize("tiles, side", [(4, 560), (4, 8), (6, 224)])
def test_grids_and_sizes_are_those_of_their_processor(tiles, side):
    from transformers.models.mllama import image_processing_pil_mllama as theirs

    sizes = {"pretrained_size": side, "image_size": (tiles * side, side), "tiles": tiles}
    vit = tiny_config(vit=SECTIONS | sizes).vit
    assert list(vit.grids) == theirs.get_all_supported_aspect_ratios(tiles)
    rng = np.random.default_rng(0)
    odd = [(1, 1), (1, 5000), (5000, 1), (side, side), (2 * side, side), (side + 1, side)]
    for size in [*odd, *(2 ** rng.uniform(0, 12, (300, 2))).astype(int).tolist()]:
        width, height = size
        canvas = theirs.get_optimal_tiled_canvas(height, width, tiles, side)
        grid = tiling.best_grid(vit, size)
        assert grid == tuple(int(pixels) // side for pixels in canvas)
        fitted = theirs.get_image_size_fit_to_canvas(height, width, *canvas, side)
        assert tiling.fitted_size(vit, size, grid) == tuple(map(int, fitted[::-1]))


@needs_transformers
@pytest.mark.parametrize("size", [(50, 30), (3, 3), (8, 40), (25, 9), (12, 12)])
def test_pixels_are_those_of_their_processor(size):
    """Resized by Pillow there: the rounding may differ by one of 255."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    rng = np.random.default_rng(size[0])
    picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    processor = MllamaImageProcessorPil(
        size={"height": 8, "width": 8}, max_image_tiles=4, do_normalize=False
    )
    theirs = processor(picture, return_tensors="np")
    ours = image.pixels([image.in_memory(picture)], CFG)[0]
    assert (ours[..., 3] == theirs["aspect_ratio_ids"].item()).all()
    expected = theirs["pixel_values"][0, 0].transpose(0, 2, 3, 1).reshape(32, 8, 3) * 255
    assert np.abs(ours[..., :3] - expected).max() <= 1.01
    grid = CFG.vit.grids[ours[0, 0, 3] - 1]
    assert math.prod(grid) == theirs["aspect_ratio_mask"].sum()
