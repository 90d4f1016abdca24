"""The kernels for TPUs, interpreted, against a dense oracle, and where that is slow XLA's form; and
compiled for chips."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.batch import Batch
from evlm_jax.models.evlm import EVLM
from evlm_jax.ops.attention_kernels import Form, _fit
from evlm_jax.ops.attention_plan import attention_plan, block_pair_count
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from evlm_jax.ops.platform import compile_for
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from tests.helpers.attention import (
    assert_close,
    compiled_text,
    needs_compiler,
    values_and_gradients,
)
from tests.helpers.tiny import tiny_config


def packed(spans: list[list[tuple[int, int]]], block: int, spare: int) -> AttentionPlan:
    """The plan of image groups whose tokens see these (start, stop), with `spare` pairs of
    padding.
    """
    spans = [np.array(group, np.int32).T for group in spans]
    pairs = max(block_pair_count(*group, block) for group in spans) + spare
    plans = [attention_plan(*group, block, pairs) for group in spans]
    return AttentionPlan(
        *(jnp.array(np.stack([p[name] for p in plans])) for name in AttentionPlan._fields)
    )


def dense(q, k, v, start, stop, sinks):
    """One image group: every token against every image under a mask, beside `sinks` zero keys with
    zero values; 0 where it sees none.
    """
    (images, keys, kv, width), heads = k.shape, q.shape[1]
    k, v = (
        jnp.pad(jnp.repeat(a.reshape(-1, kv, width), heads // kv, 1), ((0, sinks), (0, 0), (0, 0)))
        for a in (k, v)
    )
    image, blind = np.repeat(np.arange(images), keys), (start >= stop)[:, None, None]
    seen = (start[:, None] <= image) & (image < stop[:, None])
    seen = np.pad(seen, ((0, 0), (0, sinks)), constant_values=True)[:, None] | blind
    scores = jnp.where(seen, jnp.einsum("tnh,snh->tns", q, k) * width**-0.5, -jnp.inf)
    return jnp.where(blind, 0, jnp.einsum("tns,snh->tnh", jax.nn.softmax(scores), v))


def arrays(groups, tokens, images, keys, heads, kv, width, seed=0, scale=3.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(groups, tokens, heads, width), *[(groups, images, keys, kv, width)] * 2]
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


# Of two image groups one token sees nothing, one a video, image 1 of the first and 0 of the second
# are seen by nobody; in the second case a whole group sees nothing.
SEEN = [
    [[(0, 1), (0, 1), (2, 4), (0, 0), (0, 1), (3, 4)], [(1, 4)] * 3 + [(2, 3)] * 2 + [(4, 4)]],
    [[(0, 0)] * 6, [(1, 2), (0, 2), (3, 4), (3, 4), (3, 4), (0, 0)]],
]


@pytest.mark.parametrize(
    ("seen", "sinks", "heads", "kv", "width"), [(0, 0, 2, 2, 8), (0, 3, 4, 2, 8), (1, 3, 3, 1, 16)]
)
def test_equals_the_dense_oracle(seen, sinks, heads, kv, width):
    """Forward and every gradient; exact zeros where nothing is seen, or nobody sees."""
    spans, inputs = SEEN[seen], arrays(2, 6, 4, 5, heads, kv, width)
    plan = packed(spans, 2, 3)
    found = values_and_gradients(
        lambda q, k, v: grouped_attention(q, k, v, plan, sinks, form="pallas"), inputs
    )

    def oracle(q, k, v):
        starts, stops = np.array(spans).transpose(2, 0, 1)
        return jnp.stack([dense(*own, sinks) for own in zip(q, k, v, starts, stops, strict=True)])

    assert_close(found, values_and_gradients(oracle, inputs))
    out, dq, dk, dv = found
    blind = np.array([[start == stop for start, stop in group] for group in spans])
    assert blind.any() and not out[blind].any() and not dq[blind].any()
    for group, tokens in enumerate(spans):
        alone = [i for i in range(4) if not any(start <= i < stop for start, stop in tokens)]
        assert alone and not dk[group, alone].any() and not dv[group, alone].any()


def test_the_largest_score_is_found_without_a_sink():
    """Scores below -105, whose weights are none beside a score of 0."""
    q, k, v = arrays(1, 4, 2, 5, 1, 1, 8)
    k = -np.abs(k) - 4
    plan = packed([[(0, 2), (0, 1), (1, 2), (0, 2)]], 2, 1)
    xla, *others = (
        values_and_gradients(
            lambda *a, form=form: grouped_attention(*a, plan, 0, form=form), [np.abs(q) + 5, k, v]
        )
        for form in ("xla", "pallas", "loop")
    )
    assert np.isfinite(xla[0]).all() and np.abs(xla[0]).max() > 0.1
    for found in others:
        assert_close(found, xla)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pack(data):
    """Against XLA's form: any ranges, head widths, groups of heads that share keys."""
    images, tokens, groups = (data.draw(st.integers(1, top)) for top in (5, 12, 3))
    width = data.draw(st.sampled_from([64, 96, 112, 128]))
    kv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    span = st.tuples(st.integers(0, images), st.integers(0, images)).map(sorted)
    spans = [data.draw(st.lists(span, min_size=tokens, max_size=tokens)) for _ in range(groups)]
    plan = packed(spans, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)))
    sinks, keys = data.draw(st.sampled_from([0, 1, 3])), data.draw(st.integers(1, 20))
    inputs = arrays(groups, tokens, images, keys, kv * group, kv, width, scale=1.0)
    mine, xla = (
        values_and_gradients(
            lambda *a, form=form: grouped_attention(*a, plan, sinks, form=form), inputs
        )
        for form in ("pallas", "xla")
    )
    assert_close(mine, xla)


def test_as_many_heads_a_step_as_fit():
    """Of 40 heads with 257 and 1,025 keys a divisor each; what cannot be is said."""
    form = Form("pair_attention", 1.0, dtype=jnp.dtype("bfloat16"))
    assert [_fit(form, 40, 64, keys, 2).heads for keys in (257, 1025)] == [10, 2]
    with pytest.raises(ValueError, match=r"lower xattn\.query_block"):
        _fit(form, 40, 64, 60000, 2)


def test_the_config_chooses_the_form_on_tpus_alone():
    """What is traced for TPUs has the kernels, what is traced for others says that it has not."""
    cfg = tiny_config(train={"attention": "pallas"})
    phase = TrainPhase(cfg, 0, make_layout(cfg, jax.devices()[:1]))

    def traced(cfg):
        def hidden(params, batch):
            return EVLM.hidden(nnx.merge(nnx.split(shapes)[0], params), batch)

        shapes = nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0)))
        return str(jax.make_jaxpr(hidden)(nnx.split(shapes)[1], Batch.spec(cfg)))

    with compile_for("tpu"):
        text = traced(cfg)
        for name in ("image", "pair", "packed"):
            assert f"{name}_attention_forward" in text
        assert "pallas" not in traced(tiny_config())
    assert "pallas" not in traced(cfg)
    said = "attention by xla: train.attention = 'pallas' is for TPUs and float32 or bfloat16"
    assert phase.attention() == said


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1", "v5p:1", "v6e:1", "tpu7x:1"])
@pytest.mark.parametrize(
    ("width", "keys", "heads", "kv", "block"),
    [(128, 257, 8, 8, 64), (128, 1025, 4, 2, 64), (112, 257, 2, 2, 32), (96, 65, 2, 1, 32),
     (64, 197, 3, 3, 16)],
)  # fmt: skip
def test_compiles_for_chips(topology, width, keys, heads, kv, block):
    """Three kernels, and no array of scores: none has the keys as its last dimension."""
    groups, images, tokens, pairs = 2, 16, 512, 48
    shared = (groups, images, keys, kv, width)
    text = compiled_text(
        topology,
        lambda q, k, v, *plan: grouped_attention(q, k, v, AttentionPlan(*plan), 1, form="pallas"),
        *[(groups, tokens, heads, width), shared, shared],
        rest=((groups, pairs, block), (groups, tokens), *[(groups, pairs)] * 2),
    )
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3
    assert not re.search(rf"\[[\d,]*,{keys}\]", text)
