"""Large pictures as several images: itself in small, then its tiles, each behind a tag.

    img <tile_1> img <tile_2> img .. What does the sign say?

The first is the picture as it would stand there alone. Media tokens of a tile see that tile, as
frames of a video do; text behind them sees all of the picture, and so do tags, which are text. So
the model is the same: what there is more of is images. After the 1-D tags of NVLM (arXiv
2409.11402), whose thumbnail is the last; the grid is InternVL's choice.
"""

from dataclasses import replace

from evlm_jax.config import EVLMConfig
from evlm_jax.convert.torch_model.tiles_evlm import grid_for
from evlm_jax.data import image
from evlm_jax.data.samples import ImageRef, Sample


def tiled(sample: Sample, cfg: EVLMConfig) -> Sample:
    """The sample with all images of its large pictures; a video, a picture of one tile and one
    that cannot be read stay as they are.
    """
    if not cfg.data.tiles:
        return sample
    return replace(sample, visuals=tuple(_cut(visual, cfg) for visual in sample.visuals))


def _cut(visual: tuple[ImageRef, ...], cfg: EVLMConfig) -> tuple[ImageRef, ...]:
    picture = visual[0]
    if len(visual) > 1 or picture.frame is not None or not (size := image.size_of(picture)):
        return visual
    down, across = grid_for(size, cfg.vit.size, cfg.data.tiles)
    count = down * across
    tiles = (replace(picture, tile=(number, down, across)) for number in range(count))
    return (picture, *tiles) if count > 1 else visual
