"""Norms set for a batch: against moments by NumPy, and a run that starts with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.checkpoint import store
from evlm_jax.flops import real_tokens
from evlm_jax.models.norm_init import FLOOR, centre_norms
from evlm_jax.train import train
from tests.helpers.random_model import random_model
from tests.helpers.tiny import TinyData, tiny_batch, tiny_config, tiny_towers


def new_model(cfg):
    """Random towers under new cross-attention: closed gates, norms of scale 1 and bias 0."""
    model = random_model(cfg, seed=0)
    for gate in model.xattn.gates().values():
        gate.close()
    for norm in (model.xattn.norm, model.xattn.ffn_norm, model.xattn.kv_norm):
        norm.scale[...], norm.bias[...] = jnp.ones(norm.scale.shape), jnp.zeros(norm.bias.shape)
    return model


@jax.jit
def inputs(model, batch):
    """What each block reads after its norms: text [X, B, T, D] twice, visual tokens
    [X, C, I, S, V].
    """

    def observe(block, tap, x):
        return (block.norm(x), block.ffn_norm(x), block.kv_norm(tap))

    return model.forward_with_observer(batch, model.visual_states(batch), observe)[1].observed


@pytest.mark.parametrize("every, group", [(1, 1), (3, 2)])
def test_norms_centre_what_they_read(every, group):
    cfg = tiny_config(
        xattn={"every": every}, data={"image_group": group, "block_pairs": 12 * group}
    )
    batch, model = tiny_batch(cfg, seed=0, rows=2, fill=0.5), new_model(cfg)
    before = inputs(model, batch)
    nnx.update(model, jax.jit(centre_norms)(model, batch))

    at = (
        np.arange(2)[:, None].repeat(cfg.data.targets, 1)[batch.targets >= 0],
        batch.target_positions[batch.targets >= 0],
    )
    text = real_tokens(batch) & (batch.media_slot < 0)
    seen = np.zeros((2 // group, cfg.data.slots), bool)
    for b, (start, stop) in enumerate(zip(batch.visible_start, batch.visible_stop)):
        seen[b // group, [i for first, last in zip(start, stop) for i in range(first, last)]] = True
    assert not text.all() and not seen.all()
    for old, new in list(zip(map(np.asarray, before), map(np.asarray, inputs(model, batch)))):
        around, spots = (text, at) if old.ndim == 4 else (seen, seen)
        for x, y in zip(old, new):  # a block each

            def pick(a, where):
                return a[where].reshape(-1, a.shape[-1])

            centre = pick(x, spots).mean(0)
            spread = np.sqrt(np.square(pick(x, around) - centre).mean(0) + FLOOR)
            np.testing.assert_allclose(y, (x - centre) / spread, atol=1e-4)
            np.testing.assert_allclose(pick(y, spots).mean(0), 0, atol=1e-4)


@pytest.mark.ci
def test_a_run_starts_with_them_and_loses_no_batch(tmp_path):
    saved = {}
    for centred in (False, True):
        cfg = tiny_config(init={"centre_norms": centred}, train={"steps": 1, "save_every": 1})
        train(cfg, tmp_path / str(centred), TinyData(cfg), tiny_towers(cfg))
        saved[centred] = store.read(tmp_path / str(centred))
    assert saved[True].meta["data"] == saved[False].meta["data"]
    norms = {
        "xattn/0/norm/scale",
        "xattn/2/norm/bias",
        "xattn/3/kv_norm/bias",
        "xattn/1/ffn_norm/scale",
    }
    moved = {
        name: np.abs(saved[True].params[name] - saved[False].params[name]).max()
        for name in saved[True].params
    }
    assert all(moved[name] > 0.05 for name in norms) and moved["xattn/0/q/kernel"] < 0.01
