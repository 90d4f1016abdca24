"""`import evlm_jax`: each answer of the library against the command line, training's own batches,
or the model called by hand.
"""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import evlm_jax
from evlm_jax import cli
from evlm_jax.config.load import load_config
from evlm_jax.convert.export import export
from evlm_jax.data import image
from evlm_jax.data.pipeline import batches
from evlm_jax.data.samples import ImageRef
from evlm_jax.data.sources import open_source
from evlm_jax.loss import losses
from tests.helpers.tiny import BASELINES, tiny_config

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "format1_dense"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its data, and an export of it."""
    place = tmp_path_factory.mktemp("library") / "golden"
    shutil.copytree(GOLDEN, place)
    export(str(place / "run"), str(place / "export"), "hf")
    return place


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def model(folder):
    return evlm_jax.load(folder / "run")


@pytest.fixture(scope="module")
def open_model(model):
    return opened(model)


def opened(model):
    """The same with open gates, so that pictures count."""

    def gate(path, leaf):
        return jnp.full_like(leaf, 0.1) if "gate" in jax.tree_util.keystr(path) else leaf

    return model.with_params(jax.tree.map_with_path(gate, model.params))


def picture(number: int) -> Image.Image:
    return Image.open(GOLDEN / "pictures" / f"{number}.png")


def sample(number: int = 0):
    return evlm_jax.make_sample("What is it?", "A cat.", images=picture(number))


# --------------------------------------------------------------------------------------- generation


DRAWN = [
    "--temperature",
    "1.2",
    "--top-k",
    "9",
    "--top-p",
    "0.9",
    "--min-p",
    "0.01",
    "--seed",
    "4",
    "--repetition-penalty",
    "1.3",
]


@pytest.mark.parametrize(
    "prompt, numbers, words, options",
    [
        pytest.param("hello", [], [], {}, marks=pytest.mark.ci),
        pytest.param(
            "From <image> to <image>?",
            [1, 2],
            ["--stop", "C", "--stop", "~"],
            {"stop": ["C", "~"]},
            marks=pytest.mark.ci,
        ),
        (
            "What is it?",
            [3],
            DRAWN,
            {
                "temperature": 1.2,
                "top_k": 9,
                "top_p": 0.9,
                "min_p": 0.01,
                "seed": 4,
                "repetition_penalty": 1.3,
            },
        ),
    ],
)
def test_it_answers_as_the_command_line_does(
    model, inside, capsys, prompt, numbers, words, options
):
    files = [f"pictures/{number}.png" for number in numbers]
    shown = [word for file in files for word in ("--image", file)]
    assert (
        cli.main(
            [
                "generate",
                "--checkpoint",
                "run",
                "--prompt",
                prompt,
                *shown,
                "--max-new-tokens",
                "12",
                *words,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out.removesuffix("\n")
    assert printed == model.generate(prompt, files, 12, **options)
    assert printed == model.generate(prompt, list(map(picture, numbers)), 12, **options)
    arrays = [np.asarray(picture(number).convert("RGB")) for number in numbers]
    pieces = list(model.generate(prompt, arrays, 12, stream=True, **options))
    assert "".join(pieces) == printed and len(pieces) > 1


@pytest.mark.pinned
def test_several_answers_are_the_command_lines(model, inside, capsys):
    words = ["--max-new-tokens", "6", "--answers", "3", "--temperature", "0.9"]
    assert (
        cli.main(
            [
                "generate",
                "--checkpoint",
                "run",
                "--prompt",
                "What?",
                "--image",
                "pictures/1.png",
                *words,
            ]
        )
        == 0
    )
    answers = model.generate("What?", "pictures/1.png", 6, answers=3, temperature=0.9)
    assert capsys.readouterr().out == "".join(
        f"{number}. {answer}\n" for number, answer in enumerate(answers, 1)
    )
    assert model.generate(["What?"], ["pictures/1.png"], 6, answers=3, temperature=0.9) == [answers]


def test_prompts_together_are_answered_as_each_alone(model):
    prompts, images = (
        ["What is it?", "hello", "And <image> this <image>?"],
        [
            picture(3),
            None,
            [picture(1), [picture(2), picture(4)]],
        ],
    )
    assert model.generate(prompts, images, 10) == [
        model.generate(said, those, 10) for said, those in zip(prompts, images)
    ]
    assert model.generate([], []) == [] and model.generate(["hello"], max_new_tokens=10) == [
        model.generate("hello", None, 10)
    ]


def test_a_stream_that_is_left_ends(model):
    stream = model.generate("What is it?", picture(1), 64, stream=True)
    assert next(stream)
    stream.close()
    assert not list(stream)


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "texts, images",
    [(["A dog and a cat"], [1]), (["Here <image> and there <image> they are"], [1, 2])],
)
def test_logits_are_those_of_the_rows_that_training_reads(open_model, texts, images):
    model = open_model
    batch = evlm_jax.make_batch(
        [evlm_jax.make_sample(*texts, images=list(map(picture, images)))], model.config
    )
    module = model.module
    wanted = np.asarray(nnx.jit(lambda module: module.logits(module.hidden(batch)))(module))[0]
    found, count = (
        np.asarray(model.logits(texts[0], list(map(picture, images)))),
        int((batch.visible_until[0] > np.arange(96) + 1).sum()) + 1,
    )
    assert found.shape == (count, 256) and found.dtype == np.float32
    assert (
        np.abs(found - wanted[:count]).max() <= 5e-4 * np.abs(wanted).max()
    )  # noise of float32 is 1e-4: this model amplifies it
    other = np.asarray(model.logits(texts[0], [picture(7)] * len(images)))
    assert np.abs(other - found).max() > 0.1 * np.abs(wanted).max()  # pictures count


def test_logits_of_ids_are_those_of_their_text(model):
    ids = [*model.tokenizer.bos, *model.tokenizer.encode("Some text")]
    assert np.array_equal(model.logits("Some text"), model.logits(ids))
    assert np.array_equal(
        model.logits("Some text", picture(2)), model.logits(np.array(ids), picture(2))
    )
    assert np.array_equal(
        model.logits("<image>Some text", picture(2)), model.logits("Some text", picture(2))
    )


def test_a_batch_is_what_training_builds(model, inside):
    """Rows of one document each, of the run's own data."""
    cfg = load_config("experiment.py", ["--config.data.window=1"])
    rows = {
        f"{one.source}/{one.key}": one for name in cfg.data.sources for one in open_source(name)
    }
    with contextlib.closing(batches(cfg, model.tokenizer)) as stream:
        made = [next(stream) for _ in range(3)]
    for batch, info in made:
        for row, keys in enumerate(info["keys"]):
            own = evlm_jax.make_batch([rows[key] for key in keys], cfg, model.tokenizer)
            for name, array in batch._asdict().items():
                if array is not None:
                    assert np.array_equal(getattr(own, name)[0], array[row]), name
    padded = evlm_jax.make_batch([sample()], cfg, rows=3)
    assert (
        padded.tokens.shape == (3, 96)
        and (padded.targets[1:] == -1).all()
        and not padded.pixels[1:].any()
    )


@pytest.mark.pinned
def test_the_loss_and_its_gradient_are_those_of_the_module(model):
    # New weights: those of the golden run are so large that roundings become a thousandth.
    model = opened(evlm_jax.random(model.config, seed=3))
    samples = [
        sample(1),
        evlm_jax.make_sample("A dog.", images=[picture(2)]),
        evlm_jax.make_sample("no picture", "none"),
    ]
    batch = evlm_jax.make_batch(samples, model.config, model.tokenizer)

    def mean(module):
        return losses(module, batch).sum() / (batch.targets >= 0).sum()

    value, wanted = nnx.jit(nnx.value_and_grad(mean))(model.module)
    assert model.loss(samples) == model.loss(batch) == pytest.approx(float(value), rel=1e-6)
    found = jax.grad(lambda params: model.loss(batch, params))(model.params)
    assert jax.tree.structure(found) == jax.tree.structure(model.params)
    for one, other in zip(
        *(map(np.asarray, jax.tree.leaves(tree)) for tree in (found, wanted)), strict=True
    ):
        assert (
            np.abs(one - other).max() <= 2e-5 * np.abs(other).max() + 1e-8
            and np.isfinite(one).all()
        )
    nearer = model.with_params(
        jax.jit(lambda *trees: jax.tree.map(lambda p, g: p - 1e-3 * g, *trees))(model.params, found)
    )
    assert nearer.loss(batch) < model.loss(batch)


def test_features_are_the_towers_taps(model):
    pixels = image.pixels(
        [ImageRef(str(GOLDEN / "pictures" / f"{i}.png")) for i in range(9)], model.config
    )
    wanted = np.asarray(model.module.encode(pixels))
    found = model.features([picture(i) for i in range(9)])
    assert (
        found.shape == wanted.shape == (9, 3, 5, 32)
        and np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    )
    assert np.abs(model.features(picture(4)) - found[4]).max() <= 1e-5 * np.abs(found[4]).max()


@pytest.mark.pinned
def test_attention_has_a_map_for_each_word(model):
    words = model.attention("What is it?", images=[picture(1)], answer="A cat.")
    assert [(word["word"], word["predicted"]) for word in words] == [
        (w, False) for w in "What is it?".split()
    ] + [
        ("A", True),
        ("cat.", True),
    ]
    assert all(word["grid"].shape == (2, 2) and 0 < word["grid"].sum() <= 1 for word in words)
    other = model.attention("What is it?", images=[picture(5)], answer="A cat.")
    assert any(np.abs(a["grid"] - b["grid"]).max() > 1e-4 for a, b in zip(words, other))
    own = model.attention("What is it?", images=[picture(1)])
    assert " ".join(word["word"] for word in own if word["predicted"]) == " ".join(
        model.generate("What is it?", picture(1)).split()
    )


# --------------------------------------------------------------------------- where models come from


@pytest.mark.pinned
def test_an_export_is_the_same_model(model, folder):
    same = evlm_jax.load(str(folder / "export"))
    for given, shown in (("Some text", None), ("Here <image> it is", picture(1))):
        assert np.array_equal(same.logits(given, shown), model.logits(given, shown))
    assert same.generate("What is it?", picture(2), 8) == model.generate(
        "What is it?", picture(2), 8
    )
    assert float(same.loss([sample()])) == pytest.approx(float(model.loss([sample()])), rel=1e-6)


def test_a_dtype_is_of_weights_and_computing(model, folder):
    half = evlm_jax.load(folder / "run", dtype="bfloat16", devices=jax.devices()[0])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {
        "bfloat16"
    } and half.config.train.dtype == "bfloat16"
    wanted = np.asarray(model.logits("Some text", picture(1)))
    apart = (
        np.abs(np.asarray(half.logits("Some text", picture(1))) - wanted).max()
        / np.abs(wanted).max()
    )
    assert 0 < apart < 0.05


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_saved_is_the_same_model(folder, tmp_path, dtype):
    given = evlm_jax.load(folder / "run", dtype=dtype)
    given.save(tmp_path / "saved")
    found = evlm_jax.load(tmp_path / "saved")
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), given.params, found.params
    )
    assert all(jax.tree.leaves(same))
    assert found.config == replace(given.config, init=found.config.init)
    assert found.config.init.llm == str(tmp_path / "saved" / "tokenizer")
    export(str(tmp_path / "saved"), str(tmp_path / "export"), "hf")
    exported = jax.tree.leaves(evlm_jax.load(tmp_path / "export").params)
    assert all(map(np.array_equal, exported, jax.tree.leaves(given.params)))
    with pytest.raises(FileExistsError, match="saved exists; give a new directory"):
        found.save(tmp_path / "saved")


@pytest.mark.pinned
def test_new_weights_are_a_function_of_the_seed(folder):
    cfg = tiny_config(init={"llm": str(folder / "llm")}, **BASELINES["flamingo"])
    one, same, other = (evlm_jax.random(cfg, seed) for seed in (1, 1, 2))

    def weight(model):
        return np.asarray(model.module.llm.embed[...])

    assert np.array_equal(weight(one), weight(same)) and not np.allclose(weight(one), weight(other))
    with pytest.raises(ValueError, match="the model has bridge.kind = flamingo"):
        one.attention("What?", picture(1))
