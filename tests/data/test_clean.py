"""Every rule with texts and pictures that it keeps and drops; receipts that sum; relevance from
data and from a scorer.
"""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from evlm_jax.config import from_config_dict
from evlm_jax.data.clean import Captions, Documents, clean, picture_rule, simplify, text_rule
from evlm_jax.data.samples import ImageRef, Sample, Turn, question
from evlm_jax.data.sources import open_source
from experiments import base
from tests.data.made import write_jsonl
from tests.data.test_images import write_video
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config

CFG = from_config_dict(base.get_config())
RULES = CFG.clean


def rules(**fields):
    """The whole configuration with other thresholds."""
    return dataclasses.replace(CFG, clean=dataclasses.replace(RULES, **fields))


FREE = rules(similarity=0.0, web_similarity=0.0)  # of relevance

TEXTS = {  # rule: (dropped, kept)
    "letters": (
        ["12 / 34 - 56", "★★★ !!!", "", "   ", "--- a ---------- --"],
        ["Room 101 of the hotel", "一只猫在桌子上", "Кошка сидит на столе"],
    ),
    "digits": (
        ["Call 020123456789 for a red sofa", "产品编号12345678的红色沙发"],
        ["A sofa of 1234567 stitches", "Boeing 747 on the ground"],
    ),
    "duplicates": (
        ["sale sale sale sale now", "buy shoes cheap shoes buy cheap shoes", "好好好好好看"],
        ["a man in a hat and a dog", "bye bye little bird"],
    ),
    "links": (
        [
            "See https://a.b for a red sofa",
            "A red sofa from SOFAS.COM today",
            "a photo named img_1.JPG here",
            "www.sofas shows a red sofa",
        ],
        ["A sofa. Common and red", "The network of rivers from space"],
    ),
    "dates": (
        [
            "Harbour at night, 2019-03-04",
            "Harbour, May 4th, 2019, at night",
            "4 May 2019 at the harbour",
            "Seen on 4/5/19 at sea",
            "2019年5月的港口夜景",
            "港口5月4日夜景",
        ],
        [
            "The harbour in 2019 at night",
            "A ratio of 3/4 of milk",
            "May I have 4 apples",
            "第五代火箭发射升空",
        ],
    ),
    "words": (["red sofa", "红沙", "sofa"], ["the red sofa", "红沙发", "a cat 猫"]),
}


@pytest.mark.parametrize("rule", TEXTS)
def test_rules_of_the_text(rule):
    dropped, kept = TEXTS[rule]
    assert {text: text_rule(text, RULES) for text in dropped} == dict.fromkeys(dropped, rule)
    assert {text: text_rule(text, RULES) for text in kept} == dict.fromkeys(kept, "")


THRESHOLDS = {  # field: a text at its threshold, and the value that drops it
    "letters": ("a 1234 b 5678 c 9", 0.25),
    "digits": ("the number 1234567 here", 6),
    "duplicates": ("a dog and a cat", 0.2),
    "links": ("see the gopher:x here", (r"gopher:",)),
    "dates": ("the third of May here", (r"of may",)),
    "words": ("three small words", 4),
}


@pytest.mark.parametrize("field", THRESHOLDS)
def test_every_rule_of_the_text_has_its_threshold(field):
    text, value = THRESHOLDS[field]
    easy = dataclasses.replace(RULES, letters=0.24)
    assert (
        text_rule(text, easy) == ""
        and text_rule(text, dataclasses.replace(easy, **{field: value})) == field
    )


def noise(*size):
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    )


def saved(path, picture, cut=None, **options):
    picture.save(path, **options)
    path.write_bytes(path.read_bytes()[:cut])
    return ImageRef(str(path))


def test_rules_of_pictures(tmp_path):
    def rule(ref, **fields):
        return picture_rule((ref,), dataclasses.replace(RULES, **fields))

    good = saved(tmp_path / "good.jpg", noise(190, 64))
    assert rule(good) == ""
    assert (
        rule(good, side=65) == "side"
        and rule(good, aspect=2.9) == "aspect"
        and rule(good, deviation=200.0) == "single colour"
    )
    assert rule(saved(tmp_path / "a.jpg", noise(64, 64), cut=-3000)) == "damaged"
    assert (
        rule(saved(tmp_path / "b.jpg", noise(64, 64), cut=0))
        == rule(ImageRef("none.jpg"))
        == "damaged"
    )
    assert (
        rule(saved(tmp_path / "c.jpg", noise(64, 64), format="PNG")) == ""
    )  # by decoding, not by suffix
    assert (
        rule(saved(tmp_path / "d.jpg", Image.new("RGB", (64, 64), (9, 99, 200)))) == "single colour"
    )
    assert (
        rule(saved(tmp_path / "e.png", Image.new("RGBA", (64, 64), (9, 99, 200, 0))))
        == "single colour"
    )
    assert (
        rule(saved(tmp_path / "f.png", noise(64, 200))) == "aspect"
        and rule(saved(tmp_path / "g.png", noise(63, 100))) == "side"
    )
    dot = Image.new("RGB", (64, 64), "white")
    dot.paste((0, 0, 0), (20, 20, 24, 24))
    assert rule(saved(tmp_path / "h.png", dot)) == ""


def test_a_video_is_one_picture(tmp_path):
    film = write_video(tmp_path / "v.mp4", seconds=2, fps=5, size=64)
    frames = tuple(ImageRef(str(film), t) for t in (0.0, 1.0))
    assert (
        picture_rule(frames, RULES) == "single colour"
        and picture_rule((ImageRef("none.mp4", 0.0),), RULES) == "damaged"
    )


def test_traditional_chinese_is_simplified():
    assert (
        simplify("臺灣的漢字 <image>") == "台湾的汉字 <image>"
        and simplify("简体不变") == "简体不变"
    )
    assert simplify("日本語の漢字") == "日本語の漢字" and simplify("plain") == "plain"


def caption_sample(ref, *texts, scores=(), key="k"):
    return Sample(
        key,
        "made",
        ((ref,),),
        tuple((Turn("assistant", "<image>" + text),) for text in texts),
        scores,
    )


def sums(receipt):
    return all(
        receipt.seen[unit] == receipt.kept[unit] + sum(receipt.dropped.get(unit, {}).values())
        for unit in receipt.seen
    )


def test_captions_are_judged_one_by_one(tmp_path):
    good, bad = (
        saved(tmp_path / "a.png", noise(64, 64)),
        saved(tmp_path / "b.png", noise(64, 64), cut=99),
    )
    samples = [
        caption_sample(good, "A red sofa.", "一隻貓在桌子上", "12345", key="0"),
        caption_sample(bad, "A red sofa.", "www.x", key="1"),
        caption_sample(good, "2019-03-04 here", key="2"),
    ]
    cleaner = Captions(FREE)
    kept = list(clean(samples, cleaner))
    assert [number for number, _ in kept] == [0]
    assert [dialog[0].text for dialog in kept[0][1].dialogs] == [
        "<image>A red sofa.",
        "<image>一只猫在桌子上",
    ]
    receipt = cleaner.receipt
    assert (receipt.seen["caption"], receipt.kept["caption"], receipt.simplified) == (
        6,
        2,
        1,
    ) and sums(receipt)
    assert receipt.dropped["caption"] == {"letters": 1, "damaged": 1, "links": 1, "dates": 1}
    assert "caption: 6 seen, 2 kept" in str(
        receipt
    ) and "damaged: 1 dropped, the first made/1" in str(receipt)
    as_it_is = list(clean(samples, Captions(rules(similarity=0.0, simplify=False))))
    assert as_it_is[0][1].dialogs == samples[0].dialogs[:2]


def test_the_question_of_a_caption_is_not_judged(tmp_path):
    sample = Sample(
        "k",
        "made",
        ((saved(tmp_path / "a.png", noise(64, 64)),),),
        (question("<image>www.x 2019-01-01?", "A red sofa."),),
    )
    assert [kept for _, kept in clean([sample], Captions(FREE))] == [sample]


def test_relevance_of_captions_from_the_data_or_a_scorer(tmp_path):
    good = saved(tmp_path / "a.png", noise(64, 64))
    told = [
        caption_sample(good, "A red sofa.", scores=(score,))
        for score in (0.27, 0.28, 0.9, float("nan"))
    ]
    cleaner = Captions(CFG)
    assert [number for number, _ in clean(told, cleaner)] == [1, 2] and cleaner.receipt.dropped[
        "caption"
    ] == {"similarity": 2}
    asked = []

    def scorer(refs, texts):
        asked.append((refs, texts))
        return np.array([[0.3 if "sofa" in text else 0.1 for text in texts]])

    sample = caption_sample(good, "A red sofa.", "A green tree.", "www.tree")
    ((_, kept),) = clean([sample], Captions(CFG, scorer))
    assert (
        asked == [([good], ["A red sofa.", "A green tree."])] and kept.dialogs == sample.dialogs[:1]
    )
    with pytest.raises(
        ValueError,
        match="made/k has no relevance in the data: give a scorer, or set clean.similarity",
    ):
        list(clean([sample], Captions(CFG)))


def test_relevance_in_the_data_spares_the_decoding(tmp_path):
    sample = caption_sample(ImageRef("none.png"), "A red sofa.", scores=(0.1,))
    cleaner = Captions(CFG)
    assert not list(clean([sample], cleaner)) and cleaner.receipt.dropped["caption"] == {
        "similarity": 1
    }


def page(text, *refs, scores=(), key="k"):
    return Sample(key, "made", tuple((ref,) for ref in refs), ((Turn("assistant", text),),), scores)


def test_bad_rows_are_counted(tmp_path):
    name = write_jsonl(tmp_path / "rows.jsonl", [{"text": "A red sofa."}, {"txt": 1}]).replace(
        "llava", "text"
    )
    cleaner = Documents(FREE)
    assert list(clean(open_source(name), cleaner)) == []
    receipt = cleaner.receipt
    assert receipt.dropped == {"document": {"no picture left": 1}, "row": {"bad row": 1}} and sums(
        receipt
    )
    assert "rows.jsonl: row 2" in str(receipt)
    cleaner = Captions(FREE)
    assert list(clean([page("<image><image>x", *[ImageRef("a")] * 2)], cleaner)) == []
    assert "2 visuals; captions are about one" in cleaner.receipt.examples["bad row"]
    cleaner = Documents(CFG)
    assert list(clean([page("<image>x", ImageRef("a"), scores=(0.3, 0.4))], cleaner)) == []
    assert "2 scores of 1 visuals" in cleaner.receipt.examples["bad row"]
    cleaner = Captions(FREE)
    assert list(
        clean([Sample("mute", "made", ((ImageRef("a"),),), ((),))], cleaner)
    ) == [] and cleaner.receipt.seen == {"row": 1}


def test_bad_thresholds_are_named():
    for field, value in (
        ("letters", 2.0),
        ("duplicates", 0.0),
        ("aspect", 0.5),
        ("side", -1),
        ("links", ("(",)),
    ):
        with pytest.raises(ValueError, match=rf"config: clean.{field}\b"):
            tiny_config(clean={field: value})


@needs_asset("openmoji")
@needs_asset("easy-vqa")
def test_receipt_over_real_pictures_and_junk(tmp_path):
    """Emoji and shapes with made captions, and junk of every kind; every figure is known
    beforehand.
    """
    emoji = list(open_source("emoji-en"))[:150]
    shapes = list(open_source("easy-vqa"))[:100]

    def rename(sample, text):
        return dataclasses.replace(sample, dialogs=((Turn("assistant", "<image>" + text),),))

    good = [rename(s, f"an emoji that shows {s.dialogs[0][1].text}") for s in emoji] + [
        rename(s, "a shape of one colour") for s in shapes
    ]
    expected = {"": sum(not text_rule(s.dialogs[0][0].text[7:], RULES) for s in good)}
    assert 245 <= expected[""] <= 250
    picture = io.BytesIO()
    noise(80, 80).save(picture, "JPEG")
    for i in range(20):
        (tmp_path / f"cut{i}.jpg").write_bytes(picture.getvalue()[: 100 + 10 * i])
    blank = saved(tmp_path / "blank.png", Image.new("L", (80, 80), 7))
    junk = [
        caption_sample(ImageRef(str(tmp_path / f"cut{i}.jpg")), "a red sofa here")
        for i in range(20)
    ]
    junk += (
        [caption_sample(blank, "a red sofa here")] * 7
        + [rename(s, "www.x.com buy") for s in emoji[:11]]
        + [rename(s, "123") for s in emoji[:5]]
    )
    cleaner = Captions(FREE)
    samples = good + junk
    order = np.random.default_rng(0).permutation(len(samples))
    kept = list(clean([samples[i] for i in order], cleaner))
    receipt = cleaner.receipt
    assert (
        receipt.seen["caption"] == len(samples)
        and receipt.kept["caption"] == len(kept) == expected[""]
        and sums(receipt)
    )
    dropped = receipt.dropped["caption"]
    assert (dropped["damaged"], dropped["single colour"], dropped["links"], dropped["letters"]) == (
        20,
        7,
        11,
        5,
    )
