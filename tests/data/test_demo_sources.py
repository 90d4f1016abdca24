"""The demo's mixture, field by field: photographs, albums, signs, clips; and that every document of
it fits its rows.
"""

import json

import numpy as np
import pytest

from evlm_jax import assets
from evlm_jax.config import from_config_dict
from evlm_jax.data import image
from evlm_jax.data.cut import encode_parts
from evlm_jax.data.mixture import tasks
from evlm_jax.data.pack import unfit
from evlm_jax.data.pipeline import Lane
from evlm_jax.data.samples import ImageRef, Turn
from evlm_jax.data.sources import open_source
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.demo import command
from evlm_jax.demo.command import fast_products
from evlm_jax.evals import tasks as evals
from experiments import demo
from tests.helpers.parity import needs_asset
from tests.helpers.scenes import needs_scenes

COUNTED = {2: "Two", 3: "Three", 4: "Four"}
SIGNS = ["signs-en", pytest.param("signs-zh", marks=needs_asset("noto-cjk"))]


def published(asset):
    """{path: caption} of the asset's files."""
    folder = assets.path(asset)
    return {
        str(folder / file): caption
        for file, caption in json.loads((folder / "captions.json").read_text()).items()
    }


@needs_asset("photos")
def test_photographs_are_trained_on_or_kept_for_evaluation():
    train, test = open_source("photos"), open_source("photos-test")
    paths = [[sample.refs[0].path for sample in source] for source in (train, test)]
    assert sorted(paths[0] + paths[1]) == sorted(published("photos")) and (
        len(train),
        len(test),
    ) == (12, 6)
    for sample in (*train, *test):
        answer = Turn("assistant", published("photos")[sample.refs[0].path])
        assert sample.dialogs == ((Turn("user", "<image>Describe this image."), answer),)


@needs_asset("photos")
def test_albums_are_documents_of_two_to_four_photographs_in_front_of_their_captions():
    source, captions = open_source("albums"), published("photos")
    kept = {sample.refs[0].path for sample in open_source("photos-test")}
    for sample in source:
        paths = [ref.path for ref in sample.refs]
        assert (
            sample.visuals == tuple((ImageRef(path),) for path in paths)
            and len(set(paths)) == len(paths)
            and not kept & set(paths)
        )
        told = "".join(f" <image>{captions[path]}" for path in paths)
        assert sample.dialogs == (
            (Turn("assistant", f"{COUNTED[len(paths)]} photographs.{told}"),),
        )
        assert sample.source == "albums"
    assert [len(sample.visuals) for sample in source] == [2, 3, 4] * 100
    assert [sample.key for sample in source] == [str(i) for i in range(300)]
    assert len({sample.visuals for sample in source}) > 250  # of 1,320 threes and 11,880 fours
    assert list(source) == list(open_source("albums"))


@needs_asset("openmoji")
@needs_asset("photos")
@pytest.mark.parametrize("name", SIGNS)
def test_signs_are_few_large_pieces_of_emoji_names(name):
    source = open_source(name)
    names = [sample.dialogs[0][1].text for sample in open_source(f"emoji-{name[-2:]}")]
    assert len(source) == 128
    for sample in source:
        read, *others = (answer.text for _, answer in sample.dialogs)
        lines = read.split("\n")
        assert len(others) == 3 and others[-1] == str(len(lines)) and len(read) <= 24 + len(lines)
        assert all(
            any(line.replace(" ", "") in known.replace(" ", "") for known in names)
            for line in lines
        )
    for picture in image.decode_all(source[3].refs + source[4].refs):
        assert max(picture.size) == 160 and np.asarray(picture).std() > 10


@needs_asset("clips")
def test_clips_are_videos_of_four_uniform_frames():
    captions = published("clips")
    for sample in open_source("clips"):
        times = [ref.frame for ref in sample.visuals[0]]
        assert (
            len(times) == 4
            and np.allclose(np.diff(times), 2 * times[0])
            and len({ref.path for ref in sample.refs}) == 1
        )
        assert sample.dialogs == (
            (
                Turn("user", "<image>Describe this video."),
                Turn("assistant", captions[sample.refs[0].path]),
            ),
        )


@needs_scenes
@needs_asset("smollm2-135m-instruct")
@needs_asset("easy-vqa")
@needs_asset("openmoji")
@needs_asset("photos")
@needs_asset("clips")
@needs_asset("noto-cjk")
@pytest.mark.parametrize("name", demo.SOURCES)
def test_every_document_of_the_demo_fits_a_row(name):
    cfg = from_config_dict(demo.get_config())
    tokenizer, source = load_tokenizer(cfg.init.llm), open_source(name)
    for number in range(0, len(source), max(1, len(source) // 300)):
        document = encode_parts(source[number], tokenizer, cfg)
        assert unfit(document, cfg.data) is None and document.parts == 1


@needs_scenes
@needs_asset("smollm2-135m-instruct")
@needs_asset("easy-vqa")
@needs_asset("openmoji")
@needs_asset("photos")
@needs_asset("clips")
@needs_asset("noto-cjk")
@pytest.mark.parametrize("form", ["", "full"])
@pytest.mark.pinned
def test_the_demos_rows_are_full_nothing_is_dropped_and_shares_are_kept(form):
    cfg = from_config_dict(demo.get_config(form))
    lane = Lane(
        tasks([open_source(name) for name in cfg.data.sources], load_tokenizer(cfg.init.llm), cfg),
        cfg,
        0,
    )
    rows = [row for _ in range(200) for row in lane.rows()]
    documents = [document for row in rows for document in row]
    assert lane.drops() == []
    assert sum(len(document.tokens) for document in documents) > 0.9 * 200 * cfg.data.length
    shares = np.array(
        [sum(document.source == name for document in documents) for name in cfg.data.sources]
    ) / len(documents)
    np.testing.assert_allclose(shares, cfg.data.weights, atol=0.03)  # the packing window waits
    assert shares.min() > 0


@needs_asset("photos")
def test_photographs_are_asked_for_what_they_are():
    """As photographs are in training; not for the name of an emoji."""
    assert {question.text for question in evals.find("photos").questions(None, None)} == {
        "Describe this image."
    }


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("flags : fpu avx2 avx512f", "float32"),
        ("flags : fpu avx512_bf16", "bfloat16"),
        ("flags : amx_bf16 amx_tile", "bfloat16"),
        ("Features : fp asimd bf16", "bfloat16"),
    ],
)
def test_the_demo_multiplies_in_what_the_cpu_is_fast_at(tmp_path, flags, wanted):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\n{flags}\n")
    assert fast_products(str(file)) == wanted
    assert fast_products(str(tmp_path / "none")) == "bfloat16"


@pytest.mark.parametrize("products, steps", [("float32", 200), ("bfloat16", command.STEPS)])
def test_the_demo_takes_as_many_steps_as_half_an_hour_has(monkeypatch, products, steps):
    monkeypatch.setattr(command, "fast_products", lambda: products)
    monkeypatch.setattr(command, "there", lambda name, make: True)
    train = command.configured("").train
    assert (train.steps, train.matmul_precision) == (steps, products)
    assert command.configured("fast").train.steps == 6
