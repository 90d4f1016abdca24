"""What variants of one seed have in common: documents of every update, values that they begin
with.
"""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from evlm_jax.config import from_config_dict
from evlm_jax.data.mixture import tasks
from evlm_jax.data.pack import assemble
from evlm_jax.data.pipeline import Lane
from evlm_jax.data.sources import open_source
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.models import param_names
from evlm_jax.models.evlm import PARTS, TOWERS
from evlm_jax.models.initializers import cross_attention_tensors
from experiments import scenes_study
from tests.helpers.checkpoints import tokenizer_directory
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config

IMAGES = {  # of the variants of a study, what changes what a row holds
    "base": {},
    "flamingo": {"bridge": {"kind": "flamingo"}, "media": {"tokens": 1}},
    "llava": {"bridge": {"kind": "llava"}, "xattn": {"every": 0}, "media": {"tokens": 4}},
}
LENGTH, MOST = 300, 12


def packed(folder, variant, length, **data):
    """The documents of the first updates' rows."""
    data = data | dict(
        length=length, images=MOST, slots=MOST, targets=200, block_pairs=90, dialogs=1
    )
    data |= dict(sources=("easy-vqa",), weights=(1.0,), template="plain")
    init = dict(vision="", llm=str(folder))
    cfg = tiny_config(data=data, init=init, **IMAGES[variant])
    tokenizer = load_tokenizer(cfg.init.llm)
    lane, found = Lane(tasks([open_source("easy-vqa")], tokenizer, cfg), cfg, 0), []
    for _ in range(4):
        rows = lane.rows()
        assert assemble(rows, cfg)["tokens"].shape == (1, length)
        found.append([(document.key, document.dialog.tolist()) for document in rows[0]])
    return found


@needs_asset("easy-vqa")
def test_equal_documents_in_every_update(tmp_path):
    """Though an image takes 2 positions, 1 or 4: a row of the last is longer by 2 for each."""
    folder = tokenizer_directory(tmp_path / "tokenizer")
    common = dict(pack_length=LENGTH, pack_media=2)
    base = packed(folder, "base", LENGTH, **common)
    assert packed(folder, "base", LENGTH) == base and min(map(len, base)) >= 3
    assert packed(folder, "flamingo", LENGTH, **common) == base
    assert packed(folder, "llava", LENGTH + 2 * MOST, **common) == base
    assert packed(folder, "llava", LENGTH) != base  # as its images are


def test_a_row_must_hold_what_is_packed():
    with pytest.raises(ValueError, match="data.length must be at least 56: data.pack_length"):
        tiny_config(data=dict(pack_length=48, pack_media=1), media={"tokens": 3})
    with pytest.raises(ValueError, match="data.pack_length and data.pack_media are given together"):
        tiny_config(data=dict(pack_length=48))


@pytest.mark.parametrize("variant", scenes_study.VARIANTS)
def test_the_study_packs_alike(variant):
    """Rows are long enough, and block pairs and targets never end one before its tokens do."""
    cfg, base = (from_config_dict(scenes_study.get_config(name)) for name in (variant, "base"))
    data = cfg.data
    same = dict(length=data.length, seed=data.seed)
    assert replace(base.data, **same) == data
    blocks = -(-data.pack_length // cfg.xattn.query_block)
    assert data.block_pairs >= blocks + data.images  # a picture a document: one block is cut for it


def begun(cfg):
    """What a run begins with besides the towers, by name."""
    found = {}
    for part in PARTS.keys() - {*TOWERS}:
        if (made := PARTS[part](cfg, nnx.Rngs(cfg.train.seed))) is not None:
            found |= param_names.flatten(cfg, nnx.state(nnx.Dict({part: made})))
    return {name: np.asarray(array) for name, array in found.items()}


def test_equal_names_begin_equal():
    """By seed and name alone: whatever else a variant has, and wherever its blocks stand."""
    base = begun(tiny_config())
    variants = {
        "fused": {"bridge": {"kind": "fused"}},
        "flamingo": {"bridge": {"kind": "flamingo"}},
        "moe": {"moe": {"copies": 2}},
        "every-2": {"xattn": {"every": 2}},
        "taps": {"vit": {"taps": (4,)}},
    }
    for variant, changes in variants.items():
        values = begun(cfg := tiny_config(**changes))
        common = [name for name in values.keys() & base.keys() if values[name].ndim > 1]
        assert len(common) >= 8, variant
        for name in common:
            np.testing.assert_array_equal(values[name], base[name], err_msg=f"{variant} {name}")
        imported = cross_attention_tensors(cfg)
        name = f"xattn/{cfg.cross_layers[-1]}/q/kernel"
        np.testing.assert_allclose(imported[name].read(), values[name], rtol=1e-6, atol=1e-8)
    other = begun(tiny_config(train={"seed": 1}))
    assert all(not np.array_equal(other[n], base[n]) for n in base if n.endswith("q/kernel"))
