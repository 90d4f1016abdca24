"""Synthetic pages: the same in every process; boxes are of ink, also in perspective; what is said is what is drawn."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from evlm_jax import assets
from evlm_jax.data import image
from evlm_jax.data.features import content_key
from evlm_jax.data.formats.grounding import box
from evlm_jax.data.ocr import fonts, layout
from evlm_jax.data.ocr.book import plain
from evlm_jax.data.ocr.dialogs import dialogs
from evlm_jax.data.ocr.page import Page, compose, draw, homography, onto
from evlm_jax.data.samples import SampleError, Turn
from evlm_jax.data.sources import open_source, read
from evlm_jax.data.text import encode
from evlm_jax.tokenizer import load_tokenizer
from tests.data.made import TOKENIZER, config, write_images
from tests.parity import needs_asset

ENGLISH = [
    "The quick brown fox jumps over the lazy dog",
    "Pack my box",
    "Is it 12.5% of <image> jugs?",
    "Sphinx",
    "Vow, quartz & “judge” me",
]
CHINESE = ["红苹果", "天地玄黄，宇宙洪荒。", "他用 GPU 训练模型，花了 3 天", "日月盈昃"]
LANGUAGES = ["en", pytest.param("zh", marks=needs_asset("noto-cjk"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of both languages, one that is written in no font, and a few pictures."""
    folder = tmp_path_factory.mktemp("ocr")
    for name, texts in (("en", ENGLISH), ("zh", CHINESE), ("none", ["\ue000 x"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_images(folder / "pictures", 3, 32)
    for i in range(3):
        (folder / "pictures" / f"{i}.txt").write_text("a picture")
    return folder


def opened(folder, language, options="", texts=None, pictures=True):
    backgrounds = f"folder:{folder}/pictures" if pictures else ""
    return open_source(f"ocr-{language}:text:{folder}/{texts or language}.jsonl?pictures={backgrounds}&{options}")


def pages(language, count, lying=False, size=320):
    """Pages by their parts."""
    texts = {"en": ENGLISH, "zh": CHINESE}[language]

    def supply(rng):
        while True:
            yield plain(texts[rng.integers(len(texts))])

    faces = fonts.faces(language)
    return [compose((7, i), size, language, faces, supply, 1500, lying) for i in range(count)]


def words_of(page: Page):
    return [word for line in page.sheet.lines for word in line.words]


def inked(words, size):
    """Which pixels of a sheet Pillow blackens for these words."""
    sheet = Image.new("L", size)
    for word in words:
        ImageDraw.Draw(sheet).text((word.x, word.y), word.text, 255, fonts.font(word.face, word.px), anchor="ls")
    return np.asarray(sheet) > 0


def bounds(mask):
    """Left, top, right and bottom of what is true."""
    down, across = np.nonzero(mask)
    return across.min(), down.min(), across.max() + 1, down.max() + 1


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
    elsewhere = subprocess.run([sys.executable, "-c", code, *refs[::-1]], capture_output=True, text=True, check=True).stdout.split()
    here = [hashlib.sha256(read(*ref.removeprefix("page://").split("::", 1))).hexdigest() for ref in refs]
    assert here == elsewhere[::-1] and len(set(here)) == 3
    assert opened(folder, language, "seed=4&size=256")[3].dialogs != one[3].dialogs


@pytest.mark.parametrize("language", LANGUAGES)
def test_boxes_are_those_of_ink(language):
    for page in pages(language, 12):
        ink = np.zeros(page.sheet.size[::-1], bool)
        for word in words_of(page):
            alone = inked([word], page.sheet.size)
            assert word.box == bounds(alone)
            assert not (ink & alone).any(), "words overlap"
            ink |= alone
        assert (ink == inked(words_of(page), page.sheet.size)).all()
        for line in page.sheet.lines:
            assert line.box == bounds(inked(line.words, page.sheet.size))


def test_boxes_go_through_the_perspective():
    lying = [page for page in pages("en", 10, lying=True) if page.lies]
    assert lying
    for page in lying:
        for word in words_of(page)[::7]:
            left, top, right, bottom = word.box
            sheet = Image.new("RGB", page.sheet.size)
            ImageDraw.Draw(sheet).rectangle((left, top, right - 1, bottom - 1), fill="white")
            seen = bounds(np.asarray(onto(Image.new("RGB", (9, 9)), sheet, page).convert("L")) > 100)
            np.testing.assert_allclose(page.place([word.box])[0] * (*page.size, *page.size), seen, atol=2)


def test_homography_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    quad = np.array([(10, 12), (200, 5), (210, 150), (3, 170)], np.float32)
    corners = np.array([(0, 0), (190, 0), (190, 140), (0, 140)], np.float32)
    np.testing.assert_allclose(homography((190, 140), quad), cv2.getPerspectiveTransform(corners, quad), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_said_is_what_is_drawn(folder, language, monkeypatch):
    source, drawn = opened(folder, language), []
    plainly = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, at, text, **more: (drawn.append(text), plainly(pen, at, text, **more)))
    for i in range(8):
        drawn.clear()
        source.picture(i)
        assert source[i].dialogs[0][1].text.split() == drawn


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_glyph_is_missing(language):
    """A character that a font has not is drawn as its .notdef."""
    for page in pages(language, 12):
        for word in words_of(page):
            font = fonts.font(word.face, word.px)
            missing = bytes(font.getmask("\U0010fffd"))
            assert all(bytes(font.getmask(character)) != missing for character in word.text)


def test_another_font_or_an_error_where_a_glyph_is_missing(folder):
    italic, sans = (next(f for f in fonts.faces("en") if f.path.endswith(name)) for name in ("STIXGeneralItalic.ttf", "DejaVuSans.ttf"))
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


def test_reading_order():
    """The next line stands below the last one, or right of all lines of the columns so far; words go from left to right."""
    columns = 0
    for page in pages("en", 30):
        right = 0
        for last, line in zip(page.sheet.lines, page.sheet.lines[1:]):
            if line.box[3] <= last.box[1]:  # further up: a new column
                columns += 1
                assert line.box[0] >= right and len(page.sheet.lines) > 2
            else:
                assert line.box[1] >= last.box[1]
            right = max(right, last.box[2]) if last is not page.sheet.lines[0] else right  # the heading is above all columns
        for line in page.sheet.lines:
            lefts = [word.x for word in line.words]
            assert lefts == sorted(lefts)
    assert columns


@settings(max_examples=200, deadline=None)
@given(st.text("ab c,。红字 ", min_size=1, max_size=60), st.integers(5, 200))
def test_wrapped_lines_fit_and_lose_nothing(text, room):
    face = fonts.faces("en")[0]
    lines = layout.wrap(text, face, 12, room)
    assert "".join("".join(line) for line in lines) == "".join(text.split())
    for line in lines:
        assert len("".join(line)) == 1 or sum(fonts.width(face, 12, word) for word in line) <= room
    if not layout.CJK.search(text) and all(fonts.width(face, 12, word) <= room for word in text.split()):
        assert [word for line in lines for word in line] == text.split()


def test_every_layout_is_drawn(monkeypatch):
    made = []
    for make in list(layout.LAYOUTS):
        monkeypatch.setattr(layout, "LAYOUTS", {make: 1.0})
        for page in pages("en", 3):
            picture, quality = draw(page, (1,), None)
            assert picture.size == page.size and 50 <= quality <= 95
            made.append(bool(page.sheet.rules))
            assert all(0 <= share <= 1 for share in page.place([line.box for line in page.sheet.lines]).ravel())
    assert sum(made) == 3  # tables have rules


@pytest.mark.parametrize("language", LANGUAGES)
def test_samples(folder, language):
    source = opened(folder, language, "pages=40&characters=300")
    assert (len(source), source.dialog_counts()[:2]) == (40, [4, 4])
    for sample in map(source.__getitem__, range(20)):
        (read_all, whole), (at, line), (where, place), (count, number) = [[turn.text for turn in dialog] for dialog in sample.dialogs]
        lines = whole.split("\n")
        assert line in lines and number == str(len(lines)) and len(whole) <= 300 + len(lines) or len(lines) == 1
        assert re.search(r"<box>\(\d+,\d+\),\(\d+,\d+\)</box>", at)
        if re.search("<box>.*</box>", place):
            asked = re.search('["“](.*)["”]', where).group(1)
            assert whole.count(asked) == 1
        assert all(text.startswith("<image>") for text in (read_all, at, where, count))
        assert image.decode(sample.refs[0].path).size in [(448, y) for y in range(314, 449)] + [(x, 448) for x in range(314, 449)]


def test_the_box_of_a_word_is_where_it_stands():
    found = 0
    for number, page in enumerate(pages("en", 10)):
        boxes = {word.text: box(page.place([word.box])[0]) for word in words_of(page)}
        placed = lambda parts, page=page: list(zip([part.text for part in parts], page.place([part.box for part in parts])))
        asked, answer = dialogs("en", placed(page.sheet.lines), placed(words_of(page)), np.random.default_rng(number))[2]
        if 'Where is "' in asked.text:
            word = asked.text.split('"', 1)[1].removesuffix('" written?')
            found += word in boxes
            assert boxes.get(word, answer.text) == answer.text
    assert found > 3


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("smollm2-135m-instruct", marks=needs_asset("smollm2-135m-instruct"))])
def test_answers_come_through_the_tokenizer(folder, tokenizer):
    cfg, used = config(), TOKENIZER
    if tokenizer != "bytes":
        used = load_tokenizer(tokenizer)
        cfg = dataclasses.replace(cfg, media=dataclasses.replace(cfg.media, placeholder="<filename>"))
    sample = opened(folder, "en")[1]
    document = encode(sample, used, cfg)
    for number, dialog in enumerate(sample.dialogs):
        said = used.decode(document.targets[document.dialog == number].tolist())
        assert said.strip() == dialog[1].text


def test_wrong_options(folder):
    for options, message in {
        "pages=0": "pages must be a whole number above 0",
        "size=x": "size must be a whole number",
        "role=system": "role must be assistant or user",
        "sizes=3": "unknown option 'sizes'",
    }.items():
        with pytest.raises(ValueError, match=message):
            opened(folder, "en", options)
    with pytest.raises(ValueError, match="name the sources of its text, as in ocr-en:emoji-en"):
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
    row = {"id": 1, "conversations": [{"from": "human", "value": "Question"}, {"from": "gpt", "value": "Answer"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    for role, only in (("user", "Question"), ("assistant", "Answer")):
        said = open_source(f"ocr-en:llava:{tmp_path}/a.jsonl?pictures=&role={role}")[0].dialogs[0]
        assert (
            isinstance(said[1], Turn) and only in said[1].text and len({"Question", "Answer"} & set(re.findall(r"\w+", said[1].text))) == 1
        )
