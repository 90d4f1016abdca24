"""The gated block against open_flamingo's, with nonzero gates and an image mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.models import xattn
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from tests.helpers.parity import open_flamingo_helpers
from tests.helpers.tiny import tiny_config


def array(x):
    return jnp.array(x.detach().numpy())


@pytest.mark.parity
def test_block_equals_open_flamingo():
    import torch

    helpers = open_flamingo_helpers()
    hidden, visual, words, images, tokens = 64, 32, 12, 3, 5
    cfg = tiny_config(
        llm=dict(hidden=hidden),
        vit=dict(width=visual),
        xattn=dict(heads=8, kv_heads=8, head_dim=64, ffn=4 * hidden, sinks=0),
    )
    torch.manual_seed(0)
    theirs = helpers.GatedCrossAttentionBlock(dim=hidden, dim_visual=visual)
    with torch.no_grad():
        for gate, value in ((theirs.attn_gate, 0.7), (theirs.ff_gate, -0.4)):
            gate.fill_(value)
        for norm in (theirs.attn.norm, theirs.ff[0]):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    ours = xattn.Block(cfg, nnx.Rngs(0))
    k, v = theirs.attn.to_kv.weight.chunk(2)
    ours.q.kernel[...], ours.o.kernel[...] = (
        array(theirs.attn.to_q.weight).T,
        array(theirs.attn.to_out.weight).T,
    )
    ours.k.kernel[...], ours.v.kernel[...] = array(k).T, array(v).T
    ours.ffn.fc1.kernel[...], ours.ffn.fc2.kernel[...] = (
        array(theirs.ff[1].weight).T,
        array(theirs.ff[3].weight).T,
    )
    for mine, norm in ((ours.norm, theirs.attn.norm), (ours.ffn_norm, theirs.ff[0])):
        mine.scale[...], mine.bias[...] = array(norm.weight), array(norm.bias)
    ours.attn_gate.scalar[...], ours.ffn_gate.scalar[...] = jnp.float32(0.7), jnp.float32(-0.4)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, words, hidden)).astype(np.float32)
    tap = rng.standard_normal((1, images, tokens, visual)).astype(np.float32)
    marks = np.zeros((1, words), bool)
    marks[0, [2, 5, 9]] = (
        True  # text before the first image, and the nearest previous image from then on
    )
    media = torch.nn.functional.layer_norm(
        torch.tensor(tap), (visual,), eps=cfg.xattn.eps
    )  # theirs has no norm on the visual side
    with torch.no_grad():
        expected = theirs(torch.tensor(x), media, media_locations=torch.tensor(marks)).numpy()

    stop = marks[0].cumsum().astype(np.int32)
    plan = attention_plan(np.maximum(stop - 1, 0), stop, cfg.xattn.query_block, 12)
    grouping = AttentionPlan(**{name: jnp.array(p)[None] for name, p in plan.items()})
    with jax.default_matmul_precision("highest"):
        keys, values = ours.keys_values(jnp.array(tap))
        got, *_ = ours(
            jnp.array(x), lambda q: (grouped_attention(q, keys, values, grouping, 0), None)
        )
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
