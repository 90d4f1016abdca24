"""Rules over what a detector found on real pages: each with a page that it drops and one that it
keeps; receipts that sum.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from evlm_jax.config import from_config_dict, to_dict
from evlm_jax.data.formats.grounding import box
from evlm_jax.data.image import decode
from evlm_jax.data.ocr.scans import build, open_scans, paint_over
from evlm_jax.data.ocr.twins import Twins, shingles
from evlm_jax.data.samples import SampleError
from evlm_jax.data.sources import open_source
from experiments import base
from tests.data.made import asked

CFG = from_config_dict(base.get_config())
TEXT = "The harbour of the old town at night, seen from the hill"


def rules(**fields):
    return dataclasses.replace(CFG, clean=dataclasses.replace(CFG.clean, **fields))


def write_page(folder, name, *found, size=(200, 120), colours=True):
    """A picture with black boxes where text was found, and its row: (box, text) or (box, text,
    confidence) each.
    """
    picture = Image.new("RGB", size, "white")
    if colours:
        picture.paste((200, 220, 240), (0, 0, size[0], size[1] // 2))
    for entry in found:
        corners = (
            entry[0]
            if len(entry[0]) == 4 and not isinstance(entry[0][0], tuple)
            else (*entry[0][0], *entry[0][2])
        )
        ImageDraw.Draw(picture).rectangle(corners, fill="black" if colours else "white")
    picture.save(folder / f"{name}.png")
    boxes = [dict(zip(("box", "text", "confidence"), entry)) for entry in found]
    return {"id": name, "image": f"{name}.png", "width": size[0], "height": size[1], "boxes": boxes}


def write_rows(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def built(folder, rows, cfg=CFG):
    """The receipt and the rows that were kept."""
    receipt = build(open_scans(str(write_rows(folder, rows))), folder / "out", cfg)
    return receipt, [
        json.loads(line) for line in (folder / "out" / "pages.jsonl").read_text().splitlines()
    ]


AT, BELOW = (10, 10, 150, 30), (10, 60, 150, 80)


def test_every_rule_and_a_receipt_that_sums(tmp_path):
    pytest.importorskip("cv2")

    def write(*args, **more):
        return write_page(tmp_path, *args, **more)

    rows = [
        write("good", (AT, TEXT, 0.99)),
        write("little", (AT, "only nineteen chars", 0.99)),  # 17 that are no space
        write("enough", (AT, "twenty characters and more", 0.8)),
        write("unsure", (AT, TEXT, 0.79), (BELOW, "Exit", 0.9)),
        write("twin", (AT, TEXT.upper() + "!", 0.99)),
        write("faint", (AT, "Another text, long enough to be kept", 0.9), (BELOW, "smudge", 0.3)),
        write("plain", (AT, "White on white, which nobody can read", 0.99), colours=False),
        write("long", (AT, "A long and narrow picture of a page", 0.99), size=(700, 100)),
        write("tiny", (AT, "A picture that is far too small to read", 0.99), size=(160, 60)),
        write("broken", (AT, "A picture that is broken in the middle", 0.99)),
        {"id": "no boxes", "image": "good.png", "width": 200, "height": 120},
    ]
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:60])
    receipt, kept = built(tmp_path, rows)
    assert [row["id"] for row in kept] == ["good", "enough", "faint"]
    assert receipt.dropped["page"] == {
        "page_characters": 2,
        "page_similarity": 1,
        "single colour": 1,
        "aspect": 1,
        "side": 1,
        "damaged": 1,
    }
    assert receipt.dropped["box"] == {
        "of a dropped page": 8,
        "page_confidence": 1,
    } and receipt.dropped["row"] == {"bad row": 1}
    for unit, seen in (("page", 10), ("box", 12), ("row", 1)):
        assert receipt.seen[unit] == seen == receipt.kept[unit] + receipt.dropped[unit].total()
    assert "page_similarity: 1 dropped, the first" in str(receipt) and receipt.examples[
        "page_similarity"
    ].endswith("/twin")


def test_thresholds_come_from_the_config(tmp_path):
    page = write_page(tmp_path, "a", (AT, "Exit", 0.5))
    for cfg, count in (
        (CFG, 0),
        (rules(page_characters=4, page_confidence=0.5), 1),
        (rules(page_characters=5, page_confidence=0.5), 0),
    ):
        assert len(built(tmp_path, [page], cfg)[1]) == count
    twins = [write_page(tmp_path, name, (AT, TEXT)) for name in "bc"]
    assert (
        len(built(tmp_path, twins)[1]) == 1
        and len(built(tmp_path, twins, rules(page_similarity=1.01))[1]) == 2
    )
    with pytest.raises(ValueError, match="config: clean.page_similarity must be above 0, got 0.0"):
        from_config_dict(to_dict(rules(page_similarity=0.0)))


def test_illegible_text_is_painted_over_and_nothing_else(tmp_path):
    pytest.importorskip("cv2")
    slanted = ((10, 60), (150, 60), (150, 80), (10, 80))
    _, (row,) = built(
        tmp_path, [write_page(tmp_path, "a", (AT, TEXT, 0.9), (slanted, "smudge", 0.3))]
    )
    before, after = (
        np.asarray(decode(str(path))).astype(int)
        for path in (tmp_path / "a.png", tmp_path / "out" / row["image"])
    )
    changed = (before != after).any(-1)
    near = np.zeros_like(changed)
    near[56:85, 6:155] = True
    assert (
        not (changed & ~near).any()
        and (after[60:81, 10:151] > 150).all()
        and (before[61:80, 11:150] == 0).all()
    )
    assert [entry["text"] for entry in row["boxes"]] == [TEXT]


def test_a_page_without_illegible_text_stays_where_it_is(tmp_path):
    _, (row,) = built(tmp_path, [write_page(tmp_path, "a", (AT, TEXT, 0.9))])
    assert row["image"] == "0.png" and (tmp_path / "out/0.png").readlink() == tmp_path / "a.png"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "pages.jsonl"]


def test_painting_over_fills_in_the_surroundings():
    pytest.importorskip("cv2")
    picture = Image.new("RGB", (60, 40), (90, 120, 200))
    ImageDraw.Draw(picture).rectangle(
        (18, 8, 42, 32), fill="black"
    )  # two pixels larger than its box
    out = np.asarray(
        paint_over(
            picture,
            [np.array([(20 / 60, 0.25), (40 / 60, 0.25), (40 / 60, 0.75), (20 / 60, 0.75)])],
        )
    )
    assert (np.abs(out.astype(int) - (90, 120, 200)) <= 4).all()


def test_samples_of_what_was_found(tmp_path):
    rows = [
        write_page(
            tmp_path,
            "a",
            (AT, "Open  daily", 0.9),
            (((10, 60), (150, 62), (150, 80), (10, 79)), "9 <image> 5", 0.9),
        )
    ]
    name = f"detected:{write_rows(tmp_path, rows)}"
    sample = open_source(name)[0]
    assert (sample.key, sample.source, sample.refs[0].path) == ("a", name, str(tmp_path / "a.png"))
    first, second = (
        box((10 / 200, 10 / 120, 150 / 200, 30 / 120)),
        box((10 / 200, 60 / 120, 150 / 200, 80 / 120)),
    )
    said = [[turn.text for turn in dialog] for dialog in sample.dialogs]
    assert said[0] == ["<image>Read the text in this image.", "Open daily\n9 < image> 5"]
    assert said[1] in (
        [f"<image>What is written at {first}?", "Open daily"],
        [f"<image>What is written at {second}?", "9 < image> 5"],
    )
    assert said[2] in (
        ['<image>Where is "Open daily" written?', first],
        ['<image>Where is "9 < image> 5" written?', second],
    )
    assert said[3] == ["<image>How many lines of text are there?", "2"]
    chinese = open_source(f"{name}?language=zh")
    assert chinese[0].dialogs[0][
        0
    ].text == "<image>读出图中的文字。" and chinese.dialog_counts() == [4]
    assert asked(*said) == [[("user", q), ("assistant", a)] for q, a in said]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": []}, "there is no text in `boxes`"),
        ({"boxes": [{"box": [1, 2, 3], "text": "x"}]}, "a box must be x1, y1, x2, y2 or four"),
        ({"boxes": [{"box": None, "text": "x"}]}, "'box' must be a list, it is null"),
        ({"boxes": [{"box": [0, 0, 9, float("nan")], "text": "x"}]}, "'box' must be a finite num"),
        (
            {"boxes": [{"box": AT, "text": "x", "confidence": None}]},
            "'confidence' must be a finite number, it is 'None'",
        ),
        ({"boxes": [{"box": [0, 0, 900, 10], "text": "x"}]}, "not within the picture"),
        ({"width": None}, "'width' must be a finite number, it is 'None'"),
        ({"height": 0}, "'width' and 'height' must be above 0, they are 200, 0"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    name = f"detected:{write_rows(tmp_path, [write_page(tmp_path, 'a', (AT, TEXT)) | change])}"
    with pytest.raises(SampleError, match=message):
        open_source(name)[0]
    with pytest.raises(ValueError, match="language must be one of en, zh, not 'fr'"):
        open_source(f"{name}?language=fr")


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 120))
def test_twins_are_what_has_so_many_shingles_in_common(seed, changes):
    """Against the sets themselves; within three standard errors of the estimate both answers are
    right.
    """
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("abcdefghijklmnop"), 400)
    other = letters.copy()
    other[rng.integers(0, 400, changes)] = "z"
    one, two = "".join(letters), "".join(other)
    twins, similarity = Twins(0.7), jaccard(one, two)
    assert not twins.seen(one)
    if abs(similarity - 0.7) > 0.18:
        assert twins.seen(two) == (similarity > 0.7)


def test_twins_among_many():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 200)) for _ in range(200)]
    twins = Twins(0.8)
    assert not any(map(twins.seen, texts)) and all(map(twins.seen, texts))
    assert max(jaccard(a, b) for a, b in itertools.combinations(texts[:30], 2)) < 0.5
    assert twins.seen(texts[7].upper() + " !") and not twins.seen("")
