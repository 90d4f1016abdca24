"""Attention maps against the model itself; pictures and charts that can be read back."""

import math
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evlm_jax.batch import Batch
from evlm_jax.data.samples import MARKER, ImageRef, Sample, question
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.vit import cut_into_patches
from evlm_jax.report import attention_maps, figures
from tests.data.made import TOKENIZER
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, tiny_batch, tiny_config


@pytest.mark.parametrize(
    "every, sinks, kind, shared", [(1, 0, "routed", 1), (3, 1, "routed", 2), (1, 1, "fused", 1)]
)
def test_trace_is_the_model(every, sinks, kind, shared):
    cfg = tiny_config(
        xattn=dict(every=every, sinks=sinks, heads=2 * shared), bridge=dict(kind=kind)
    )
    model = random_model(cfg, 0)
    batch = tiny_batch(cfg, 1)
    expected = jax.jit(EVLM.hidden)(model, batch)
    for row in range(len(batch.tokens)):
        one = Batch(*(None if field is None else field[row : row + 1] for field in batch))
        hidden, weights = attention_maps.trace(model, one, jnp.arange(5))
        np.testing.assert_allclose(hidden[0], expected[row], atol=2e-5)
        assert len(weights) == len(cfg.cross_layers)


@pytest.mark.parametrize("group", [1, 2])
def test_attention_maps_stay_in_the_visible_range(group):
    cfg = tiny_config(data=dict(image_group=group, block_pairs=12 * group))
    batch, row = tiny_batch(cfg, 2), 1
    positions = list(range(cfg.data.length))
    maps = attention_maps.attention_maps(random_model(cfg, 0), batch, row, positions)
    assert maps.shape == (
        len(cfg.cross_layers),
        cfg.xattn.heads,
        len(positions),
        cfg.data.slots,
        cfg.vit.tokens,
    )
    slot = np.arange(cfg.data.slots)
    visible = (batch.visible_start[row][:, None] <= slot) & (
        slot < batch.visible_stop[row][:, None]
    )
    per_image = maps.sum(-1)
    assert np.all(per_image[:, :, ~visible] == 0) and np.all(per_image[:, :, visible] > 0)
    assert visible.any() and per_image.sum(-1).max() < 1  # the rest is the zero sink's


@pytest.mark.parametrize("side", [(8, 8), (16, 24)])
def test_patches_of_tiles_lie_where_they_are_in_the_picture(side):
    """Each patch is of its number in the picture, each class token of 0."""
    sections = dict(patch=4, pretrained_size=8, image_size=side, tiles=6, global_blocks=1)
    vit = tiny_config(vit=sections).vit
    numbers = 1 + np.arange(vit.patches).reshape(vit.grid)
    pixels = numbers.repeat(4, 0).repeat(4, 1)[None, :, :, None] * np.ones(3)
    tiles = np.asarray(cut_into_patches(pixels, vit))[0, :, :, 0]
    tokens = np.pad(tiles, ((0, 0), (1, 0)))[: math.prod(vit.laid)]
    assert tokens.size == vit.tokens and np.array_equal(
        attention_maps.heat(tokens.ravel(), vit), numbers
    )


@pytest.mark.parametrize("kind", ["flamingo", "llava", "text only"])
def test_what_has_no_map_over_patches_says_so(kind):
    cfg = tiny_config(**BASELINES[kind])
    with pytest.raises(ValueError, match=f"cannot be shown: the model has {cfg.baseline}"):
        attention_maps.attention_maps(random_model(cfg, 0), tiny_batch(cfg, 2), 0, [0])


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_word_maps(template, tmp_path):
    data = dict(
        template=template, length=96, targets=32, image_group=2, slots=5, block_pairs=24
    )  # one row alone, whatever the image groups of training
    cfg = tiny_config(llm=dict(vocab=TOKENIZER.vocab_size), data=data)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    sample = Sample(
        "a",
        "test",
        ((ImageRef(str(tmp_path / "a.png")),),),
        (question(MARKER + "is it red?", "oh yes"),),
    )
    rows = attention_maps.word_maps(random_model(cfg, 0), TOKENIZER, sample)
    assert [(row["word"], row["predicted"]) for row in rows] == [
        ("is", False),
        ("it", False),
        ("red?", False),
        ("oh", True),
        ("yes", True),
    ]
    assert all(row["grid"].shape == (2, 2) and 0 < row["grid"].sum() < 1 for row in rows)
    assert not np.allclose(rows[0]["grid"], rows[2]["grid"])


def test_heat_and_overlay_put_the_glow_where_the_weight_is():
    vit = tiny_config(vit={"image_size": (12, 16)}).vit
    weights = np.zeros((3, 2, 13))
    weights[..., 0] = 5.0  # the class token is no place in the image
    weights[..., 1 + 4 * 2 + 0] = 1.0  # last row, first column
    grid = attention_maps.heat(weights, vit)
    assert grid.shape == (3, 4) and grid[2, 0] == 1.0 and grid.sum() == 1.0
    picture = np.asarray(
        figures.overlay(Image.new("RGB", (64, 64), "white"), grid, 80), np.int32
    ).sum(-1)
    assert picture[70, 10] > 1.5 * picture[10, 70]


def test_data_uri_round_trip():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    np.testing.assert_array_equal(
        np.asarray(figures.from_data_uri(figures.data_uri(image))), np.asarray(image)
    )
    assert figures.from_data_uri(figures.data_uri(image, 20, "JPEG")).size == (15, 20)


def test_charts_are_svg_in_theme_colours():
    curves = figures.loss_curves(
        {
            "vqa": {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]},
            "emoji": {"step": [1, 3], "loss": [5.0, 4.0]},
        }
    )
    bars = figures.gate_bars([0, 2, 4], [0.1, -0.2, 0.3], [0.0, 0.1, 0.2])
    maps = figures.load_maps(
        [0, 3], {"text": [[0.5, 0.25, 0.25], [1, 0, 0]], "media": [[0, 0, 1], [0.1, 0.2, 0.7]]}
    )
    alone = figures.gate_bars([1, 9], [0.1, 0.2])
    assert "attention gate" in alone and "FFN gate" in bars and "FFN gate" not in alone
    for svg, colour in ((curves, 1), (bars, 1), (alone, 0), (maps, 0)):
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and root.get("viewBox") and root.get("width") is None
        assert f"var(--series-{colour})" in svg and "var(--ink)" in svg and "#0102" not in svg
    assert ">vqa<" in curves and ">emoji<" in curves
    many = figures.loss_curves(
        {f"source {i}": {"step": [1], "loss": [1.0]} for i in range(11)}
    )  # more than there are colours
    assert all(f">source {i}<" in many for i in range(11)) and "var(--series-7)" in many


def test_load_maps_are_as_strong_as_the_load():
    """Every cell: its layer from top to bottom, its expert from left to right, its opacity the
    share of the largest one.
    """
    load = {
        "text": [[0.5, 0.25, 0.2], [0.1, 0.3, 0.4]],
        "media": [[0.45, 0.25, 0.5], [0.05, 0.2, 0.15]],
    }  # a share of 0 is not drawn
    root = ElementTree.fromstring(figures.load_maps([0, 3], load))
    cells = []
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        if "var(--series-0)" in (style := path.get("style", "")):
            x, y = re.match(r"M ([\d.]+) ([\d.]+)", path.get("d")).groups()
            cells.append(
                (
                    float(x),
                    float(y),
                    float((re.search(r"fill-opacity: ([\d.]+)", style) or [0, 1])[1]),
                )
            )
    assert len(cells) == 12
    left, right = np.array(sorted(cells)[:6]), np.array(sorted(cells)[6:])
    for panel, shares in ((left, load["text"]), (right, load["media"])):
        by_place = [row[2] for row in sorted(panel.tolist(), key=lambda cell: (cell[1], cell[0]))]
        np.testing.assert_allclose(by_place, np.ravel(shares) / 0.5, atol=1e-3)
    text = "".join(root.itertext())
    assert "text" in text and "media" in text and "language model layer" in text
