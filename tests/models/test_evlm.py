"""Invariants of the whole model, with nonzero gates: who can see whom, and that nothing else
matters.
"""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.loss import loss_sums, losses
from evlm_jax.models.attention import attention, text_mask
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.rotary import layer_rope, rope_tables
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan, grouped_attention
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, tiny_batch, tiny_config


def open_gates(cfg: EVLMConfig, seed: int = 0) -> EVLM:
    """A random model whose gates let much through."""
    model = random_model(cfg, seed)
    if not cfg.cross_layers or cfg.xattn.gate == "mixing":
        return model
    model.xattn.attn_gate.scalar[...] = jnp.full(model.xattn.attn_gate.scalar.shape, 0.8)
    model.xattn.ffn_gate.scalar[...] = jnp.full(model.xattn.ffn_gate.scalar.shape, -0.6)
    return model


@jax.jit
def hidden(model: EVLM, batch: Batch) -> jax.Array:
    """All arrays of a batch traced."""
    return model.hidden(batch)


def row(cfg: EVLMConfig, documents: list[list], seed: int = 0) -> Batch:
    """One row from documents given as lists of "i" (an image), ("v", n) (a video of n frames) and
    numbers (words of text).
    """
    rng = np.random.default_rng(seed)
    t = {
        name: []
        for name in (
            "tokens",
            "positions",
            "visible_until",
            "media_slot",
            "visible_start",
            "visible_stop",
        )
    }
    image = 0
    for document in documents:
        begin, see = len(t["tokens"]), (0, 0)
        end = begin + sum(
            p if isinstance(p, int) else cfg.media.tokens * (1 if p == "i" else p[1])
            for p in document
        )
        for part in document:
            frames = 0 if isinstance(part, int) else 1 if part == "i" else part[1]
            spans = (
                [see] * part
                if not frames
                else [
                    (image + f, image + f + 1)
                    for f in range(frames)
                    for _ in range(cfg.media.tokens)
                ]
            )
            for i, (start, stop) in enumerate(spans):
                t["media_slot"].append(i % cfg.media.tokens if frames else -1)
                t["tokens"].append(int(rng.integers(0, 200)))
                t["positions"].append(len(t["tokens"]) - 1 - begin)
                t["visible_until"].append(end)
                t["visible_start"].append(start)
                t["visible_stop"].append(stop)
            if frames:
                see, image = (image, image + frames), image + frames
    pad = cfg.data.length - len(t["tokens"])
    fields = {name: values + [{"media_slot": -1}.get(name, 0)] * pad for name, values in t.items()}
    fields["visible_until"][len(t["tokens"]) :] = range(len(t["tokens"]) + 1, cfg.data.length + 1)
    fields = {name: np.array(values, np.int32) for name, values in fields.items()}
    ranges = fields["visible_start"], fields["visible_stop"]
    fields |= (
        attention_plan(*ranges, cfg.query_block, cfg.data.block_pairs)
        if cfg.query_block
        else dict.fromkeys(AttentionPlan._fields)
    )
    none = np.zeros(cfg.data.targets, np.int32)
    fields |= dict(target_positions=none, targets=none - 1, target_source=none)
    shape = (cfg.data.images, *cfg.vit.input_shape)
    fields |= dict(pixels=rng.integers(0, 256, shape).astype(np.uint8), taps=None)
    return Batch(**{name: None if value is None else value[None] for name, value in fields.items()})


def repaint(batch: Batch, image: int) -> Batch:
    """The batch with another picture in one slot."""
    pixels = batch.pixels.copy()
    pixels[:, image] = 255 - pixels[:, image]
    return batch._replace(pixels=pixels)


def changed(cfg: EVLMConfig, batch: Batch, image: int) -> np.ndarray:
    """[T]: whose output bits depend on the picture in a slot."""
    model = open_gates(cfg)
    a, b = hidden(model, batch), hidden(model, repaint(batch, image))
    return np.asarray((a != b).any(-1))[0]


def test_gates_at_zero_are_the_language_model_alone():
    cfg = tiny_config()
    model, batch = random_model(cfg, 0), jax.tree.map(jnp.asarray, tiny_batch(cfg, 0))
    model.xattn.attn_gate.scalar[...] = model.xattn.ffn_gate.scalar[...] = jnp.zeros(
        len(cfg.cross_layers)
    )

    @jax.jit
    def alone(model, batch):
        rope, mask = (
            layer_rope(cfg.llm, rope_tables(cfg.llm, batch.positions), 0),
            text_mask(batch.visible_until),
        )

        def step(x, block):
            return block(x, rope, lambda q, k, v: (attention(q, k, v, mask), None))

        x, _ = jax.lax.scan(step, model.embed(batch.tokens, batch.media_slot), model.llm.layers)
        return model.llm.ln_f(x)

    assert (np.asarray(hidden(model, batch)) == np.asarray(alone(model, batch))).all()
    assert (np.asarray(hidden(open_gates(cfg), batch)) != np.asarray(alone(model, batch))).any()


@pytest.mark.parametrize("kind", ["evlm", "fused", "flamingo", "llava"])
def test_images_reach_only_their_document_and_what_follows_them(kind):
    cfg = tiny_config(**BASELINES.get(kind, {}))
    n = cfg.media.tokens
    #                        before  A   text  B  text         another document
    batch = row(cfg, [[3, "i", 4, "i", 5], ["i", 6], [4]])
    first, second = 3, 3 + n + 4
    end = second + n + 5
    other_end = end + n + 6
    index = np.arange(cfg.data.length)
    by_first, by_second, by_other = (changed(cfg, batch, image) for image in range(3))
    assert by_first[first:end].all(), (
        "an earlier image reaches later text, through self-attention over its media tokens"
    )
    assert not by_first[(index < first) | (index >= end)].any()
    assert by_second[second:end].all() and not by_second[(index < second) | (index >= end)].any()
    assert (
        by_other[end:other_end].all() and not by_other[(index < end) | (index >= other_end)].any()
    )


def test_a_row_does_not_see_the_images_of_its_group():
    cfg = tiny_config(data=dict(image_group=2, images=6, slots=9, block_pairs=24))
    batch = tiny_batch(cfg, 6)
    first = int(batch.visible_stop[0].max())
    assert 0 < first < batch.visible_stop[1].max()
    model = open_gates(cfg)
    before = np.asarray(hidden(model, batch))
    for image in range(cfg.data.slots):
        touched = (before != np.asarray(hidden(model, repaint(batch, image)))).any(-1)
        assert not touched[int(image < first)].any()
        assert touched.any() == (image < batch.visible_stop.max())


def test_rows_in_groups_equal_rows_alone():
    """Loss and gradients of the same documents, of given taps; tests/mesh/devices.py does it from
    pixels on.
    """
    data = dict(image_group=2, images=6, slots=9, block_pairs=24, cache_features=True)
    cfg = tiny_config(vit=dict(depth=2, taps=(2,)), data=data, train=dict(batch=4))
    model = open_gates(cfg)
    sums = jax.jit(jax.value_and_grad(lambda model, batch: loss_sums(model, batch, 2)[0]))
    (shared, theirs), (alone, ours) = (sums(model, tiny_batch(c, 3)) for c in (cfg, cfg.ungrouped))
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max() + 1e-9)


def test_one_block_sees_the_visible_range_only():
    """The last layer's cross-attention alone: what enters it is fixed, so nothing arrives through
    self-attention.
    """
    cfg = tiny_config(llm=dict(layers=1))
    batch, n = row(cfg, [[2, "i", 3, "i", 3], [("v", 2), 4]]), cfg.media.tokens

    @jax.jit
    def block(model, batch):
        taps = model.encode(batch.pixels)
        cross = jax.tree.map(lambda a: a[0], model.xattn)
        k, v = cross.keys_values(taps[:, :, 0])
        grouping = AttentionPlan(
            batch.block_tokens, batch.token_place, batch.pair_block, batch.pair_image
        )

        def attend(q):
            return (grouped_attention(q, k, v, grouping, cfg.xattn.sinks), None)

        return cross(model.embed(batch.tokens, batch.media_slot), attend)[0]

    model = open_gates(cfg)
    before = np.asarray(block(model, batch))[0]
    video = 2 + n + 3 + n + 3
    for image in range(4):
        touched = (before != np.asarray(block(model, repaint(batch, image)))[0]).any(-1)
        sees = (batch.visible_start[0] <= image) & (image < batch.visible_stop[0])
        assert (touched == sees).all(), f"image {image}"
    assert batch.visible_stop[0][video] - batch.visible_start[0][video] == 1, (
        "a frame's media token sees its own frame"
    )
    assert batch.visible_stop[0][video + 2 * n] - batch.visible_start[0][video + 2 * n] == 2, (
        "text of a video sees all frames"
    )


@pytest.mark.parametrize("kind", ["evlm", *BASELINES])
def test_packed_equals_unpacked(kind):
    cfg = tiny_config(**BASELINES.get(kind, {}))
    documents = [[2, "i", 5], [("v", 2), 4], [6]]
    model = open_gates(cfg)
    packed = row(cfg, documents)
    together = np.asarray(hidden(model, packed))[0]
    at = image = 0
    for document in documents:
        images = sum(1 if p == "i" else p[1] for p in document if not isinstance(p, int))
        one = row(cfg, [document])
        size = int(one.visible_until[0, 0])
        one.tokens[0, :size] = packed.tokens[0, at : at + size]
        one.pixels[0, :images] = packed.pixels[0, image : image + images]
        alone = np.asarray(hidden(model, one))[0, :size]
        np.testing.assert_allclose(together[at : at + size], alone, atol=1e-5 * np.abs(alone).max())
        at, image = at + size, image + images


@pytest.mark.parametrize(
    "schedule, every",
    [
        ("blocked", 1),
        ("cyclic", 3),
        *(
            pytest.param(schedule, every, marks=pytest.mark.slow)
            for schedule, every in (("cyclic", 1), ("blocked", 2), ("cyclic", 2), ("blocked", 3))
        ),
    ],
)
def test_schedule_and_placement_equal_a_plain_loop(schedule, every):
    """Layers one by one, as the paper describes them; 3 does not divide the 4 layers."""
    cfg = tiny_config(xattn=dict(schedule=schedule, every=every))
    model, batch = open_gates(cfg), jax.tree.map(jnp.asarray, tiny_batch(cfg, 3))
    taps = model.encode(batch.pixels)
    rope, mask = (
        layer_rope(cfg.llm, rope_tables(cfg.llm, batch.positions), 0),
        text_mask(batch.visible_until),
    )
    x, grouping = (
        model.embed(batch.tokens, batch.media_slot),
        AttentionPlan(batch.block_tokens, batch.token_place, batch.pair_block, batch.pair_image),
    )
    layers, used = -(-cfg.llm.layers // every), []
    for layer in range(cfg.llm.layers):
        if layer % every == 0:
            i = layer // every
            used.append(i * 3 // layers if schedule == "blocked" else i % 3)
            cross = jax.tree.map(lambda a, i=i: a[i], model.xattn)
            k, v = cross.keys_values(taps[:, :, used[-1]])
            x = cross(
                x, lambda q, k=k, v=v: (grouped_attention(q, k, v, grouping, cfg.xattn.sinks), None)
            )[0]
        x, _ = jax.tree.map(lambda a, i=layer: a[i], model.llm.layers)(
            x, rope, lambda q, k, v: (attention(q, k, v, mask), None)
        )
    expected = np.asarray(model.llm.ln_f(x))
    assert tuple(used) == cfg.tap_of_cross_layer
    np.testing.assert_allclose(hidden(model, batch), expected, atol=1e-5 * np.abs(expected).max())


@functools.cache
def gradient(remat: str) -> list:
    """Of the sum of losses, with respect to every parameter."""
    graphdef, state = nnx.split(open_gates(tiny_config(train=dict(remat=remat))))

    def loss(state, batch):
        return losses(nnx.merge(graphdef, state), batch).sum()

    return jax.tree.leaves(jax.jit(jax.grad(loss))(state, tiny_batch(tiny_config(), 1)))


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.ci
def test_rematerialisation_changes_no_gradient(remat):
    plain = gradient("none")
    largest = max(np.abs(a).max() for a in plain)
    for a, b in zip(plain, gradient(remat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * largest, rtol=1e-4)


def test_vit_taps_above_the_highest_do_not_exist():
    cfg = tiny_config(vit=dict(taps=(1, 3)))
    model = random_model(cfg, 0)
    assert sum(jax.tree.leaves(s)[0].shape[0] for s in map(nnx.state, model.vit.stacks)) == 3
    full = random_model(tiny_config(vit=dict(taps=(1, 2, 3, 4), cuts=())), 0)
    assert full.encode(np.zeros((2, 8, 8, 3), np.uint8)).shape == (
        2,
        4,
        cfg.vit.tokens,
        cfg.vit.width,
    )


def equations(jaxpr):
    """Of a program and of all programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("every", [2, 3])
def test_no_part_of_the_stack_is_cut_out(every):
    """A slice of the language model's stack would be a copy of it; also where `every` does not
    divide the layers, and backwards.
    """
    cfg = tiny_config(llm=dict(layers=8 - every), xattn=dict(every=every))
    graphdef, params = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    trained, frozen = nnx.split_state(params, lambda path, _: path[0] == "xattn", ...)

    def loss(trained, frozen, batch):
        return nnx.merge(graphdef, trained, frozen).hidden(batch).sum()

    program = jax.make_jaxpr(jax.grad(loss))(trained, frozen, tiny_batch(cfg, 0))
    stacks = {leaf.shape for leaf in jax.tree.leaves(params.llm.layers)}
    found = [
        e
        for e in equations(program.jaxpr)
        if e.primitive.name == "slice" and e.invars[0].aval.shape in stacks
    ]
    assert len(stacks) > 3 and not found
