"""Layout of synthetic pages: boxes are of ink, also in perspective; reading order; no glyph is
missing.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from evlm_jax.data.formats.grounding import box
from evlm_jax.data.ocr import fonts, layout
from evlm_jax.data.ocr.dialogs import dialogs
from evlm_jax.data.ocr.page import draw, homography, onto
from tests.data.written import LANGUAGES, pages, words_of
from tests.helpers.parity import needs_asset

pytestmark = pytest.mark.ci


def inked(words, size):
    """Which pixels of a sheet Pillow blackens for these words."""
    sheet = Image.new("L", size)
    for word in words:
        ImageDraw.Draw(sheet).text(
            (word.x, word.y), word.text, 255, fonts.font(word.face, word.px), anchor="ls"
        )
    return np.asarray(sheet) > 0


def bounds(mask):
    """Left, top, right and bottom of what is true."""
    down, across = np.nonzero(mask)
    return across.min(), down.min(), across.max() + 1, down.max() + 1


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
            seen = bounds(
                np.asarray(onto(Image.new("RGB", (9, 9)), sheet, page).convert("L")) > 100
            )
            np.testing.assert_allclose(
                page.place([word.box])[0] * (*page.size, *page.size), seen, atol=2
            )


def test_homography_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    quad = np.array([(10, 12), (200, 5), (210, 150), (3, 170)], np.float32)
    corners = np.array([(0, 0), (190, 0), (190, 140), (0, 140)], np.float32)
    np.testing.assert_allclose(
        homography((190, 140), quad),
        cv2.getPerspectiveTransform(corners, quad),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_glyph_is_missing(language):
    """A character that a font has not is drawn as its .notdef."""
    for page in pages(language, 12):
        for word in words_of(page):
            font = fonts.font(word.face, word.px)
            missing = bytes(font.getmask("\U0010fffd"))
            assert all(bytes(font.getmask(character)) != missing for character in word.text)


def test_reading_order():
    """The next line stands below the last one, or right of all lines of the columns so far; words
    go from left to right.
    """
    columns = 0
    for page in pages("en", 30):
        right = 0
        for last, line in zip(page.sheet.lines, page.sheet.lines[1:]):
            if line.box[3] <= last.box[1]:  # further up: a new column
                columns += 1
                assert line.box[0] >= right and len(page.sheet.lines) > 2
            else:
                assert line.box[1] >= last.box[1]
            right = (
                max(right, last.box[2]) if last is not page.sheet.lines[0] else right
            )  # the heading is above all columns
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
    if not layout.CJK.search(text) and all(
        fonts.width(face, 12, word) <= room for word in text.split()
    ):
        assert [word for line in lines for word in line] == text.split()


@needs_asset("noto-cjk")
def test_no_line_begins_with_a_closing_mark():
    face = fonts.faces("zh")[0]
    room = fonts.width(face, 20, "天天天")
    assert layout.wrap("红红红红红红，红", face, 20, room) == [["红红红"], ["红红"], ["红，红"]]
    assert layout.wrap("红，。红", face, 20, fonts.width(face, 20, "红")) == [
        ["红"],
        ["，"],
        ["。"],
        ["红"],
    ]


def test_every_layout_is_drawn():
    made = []
    for name in layout.LAYOUTS:
        for page in pages("en", 3, layouts=(name,)):
            picture, quality = draw(page, (1,), None)
            assert picture.size == page.size and 50 <= quality <= 95
            made.append(bool(page.sheet.rules))
            assert made[-1] == (name == "table")
            assert (
                name != "sign"
                or len(page.sheet.lines) < 12
                and max(word.px for word in words_of(page)) >= 22
            )
            assert all(
                0 <= share <= 1
                for share in page.place([line.box for line in page.sheet.lines]).ravel()
            )
    assert sum(made) == 3  # tables have rules


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sign_fits_a_small_page(language):
    for page in pages(language, 100, size=112, layouts=("sign",)):
        assert (page.place([line.box for line in page.sheet.lines])[:, 3] < 1.05).all()


def test_layouts_are_drawn_as_often_as_is_said():
    """Tables among pages of all layouts, and of lists and tables: 0.15, and 0.15 of 0.35."""
    for names, share in ((tuple(layout.LAYOUTS), 0.15), (("list", "table"), 0.15 / 0.35)):
        tables = np.mean(
            [bool(page.sheet.rules) for page in pages("en", 200, size=200, layouts=names)]
        )
        assert abs(tables - share) < 3 * np.sqrt(share * (1 - share) / 200)


def test_the_box_of_a_word_is_where_it_stands():
    found = 0
    for number, page in enumerate(pages("en", 10)):
        boxes = {word.text: box(page.place([word.box])[0]) for word in words_of(page)}

        def placed(parts, page=page):
            return list(
                zip([part.text for part in parts], page.place([part.box for part in parts]))
            )

        asked, answer = dialogs(
            "en", placed(page.sheet.lines), placed(words_of(page)), np.random.default_rng(number)
        )[2]
        if 'Where is "' in asked.text:
            word = asked.text.split('"', 1)[1].removesuffix('" written?')
            found += word in boxes
            assert boxes.get(word, answer.text) == answer.text
    assert found > 3
