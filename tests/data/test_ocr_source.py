"""Synthetic pages as samples: the same in every process and thread; what is said is what is drawn;
wrong options.
"""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ImageDraw

from evlm_jax import assets
from evlm_jax.data import image
from evlm_jax.data.features import content_key
from evlm_jax.data.ocr import fonts
from evlm_jax.data.ocr.book import plain
from evlm_jax.data.pipeline import batches
from evlm_jax.data.samples import SampleError, Turn
from evlm_jax.data.sources import open_source, read
from evlm_jax.data.text import encode
from evlm_jax.data.tokenizer import load_tokenizer
from tests.data.made import TOKENIZER, config, write_images
from tests.data.written import LANGUAGES, opened, write_sources
from tests.helpers.parity import needs_asset

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ocr")
    write_sources(folder)
    return folder


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_are_a_function_of_seed_and_number(folder, language):
    one, other = (opened(folder, language, "seed=3&size=256") for _ in range(2))
    backwards = {i: other[i] for i in (5, 3, 0)}
    assert all(one[i] == backwards[i] for i in (0, 3, 5))
    refs = [one[i].refs[0].path for i in (0, 3, 5)]
    code = (
        "import sys, hashlib; from evlm_jax.data.containers.rows import open_ref\n"
        "for ref in sys.argv[1:]: print(hashlib.sha256(open_ref(ref).read()).hexdigest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code, *refs[::-1]], capture_output=True, text=True, check=True
    ).stdout.split()
    here = [
        hashlib.sha256(read(*ref.removeprefix("page://").split("::", 1))).hexdigest()
        for ref in refs
    ]
    assert here == elsewhere[::-1] and len(set(here)) == 3
    assert opened(folder, language, "seed=4&size=256")[3].dialogs != one[3].dialogs


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_said_is_what_is_drawn(folder, language, monkeypatch):
    source, drawn = opened(folder, language), []
    plainly = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda pen, at, text, **more: (drawn.append(text), plainly(pen, at, text, **more)),
    )
    for i in range(8):
        drawn.clear()
        source.picture(i)
        assert source[i].dialogs[0][1].text.split() == drawn


def test_another_font_or_an_error_where_a_glyph_is_missing(folder):
    italic, sans = (
        next(f for f in fonts.faces("en") if f.path.endswith(name))
        for name in ("STIXGeneralItalic.ttf", "DejaVuSans.ttf")
    )
    assert fonts.writable((italic, sans), ["\ue123", "\u2603"]) == ("\u2603", (sans,))  # a snowman
    with pytest.raises(SampleError, match=r"no font has the characters '\\ue000'.*fonts=FILE"):
        opened(folder, "en", texts="none")[0]


def test_chinese_needs_a_font(folder, monkeypatch):
    monkeypatch.setattr(assets, "available", lambda name: False)
    with pytest.raises(ValueError, match=r"no font for Chinese.*evlm fetch noto-cjk.*fonts=FILE"):
        opened(folder, "zh")
    sans = fonts.faces("en")[0].path
    with pytest.raises(SampleError, match="no font has the characters '.*'"):
        opened(folder, "zh", f"fonts={sans}")[0]
    with pytest.raises(ValueError, match=r"fonts=.*en.jsonl: cannot read the font"):
        opened(folder, "en", f"fonts={folder}/en.jsonl")


@needs_asset("noto-cjk")
def test_fonts_of_a_user(folder):
    collection = str(assets.path("noto-cjk"))
    named = fonts.faces("en", f"{collection},{fonts.faces('en')[3].path}")
    assert {face.index for face in named if face.path == collection} >= {0, 1, 2}
    assert fonts.able(named, "红") and not fonts.able(fonts.faces("en"), "红")


@pytest.mark.parametrize("language", LANGUAGES)
def test_samples(folder, language):
    source = opened(folder, language, "pages=40&characters=300")
    assert (len(source), source.dialog_counts()[:2]) == (40, [4, 4])
    for sample in map(source.__getitem__, range(20)):
        (read_all, whole), (at, line), (where, place), (count, number) = [
            [turn.text for turn in dialog] for dialog in sample.dialogs
        ]
        lines = whole.split("\n")
        assert (
            line in lines
            and number == str(len(lines))
            and len(whole) <= 300 + len(lines)
            or len(lines) == 1
        )
        assert re.search(r"<box>\(\d+,\d+\),\(\d+,\d+\)</box>", at)
        if re.search("<box>.*</box>", place):
            asked = re.search('["“](.*)["”]', where).group(1)
            assert whole.count(asked) == 1
        assert all(text.startswith("<image>") for text in (read_all, at, where, count))
        assert image.decode(sample.refs[0].path).size in [(448, y) for y in range(314, 449)] + [
            (x, 448) for x in range(314, 449)
        ]


@pytest.mark.parametrize(
    "tokenizer",
    ["bytes", pytest.param("smollm2-135m-instruct", marks=needs_asset("smollm2-135m-instruct"))],
)
def test_answers_come_through_the_tokenizer(folder, tokenizer):
    cfg, used = config(), TOKENIZER
    if tokenizer != "bytes":
        used = load_tokenizer(tokenizer)
        cfg = dataclasses.replace(
            cfg, media=dataclasses.replace(cfg.media, placeholder="<filename>")
        )
    sample = opened(folder, "en")[1]
    document = encode(sample, used, cfg)
    for number, dialog in enumerate(sample.dialogs):
        said = used.decode(document.targets[document.dialog == number].tolist())
        assert said.strip() == dialog[1].text


def test_a_part_of_the_pages(folder):
    np.save(folder / "keep.npy", [5, 2])
    whole, part = opened(folder, "en"), opened(folder, "en", f"keep={folder}/keep.npy")
    assert [sample.dialogs for sample in part] == [
        whole[i].dialogs for i in (5, 2)
    ] and part.dialog_counts() == [4, 4]
    np.testing.assert_array_equal(
        image.decode(part[0].refs[0].path), image.decode(whole[5].refs[0].path)
    )


def test_threads_draw_the_same(folder):
    source = opened(folder, "en", "size=200")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.picture, range(24))) == list(map(source.picture, range(24)))


def test_pages_in_batches(folder):
    name = f"ocr-en:text:{folder}/en.jsonl?pictures=folder:{folder}/pictures&characters=200"
    cfg = config(sources=(name,), length=2048, targets=2048, block_pairs=512, window=2)
    iterator, other = batches(cfg, TOKENIZER), batches(cfg, TOKENIZER)
    batch, info = next(iterator)
    keys = [key.removeprefix(f"{name}/") for row in info["keys"] for key in row]
    assert keys and not info["drops"]
    source = open_source(name)
    for slot, key in enumerate(key.removeprefix(f"{name}/") for key in info["keys"][0]):
        np.testing.assert_array_equal(
            batch.pixels[0, slot], image.pixels(source[int(key)].refs, cfg)[0]
        )
    other.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(iterator)[0].pixels, next(other)[0].pixels)
    iterator.close(), other.close()


def test_wrong_options(folder):
    for options, message in {
        "pages=0": "pages must be a whole number above 0",
        "size=x": "size must be a whole number",
        "role=system": "role must be assistant or user",
        "sizes=3": "unknown option 'sizes'",
        "layouts=sign,poem": "layouts has 'poem'; there are article, list, table, dense, sign",
    }.items():
        with pytest.raises(ValueError, match=message):
            opened(folder, "en", options)
    with pytest.raises(ValueError, match="has no path; give ocr-en:PATH"):
        open_source("ocr-en:?pictures=")
    with pytest.raises(SampleError, match="no text of the user"):
        opened(folder, "en", "role=user")[0]
    with pytest.raises(SampleError, match="no room for a line"):
        opened(folder, "en", "size=8", pictures=False)[0]


def test_what_nobody_sees_is_not_written():
    assert plain("a\u200d b\ufe0f\n<image> c\x07") == "a b c"


def test_keys_of_features_and_a_broken_background(folder, tmp_path):
    source = opened(folder, "en")
    assert content_key(source[0].refs[0]) != content_key(source[1].refs[0])
    write_images(tmp_path, 1)
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "0.txt").write_text("x")
    broken = open_source(f"ocr-en:text:{folder}/en.jsonl?pictures=folder:{tmp_path}")
    with pytest.raises(image.ImageError, match="0.png"):
        for i in range(10):
            image.decode(broken[i].refs[0].path)


def test_questions_are_turns_of_the_user(folder, tmp_path):
    row = {
        "id": 1,
        "conversations": [
            {"from": "human", "value": "Question"},
            {"from": "gpt", "value": "Answer"},
        ],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    for role, only in (("user", "Question"), ("assistant", "Answer")):
        said = open_source(f"ocr-en:llava:{tmp_path}/a.jsonl?pictures=&role={role}")[0].dialogs[0]
        assert (
            isinstance(said[1], Turn)
            and only in said[1].text
            and len({"Question", "Answer"} & set(re.findall(r"\w+", said[1].text))) == 1
        )
