"""What the library is asked wrongly it refuses in one line, which names the mend."""

import jax
import numpy as np
import pytest

import evlm_jax
from tests.test_library import GOLDEN, sample

BLACK = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    return evlm_jax.load(GOLDEN / "run")


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda model: model.generate("<image> and", [BLACK, BLACK]),
            "the text has 1 <image> markers for 2 images and videos: write one",
        ),
        (lambda model: model.generate(5), "list of texts"),
        (lambda model: model.generate(["a", 5]), "a text is a str, got int"),
        (
            lambda model: model.generate(["a", "b"], [BLACK]),
            "images of 2 prompts: give a list, one entry for each",
        ),
        (
            lambda model: model.generate("a", BLACK / 255),
            "uint8 .height, width, 3., got float64 .4, 4, 3.: convert it",
        ),
        (
            lambda model: model.generate("a", 7),
            "a picture is a path, a Pillow image or a uint8 array .*, got int",
        ),
        (
            lambda model: model.generate("a", "none.png"),
            "none.png: No such file",
        ),
        (lambda model: model.generate("a", [[]]), "a video without frames"),
        (
            lambda model: model.generate("a", max_new_tokens=2.5),
            "max_new_tokens must be a whole number, at least 1, got 2.5",
        ),
        (
            lambda model: model.generate("a", temperature="hot"),
            "temperature must be a number, at least 0, got 'hot'",
        ),
        (lambda model: model.generate("a", stop=[3]), "stop_strings must be texts"),
        (lambda model: model.generate("a", stop=3), "stop_strings must be texts"),
        (lambda model: model.features(BLACK[:0]), "size .4, 0.: it has no pixels"),
        (lambda model: model.attention(["a"], BLACK, "b"), "a text is a str, got list"),
        (lambda model: model.attention("a", BLACK, 5), "a text is a str, got int"),
        (lambda model: model.loss(None), "make_sample returns, got NoneType"),
        (lambda model: model.loss([sample()], {}), "params have 0 arrays, the model 84: give"),
        (
            lambda model: model.with_params(jax.tree.map(lambda x: x[None], model.params)),
            "params: .* is .1, .*, the model's is",
        ),
        (lambda model: model.save(3), "folder is 3: give the path of a new one"),
        (
            lambda model: evlm_jax.make_batch(sample(), "config"),
            "config is a str: give Model.config",
        ),
        (
            lambda model: evlm_jax.make_batch(sample(), model.config, "vocabulary"),
            "tokenizer is a str: give Model.tokenizer, or leave it out",
        ),
        (lambda model: model.generate("a", answers=2), "give a temperature"),
        (lambda model: model.generate("a", top_p=0.9), "min_p are of draws: give a temperature"),
        (
            lambda model: model.generate(["a"], stream=True),
            "stream=True gives pieces of one answer",
        ),
        (lambda model: model.generate("\ud800"), "surrogates not allowed"),
        (lambda model: model.logits([1, 256]), "ids from 0 to 255"),
        (lambda model: model.logits(""), "without any token: give at least one letter"),
        (lambda model: model.logits("a", "none.png"), "none.png"),
        (lambda model: model.features([]), "give at least one"),
        (lambda model: model.attention("What?", None), "give at least one"),
        (
            lambda model: model.loss([]),
            "samples are what evlm_jax.make_sample returns, got nothing",
        ),
        (lambda model: model.loss(["a"]), "got str"),
        (
            lambda model: model.loss([evlm_jax.make_sample("long " * 99)]),
            "too long: 495 tokens > data.length 96.*: shorten it, or raise that",
        ),
        (lambda model: evlm_jax.make_sample("a", "b", "c"), "a dialog of 3 texts"),
        (
            lambda model: evlm_jax.make_batch(sample(), model.config, rows=0),
            "rows must be at least 1, got 0",
        ),
        (lambda model: evlm_jax.load("nowhere"), "nowhere: neither a run .steps/. nor an export"),
        (lambda model: evlm_jax.load(GOLDEN / "llm"), "holds llama, not a whole EVLM"),
        (lambda model: evlm_jax.load(GOLDEN / "run", 99), "no checkpoint of step 99"),
        (lambda model: evlm_jax.load(5), "path is 5: give the folder of a run, an import or an"),
        (lambda model: evlm_jax.load(""), "path is '': give the folder of a run, an import or an"),
        (lambda model: evlm_jax.load(GOLDEN / "run", "6"), "step must be a whole number, at lea"),
        (
            lambda model: evlm_jax.load(GOLDEN / "run", devices="cpu"),
            "devices are some of jax.devices.., got 'cpu'",
        ),
        (
            lambda model: evlm_jax.load(GOLDEN / "run", dtype="float16"),
            "dtype is 'float16': use one of float32, bfloat16",
        ),
        (lambda model: evlm_jax.random({}), "config is a dict: give"),
        (lambda model: evlm_jax.random(model.config, -1), "seed must be at least 0"),
    ],
)
def test_errors_are_one_line_with_the_mend(model, call, message):
    with pytest.raises((ValueError, OSError), match=message) as found:
        call(model)
    assert "\n" not in str(found.value)
