"""Large pictures as several images: grids and pixels against InternVL's processor, documents
against the same pieces spelled out.
"""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from evlm_jax.convert.torch_model.tiles_evlm import grid_for
from evlm_jax.data import image, text
from evlm_jax.data.cut import encode_parts
from evlm_jax.data.features import content_key
from evlm_jax.data.samples import Sample, Turn, question
from evlm_jax.data.template import Media, Text, Token
from evlm_jax.data.tiles import tiled
from tests.data.made import TOKENIZER, config
from tests.helpers.parity import needs_transformers
from tests.helpers.tiny import tiny_config

SIDE = 8  # of the tiny tower's input
TILES = {"tiles": 4, "global_blocks": 1, "pretrained_size": 8, "image_size": 8}


def made(size, seed=0):
    """A picture of `size` (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(values)


def asked(*pictures, turns=None):
    refs = tuple((image.in_memory(picture),) for picture in pictures)
    return Sample("key", "made", refs, (turns or question("<image>" * len(refs) + "What?", "a"),))


@needs_transformers
@pytest.mark.parametrize("most, side", [(4, 560), (6, 448), (12, 384), (2, 16)])
def test_grids_are_those_of_internvl(most, side):
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as theirs

    rng = np.random.default_rng(0)
    odd = [
        (1, 1),
        (1, 5000),
        (side, side),
        (2 * side, 2 * side),
        (side + 1, side),
        (3 * side, side),
    ]
    for width, height in [*odd, *(2 ** rng.uniform(0, 12, (300, 2))).astype(int).tolist()]:
        across, down = theirs.get_optimal_tiled_canvas((height, width), (side, side), 1, most)
        assert grid_for((width, height), (side, side), most) == (down, across)


@needs_transformers
@pytest.mark.parametrize("size", [(50, 30), (24, 60), (90, 20), (33, 40)])
def test_pixels_are_those_of_internvl(size):
    """Resized by Pillow there: the rounding may differ by one of 255. Its thumbnail is the last."""
    from transformers.image_utils import PILImageResampling, SizeDict
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    cfg, picture = config(tiles=6), made(size)
    *tiles, thumbnail = GotOcr2ImageProcessorPil().crop_image_to_patches(
        np.asarray(picture).transpose(2, 0, 1), 1, 6, True, SizeDict(height=SIDE, width=SIDE),
        PILImageResampling.BICUBIC,
    )  # fmt: skip
    theirs = np.stack([thumbnail, *tiles]).transpose(0, 2, 3, 1).astype(int)
    ours = image.pixels(tiled(asked(picture), cfg).refs, cfg)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.02


def test_a_document_is_that_of_its_pieces():
    """A picture of two tiles, one that is small, a video and text: the same pieces spelled out."""
    cfg = config(tiles=4, template="plain")
    wide, small, frame = made((17, 8)), made((5, 5), 1), made((90, 30), 2)
    turns = question("<image>Look:<image> and<image>", "yes")
    refs = [image.in_memory(picture) for picture in (wide, small, frame)]
    sample = Sample("key", "made", ((refs[0],), (refs[1],), (refs[2], refs[2])), (turns,))
    found = text.encode(sample, TOKENIZER, cfg)
    tiles = [dataclasses.replace(refs[0], tile=(number, 1, 2)) for number in (0, 1)]
    assert found.refs == (refs[0], *tiles, refs[1], refs[2], refs[2])
    pieces = [Media(0, 0, 3), Text("<tile_1>", False), Media(1, 0, 3), Text("<tile_2>", False)]
    pieces += [Media(2, 0, 3), Text("Look:", False), Media(3, 3, 4), Text(" and", False)]
    pieces += [Media(4, 4, 6), Media(5, 4, 6), Text(" Answer:", False), Text(" yes", True)]
    pieces += [Token(TOKENIZER.eos[0], True)]
    expected = text.document([pieces], sample, TOKENIZER, cfg)
    for name in ("tokens", "positions", "visible_start", "visible_stop", "media_slot", "targets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.block_pairs == expected.block_pairs
    assert text.encode(sample, TOKENIZER, config()).refs == sample.refs


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_sizes_are_those_of_upright_pictures(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"a.{kind}")
    made((48, 16)).save(path, exif=exif)
    assert image.size_of(image.ImageRef(path)) == image.decode(path).size
    across = tiled(Sample("k", "s", ((image.ImageRef(path),),), ()), config(tiles=3)).refs[1].tile
    assert across[1:] == ((1, 3) if orientation < 5 else (3, 1))


def test_tiles_of_files_are_kept_apart_and_what_is_no_picture_stays(tmp_path):
    cfg, path = config(tiles=4), str(tmp_path / "a.png")
    made((17, 8)).save(path)
    refs = tiled(Sample("k", "s", ((image.ImageRef(path),),), ()), cfg).refs
    assert len({content_key(ref) for ref in refs}) == len(refs) == 3
    whole = image.pixels(refs, cfg)
    np.testing.assert_array_equal(whole[2], image.pixels(refs[2:], cfg)[0])
    for wrong in (str(tmp_path / "none.png"), __file__):
        sample = Sample("k", "s", ((image.ImageRef(wrong),),), ())
        assert tiled(sample, cfg) == sample


def test_a_long_document_is_cut_between_pictures_not_between_tiles():
    cfg = config(tiles=4, length=64, targets=64, images=8, slots=8, block_pairs=64)
    said = "".join(f"<image>{'word ' * count}" for count in (3, 9, 20))
    sample = asked(*(made((17, 8), i) for i in range(3)), turns=(Turn("assistant", said),))
    first = encode_parts(sample, TOKENIZER, cfg)
    parts = [first, *first.rest]
    assert len(parts) > 2 and [ref for part in parts for ref in part.refs] == [
        ref for ref in tiled(sample, cfg).refs
    ]
    assert all(len(part.refs) in (0, 3) and len(part.tokens) <= 64 for part in parts)
    laid = [token for part in parts for token in (*part.tokens, part.targets[-1]) if token < 256]
    spoken = re.sub("<tile_.>", "", bytes(laid).decode())
    assert spoken == said.replace("<image>", "")


@pytest.mark.parametrize(
    "sections", [{"data": {"resize": "pad"}}, {"media": {"around": "<|media|>"}}, {"vit": TILES}]
)
def test_what_it_cannot_stand_beside(sections):
    sections = sections | {"data": {"tiles": 4} | sections.get("data", {})}
    with pytest.raises(ValueError, match="where data.tiles is set|where vit.tiles or media.around"):
        tiny_config(**sections)
