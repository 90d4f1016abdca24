"""Generation: caches against the full forward, batches against single prompts, where it ends."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax import generate
from evlm_jax.batch import Batch
from evlm_jax.data.samples import ImageRef, Turn
from evlm_jax.generate import Generator
from evlm_jax.models import decoding, text_attention
from evlm_jax.models.evlm import EVLM
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan
from evlm_jax.prompts import Room, collate
from tests.data.made import SPECIALS, ByteTokenizer, refs
from tests.helpers.tiny import BASELINES, tiny_config


class Letters(ByteTokenizer):
    """Every id the tiny model can choose is a letter: nothing is invalid, and answers are easy to
    compare.
    """

    eos = (259,)

    def decode(self, ids, skip_special=True):
        return "".join(chr(0x100 + i) for i in ids)


@cache
def made(section="llm", baseline="", **fields):
    """(random model with open gates, generator with random taps): vocabulary 260, so that every id
    of the tokenizer exists.
    """
    changes = BASELINES.get(baseline, {}) | {"llm": {"vocab": 260}}
    cfg = tiny_config(**changes | {section: changes.get(section, {}) | fields})
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def random(path, leaf):
        return jnp.asarray(rng.normal("scale" in str(path), 0.15, leaf.shape), jnp.float32)

    model = nnx.merge(graphdef, jax.tree.map_with_path(random, shapes))
    return model, Generator(model, Letters(), features=lambda refs: taps(cfg, refs))


def taps(cfg, refs):
    """[n, G, S, V], a function of the reference."""
    shape = (len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width)

    def seed(ref):
        return [int(ref.path.split(".")[0]), int(10 * (ref.frame or 0))]

    return np.stack(
        [np.random.default_rng(seed(ref)).standard_normal(shape, np.float32) for ref in refs]
    )


PROMPTS = (
    ([Turn("user", "no picture")], ()),
    ([Turn("user", "before <image> and behind")], refs(1)),
    (
        [
            Turn("user", "<image>one <image> two"),
            Turn("assistant", "yes"),
            Turn("user", "and <image> this?"),
        ],
        refs(1, 1, 1),
    ),
    ([Turn("user", "a picture <image> and a film <image> what?")], refs(1, 5)),
    (
        [
            Turn(
                "user",
                "a film <image> and a picture <image>, and then many words until another bucket of"
                " lengths begins",
            )
        ],
        refs(3, 1),
    ),
)


@jax.jit
def batch_logits(model, batch):
    return model.logits(model.hidden(batch))


def full_forward(model, document, tokens, length=256, slots=8, pairs=64):
    """Logits [len(tokens), vocab] that choose each of `tokens` after the prompt, from one pass over
    everything, padded to `length`, with room for so many images and block pairs.
    """
    cfg, read = model.cfg, len(document.tokens)
    fed = read + len(tokens) - 1
    row = {
        name: np.zeros(length, np.int32) for name in ("tokens", "visible_start", "visible_stop")
    } | {"media_slot": np.full(length, -1)}
    for name, array in row.items():
        array[:read] = getattr(document, name)
    row["tokens"][read:fed] = tokens[:-1]
    for name in ("visible_start", "visible_stop"):
        row[name][read:fed] = getattr(document, name)[-1]
    row |= {"positions": np.arange(length), "visible_until": np.full(length, length)}
    row |= (
        attention_plan(row["visible_start"], row["visible_stop"], cfg.query_block, pairs)
        if cfg.query_block
        else dict.fromkeys(AttentionPlan._fields)
    )
    images = np.zeros((slots, len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width), np.float32)
    if document.refs:
        images[: len(document.refs)] = taps(cfg, document.refs)
    none = np.zeros((1, 1), np.int32)
    arrays = {
        name: None if array is None else array[None] for name, array in row.items()
    } | dict.fromkeys(("target_positions", "targets", "target_source"), none)
    return np.asarray(
        batch_logits(model, Batch(**arrays, pixels=None, taps=images[None]))[0, read - 1 : fed]
    )


def allowed(logits):
    """Without the placeholder, which is never chosen."""
    return np.where(np.arange(260) == SPECIALS["<|media|>"], -np.inf, logits)


@cache
def programs(generator):
    """(prefill, one step of decoding) of its model, which are traced once."""
    return (
        jax.jit(partial(decoding.read_prompts, generator.cfg), static_argnums=(4, 5)),
        jax.jit(partial(decoding.read_tokens, generator.cfg)),
    )


def cached_logits(generator, documents, tokens, room=None, rows=8):
    """The same from the caches, for a batch, whatever the model would choose instead of `tokens`
    [B, n].
    """
    cfg, (state_of, next_of) = generator.cfg, programs(generator)
    room = room or Room.of(documents)
    prompt = collate(documents, cfg.query_block, rows, room)
    random = jax.random.split(jax.random.key(0), rows)
    first, state = state_of(
        generator.weights,
        prompt,
        generator._look(documents, prompt, room.images),
        random,
        room.length + 64,
        room.images,
    )
    found = [first]
    for i in range(tokens.shape[1] - 1):
        token = jnp.zeros_like(state.token).at[: len(tokens)].set(tokens[:, i])
        logits, state = next_of(
            generator.weights, state._replace(token=token, position=state.position + 1)
        )
        found.append(logits)
    return np.stack(found, 1)[: len(documents)]


OFTEN = {
    "every third, no sink": {"section": "xattn", "every": 3, "sinks": 0, "schedule": "cyclic"},
    "biases, own head": {"qkv_bias": True, "tied": False, "kv_heads": 4},
    "llava": {"baseline": "llava"},
}
IN_CI = {
    "tied": {},
    "open_flamingo": {"baseline": "open_flamingo"},
    "mplug_owl3": {"baseline": "mplug_owl3"},
    "one softmax": {"baseline": "mplug_owl3", "section": "xattn", "gate": "softmax"},
}
SELDOM = {
    "shared keys": {"section": "xattn", "heads": 4, "kv_heads": 2},
    **{name: {"baseline": name} for name in BASELINES if name not in OFTEN | IN_CI},
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=marks)
        for cases, marks in ((OFTEN, ()), (IN_CI, pytest.mark.ci), (SELDOM, pytest.mark.slow))
        for name, changes in cases.items()
    ],
)
def test_caches_equal_the_full_forward(changes, monkeypatch):
    """A batch of different lengths and numbers of images, texts before images, and videos; images
    two slots at a time, and text in parts.
    """
    monkeypatch.setattr(generate, "PICTURES", 16)
    monkeypatch.setattr(decoding, "LONG", 32)
    monkeypatch.setattr(text_attention, "ASKING", 8)
    model, generator = made(**changes)
    documents = [generator.prompt(*prompt) for prompt in PROMPTS]
    tokens = np.random.default_rng(0).integers(0, 256, (len(documents), 6)).astype(np.int32)
    found = cached_logits(generator, documents, tokens)
    for row, document in enumerate(documents):
        wanted = full_forward(model, document, tokens[row].tolist())
        assert np.abs(found[row] - wanted).max() <= 1e-5 * np.abs(wanted).max(), row
        other = document._replace(
            refs=tuple(ImageRef("9" + ref.path, ref.frame) for ref in document.refs)
        )
        without = full_forward(model, other, tokens[row].tolist())
        assert (np.abs(found[row] - without).max() > 1e-2) == (
            bool(document.refs) and model.cfg.uses_images
        )  # images count


def test_greedy_answers_are_the_argmax_of_the_full_forward():
    model, generator = made()
    documents = [generator.prompt(*prompt) for prompt in PROMPTS]
    for document, answer in zip(documents, generator.generate(documents, 10, stop=())):
        assert (
            list(answer.tokens)
            == allowed(full_forward(model, document, list(answer.tokens))).argmax(-1).tolist()
        )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_answers_like_each_prompt_alone(temperature):
    """With sampling, the place in the list decides the draw, so the others are replaced and not
    removed.
    """
    _, generator = made()
    documents = [generator.prompt(*prompt) for prompt in PROMPTS]
    how = 12, temperature, 0.9 if temperature else 1.0
    together = generator.generate(documents, *how, seed=3)
    assert generator.generate(documents[:1], *how, seed=3)[0] == together[0]
    others = [documents[4]] * 3 + documents[3:]
    assert generator.generate(others, *how, seed=3)[3:] == together[3:]
    assert (generator.generate(documents, *how, seed=4) != together) == (temperature > 0)


def test_more_prompts_than_rows_keep_their_order():
    _, generator = made()
    documents = [generator.prompt(*PROMPTS[i % 5]) for i in range(9)]
    answers = generator.generate(documents, 12)
    assert answers[:5] == answers[5:] + answers[4:5] == generator.generate(documents[:5], 12)
    assert generator.generate([]) == []


def test_generation_stops_at_a_stop_token():
    _, generator = made()
    documents = [generator.prompt(*prompt) for prompt in PROMPTS]
    free = [
        answer.tokens for answer in generator.generate(documents, 70, stop=())
    ]  # more than one call of decode
    last = free[1][40]

    def cut(tokens):
        return tokens[: tokens.index(last)] if last in tokens else tokens

    assert {len(tokens) for tokens in free} == {70} and len(cut(free[1])) < 70
    assert [answer.tokens for answer in generator.generate(documents, 70, stop=(last,))] == [
        cut(tokens) for tokens in free
    ]
    assert [answer.tokens for answer in generator.generate(documents, 1, stop=())] == [
        tokens[:1] for tokens in free
    ]


def test_callback_gets_the_pieces_in_order():
    _, generator = made()
    documents, pieces = [generator.prompt(*prompt) for prompt in PROMPTS], []
    answers = generator.generate(
        documents, 9, callback=lambda index, piece: pieces.append((index, piece))
    )
    assert answers == generator.generate(documents, 9)
    for index, answer in enumerate(answers):
        mine = [piece for i, piece in pieces if i == index]
        assert "".join(mine) == answer.text and [len(piece) for piece in mine] == [1] * len(
            answer.tokens
        )
    assert sorted(i for i, _ in pieces[:5]) == list(range(5))  # the answers grow together


@pytest.mark.parametrize(
    "changes", [{}, {"dynamic_ntk": 16}, {"baseline": "llava"}, {"baseline": "flamingo"}]
)
def test_state_spec_is_what_prefill_makes(changes):
    _, generator = made(**changes)
    cfg, document = generator.cfg, generator.prompt(*PROMPTS[1])
    room = Room(64, 2)
    prompt = collate([document] * 2, cfg.query_block, 2, room)
    held = generator._look([document] * 2, prompt, room.images)
    random = jax.random.split(jax.random.key(0), 2)
    _, state = jax.eval_shape(
        lambda: decoding.read_prompts(cfg, generator.weights, prompt, held, random, 64, 2)
    )

    def form(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype), tree)

    assert form(state) == form(decoding.DecodeState.spec(cfg, 2, 64, 2))


@pytest.mark.ci
def test_no_answer_depends_on_the_room_of_its_batch():
    """Logits of prompts in the least room that they fit, and in that of longer ones with more
    images.
    """
    _, generator = made()
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[3]):
        document = generator.prompt(*prompt)
        tokens = np.random.default_rng(0).integers(0, 256, (1, 3)).astype(np.int32)
        wanted = cached_logits(generator, [document], tokens, rows=1)
        found = cached_logits(generator, [document], tokens, Room(1024, 16))
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_what_stands_for_images_is_never_chosen():
    """Nor is an id that the tokenizer lacks: at a high temperature each of 264 rows of the head is
    as likely.
    """
    model, _ = made(vocab=264)
    generator = Generator(model, Letters(), features=lambda refs: taps(model.cfg, refs))
    documents = [generator.prompt(*PROMPTS[0])] * 8
    drawn = {
        token
        for answer in generator.generate(documents, 300, 1e6, stop=())
        for token in answer.tokens
    }
    assert len(drawn) > 250 and max(drawn) == 259 and SPECIALS["<|media|>"] not in drawn


def test_several_answers_are_reproducible_and_differ():
    _, generator = made()
    documents = [generator.prompt(*prompt) for prompt in PROMPTS[:3]]
    how = {"temperature": 1.0, "seed": 5}
    answers = generator.generate(documents, 8, **how, num_return_sequences=4)
    assert len(answers) == 12 and len({answer.text for answer in answers}) == 12
    assert generator.generate(documents, 8, **how, num_return_sequences=2) == [
        answers[4 * i + j] for i in range(3) for j in range(2)
    ]
    assert generator.generate(documents, 8, **how) == answers[::4]


def test_stop_strings_end_an_answer_and_are_cut_off():
    """Across the borders of tokens too; each token of the tiny model is a letter."""
    _, generator = made()
    document = generator.prompt(*PROMPTS[1])
    free = generator.generate([document], 70, 1.0, stop=())[0]
    stop = free.text[30:33]
    at = free.text.index(stop)
    pieces = []
    for options in ({}, {"callback": lambda _, piece: pieces.append(piece)}):
        answer = generator.generate(
            [document], 70, 1.0, stop=(), stop_strings=["not there", stop], **options
        )[0]
        assert answer.text == free.text[:at] and answer.tokens == free.tokens[: at + 3]
    assert "".join(pieces) == free.text[:at]


def test_refuses_what_it_cannot_answer():
    _, generator = made()
    document = generator.prompt(*PROMPTS[0])
    with pytest.raises(ValueError, match="prompt prompt: not one unbranched text"):
        generator.generate([document._replace(positions=document.positions * 0)])
    wrong = {
        "top_p must be above 0 and at most 1": {"top_p": 0},
        "top_k must be at least 0": {"top_k": -1},
        "min_p must be at least 0 and at most 1": {"min_p": 2.0},
        "repetition_penalty must be above 0": {"repetition_penalty": 0.0},
        "num_return_sequences: at temperature 0": {"num_return_sequences": 2},
        "stop_strings: an empty text": {"stop_strings": ["a", ""]},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            generator.generate([document], **options)
