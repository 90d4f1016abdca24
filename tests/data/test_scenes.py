"""Scenes: what is said of them against what is counted on their pixels; splits by identity; answers
that cannot be guessed.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from evlm_jax.data.containers.files import Ref
from evlm_jax.data.containers.rows import open_ref
from evlm_jax.data.formats.built import built, row_of
from evlm_jax.data.image import decode
from evlm_jax.data.samples import ImageRef, part
from evlm_jax.data.scenes.compose import COLOURS
from evlm_jax.data.scenes.dialogs import FAMILIES
from evlm_jax.data.scenes.draw import draw
from evlm_jax.data.scenes.material import from_folder
from evlm_jax.data.sources import open_source, scene_of
from evlm_jax.data.tools.inspect import _truth
from evlm_jax.evals.tasks import find
from evlm_jax.evals.tasks import scenes as scenes_task
from tests.helpers.scenes import digest, needs_scenes

PAINT = {
    "blob": (255, 0, 255),
    "brick": (0, 255, 255),
    "kite": (255, 0, 128),
    "pond": (0, 128, 255),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Cut-outs of one flat colour for each name, on grey grounds, so that they can be counted."""
    root = tmp_path_factory.mktemp("scenes")
    for name, colour in PAINT.items():
        (root / "objects" / name).mkdir(parents=True)
        for i in range(5):
            image = Image.new("RGBA", (150, 90 + 15 * i))
            ImageDraw.Draw(image).ellipse((0, 0, 149, 89 + 15 * i), (*colour, 255))
            image.save(root / "objects" / name / f"{i}.png")
    (root / "grounds").mkdir()
    for i in range(5):
        ramp = np.tile(np.linspace(90 + 10 * i, 150, 200), (200, 1)).astype(np.uint8)
        Image.fromarray(ramp).convert("RGB").save(root / "grounds" / f"{'abcde'[i]}x.png")
    (root / "names.json").write_text('{"blob": {"zh": "团"}, "brick": {"zh": "砖"}}', "utf-8")
    return root


def near(pixels: np.ndarray, colour, most: int = 24) -> np.ndarray:
    return (np.abs(pixels.astype(int) - colour) <= most).all(-1)


def box_of(mask: np.ndarray) -> tuple[int, ...]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def is_close(box, other, most: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(box, other)) <= most


def blobs(pixels: np.ndarray, colour) -> list[np.ndarray]:
    """Masks of the connected pixels of a colour, without specks at borders of other things."""
    parts, count = ndimage.label(near(pixels, colour))
    return [mask for i in range(count) if (mask := parts == i + 1).sum() > 30]


def middle(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(0)[::-1]


def side_of(disc: np.ndarray, other: np.ndarray) -> str:
    (dx, dy) = disc - other
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def asked(sample) -> dict[str, tuple[str, str]]:
    """Question without its mark, and answer, of the last dialog of each label."""
    return {
        label: (dialog[0].text.removeprefix("<image>"), dialog[-1].text)
        for label, dialog in zip(sample.labels, sample.dialogs)
    }


@pytest.mark.parametrize("size, scenes", [(112, 80), (224, 40)])
def test_what_is_said_is_what_is_on_the_pixels(folder, size, scenes):
    """Objects are counted as connected pixels of their colour in the picture alone; sides and sizes
    are of those pixels.
    """
    source = open_source(f"scenes:{folder}?split=test&scenes={scenes}&size={size}")
    checked = Counter()
    for sample in source:
        picture = Image.open(open_ref(sample.refs[0].path))
        assert picture.size == (size, size)
        pixels, said = np.asarray(picture), asked(sample)
        scene = source.scenes.scene(int(sample.key))
        found = {}
        for name, colour in PAINT.items():
            found |= {(name, i): mask for i, mask in enumerate(blobs(pixels, colour))}
        names = Counter(name for name, _ in found)
        assert names == Counter(thing.what for thing in scene.objects)
        for (name, _), mask in found.items():
            assert any(
                is_close(box_of(mask), thing.box) for thing in scene.objects if thing.what == name
            )
        if "name" in said:
            assert set(names) == {said["name"][1]}
        if "count" in said:
            assert sum(names.values()) == 1 + "one two three four five six".split().index(
                said["count"][1]
            )
        disc = near(pixels, COLOURS[scene.disc.what], 8)
        if scene.disc.what not in ("black", "white", "blue") and "object" in said["where/place"][0]:
            assert (
                side_of(middle(disc), middle(next(iter(found.values()))))
                == (said["where/place"][1])
            )
            checked["side"] += 1
        if "where/which" in said:
            key = WHICH[said["where/which"][0]]
            if "nearest" not in said["where/which"][0]:
                assert key(found) == said["where/which"][1]
                checked["which"] += 1
    assert checked["side"] and checked["which"]


def best(by):
    return lambda found: max(found, key=lambda name: by(found[name]))[0]


WHICH = {
    "What is larger?": best(lambda mask: mask.sum()),
    "What is smaller?": best(lambda mask: -mask.sum()),
    "What is on the left?": best(lambda mask: -middle(mask)[0]),
    "What is on the right?": best(lambda mask: middle(mask)[0]),
    "What is at the top?": best(lambda mask: -middle(mask)[1]),
    "What is at the bottom?": best(lambda mask: middle(mask)[1]),
    "What is nearest to the disc?": None,
}


def test_discs_and_texts_are_where_they_are_said_to_be(folder):
    """The pixels that change when one of them is left out; nothing leaves the picture or touches
    another thing.
    """
    source = open_source(f"scenes:{folder}?split=train&scenes=60")
    for number in range(60):
        scene = source.scenes.scene(number)
        whole = np.asarray(draw(scene)).astype(int)
        for text in scene.texts:
            others = tuple(other for other in scene.texts if other is not text)
            changed = (np.asarray(draw(replace(scene, texts=others))) != whole).any(-1)
            assert is_close(box_of(changed), text.box, 1), (number, text)
            place = scene.reference is text and side_of(
                np.array(scene.disc.centre), middle(changed)
            )
            assert place in (False, scene.side), (number, text)
        for i, thing in enumerate(scene.things):
            left, top, right, bottom = thing.box
            assert 0 < left < right < 112 and 0 < top < bottom < 112
            for other in scene.things[:i]:
                assert not (
                    left < other.box[2] and other.box[0] < right
                    and top < other.box[3] and other.box[1] < bottom
                )  # fmt: skip


def test_boxes_are_those_of_the_pixels(folder):
    source = open_source(f"scenes:{folder}?split=test&scenes=20&ask=box")
    for sample in source:
        pixels = np.asarray(Image.open(open_ref(sample.refs[0].path)))
        for question, answer in sample.dialogs:
            name = question.text.removeprefix("<image>Locate: ")
            boxes = re.findall(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>", answer.text)
            assert answer.text.startswith(f"<ref>{name}</ref><box>")
            if name in PAINT:
                found = [box_of(mask) for mask in blobs(pixels, PAINT[name])]
                assert len(found) == len(boxes)
                for each in boxes:
                    said = [int(value) * 112 / 1000 for value in each]
                    assert any(is_close(said, box) for box in found)


def test_nothing_is_shared_between_splits(folder):
    made = {split: from_folder(folder, split) for split in ("train", "validation", "test")}
    for what in ("grounds", "fonts"):
        found = [set(getattr(material, what)) for material in made.values()]
        assert all(found) and not (found[0] & found[1] | found[0] & found[2] | found[1] & found[2])
    for name in PAINT:
        found = [set(material.drawings[name]) for material in made.values()]
        assert [len(some) for some in found] == [3, 1, 1]
        assert len(set.union(*found)) == 5
    known = from_folder(folder, "known")
    assert known.drawings == made["train"].drawings and known.grounds == made["test"].grounds


def guessed(where: str, train: int, test: int, errors: float) -> None:
    """Neither the most common answer of a kind of question, nor that of its very words (as scenes
    for training have them), is right more often than chance by three points and so many standard
    errors.
    """
    learned = open_source(f"scenes:{where}?split=train&scenes={train}").scenes
    learned = replace(learned, speaker=replace(learned.speaker, plain=True))
    source = open_source(f"scenes:{where}?split=test&scenes={test}")
    of_words, of_label = defaultdict(Counter), defaultdict(Counter)
    for number in range(train):
        for dialog in learned.sample(number).dialogs:
            of_words[dialog[0].text][dialog[1].text] += 1
    right = Counter()
    for sample in source:
        for label, dialog in zip(sample.labels, sample.dialogs):
            of_label[label][dialog[1].text] += 1
            right[label] += of_words[dialog[0].text].most_common(1)[0][0] == dialog[1].text
    assert {label.partition("/")[0] for label in of_label} == set(FAMILIES)
    for label, answers in of_label.items():
        possible = source.scenes.speaker.answers(label)
        count = answers.total()
        assert set(answers) == set(possible), label
        chance = 1 / len(possible)
        most = chance + 0.03 + errors * (chance * (1 - chance) / count) ** 0.5
        assert answers.most_common(1)[0][1] / count < most, label
        assert right[label] / count < most, label


def test_answers_cannot_be_guessed(folder):
    guessed(folder, 1000, 1000, errors=2)


@needs_scenes
def test_answers_about_shipped_scenes_cannot_be_guessed():
    guessed("assets", 2000, 2000, errors=0)


def test_both_languages_show_the_same_pictures(folder):
    (folder / "zh").mkdir(exist_ok=True)
    for name in ("blob", "brick"):
        (folder / "zh" / "objects").mkdir(exist_ok=True)
        link = folder / "zh" / "objects" / name
        link.exists() or link.symlink_to(folder / "objects" / name)
    for name in ("grounds", "names.json"):
        link = folder / "zh" / name
        link.exists() or link.symlink_to(folder / name)
    english, chinese = (
        open_source(f"scenes:{folder}/zh?split=test&language={language}&ask=name,caption,where")
        for language in ("en", "zh")
    )
    for number in range(5):
        assert english[number].refs == chinese[number].refs
        assert english[number].labels == chinese[number].labels
    words = {asked(chinese[number])["caption"][1] for number in range(20)}
    assert all(re.search("[团砖].*[色]的圆.*(数字|单词)", text) for text in words)


def test_labels_follow_their_dialogs(folder):
    sample = open_source(f"scenes:{folder}?split=test")[0]
    halves = [part(sample, i, 2, (0,)) for i in range(-(-len(sample.dialogs) // 2))]
    pairs = [pair for half in halves for pair in zip(half.dialogs, half.labels, strict=True)]
    assert sorted(pairs, key=str) == sorted(zip(sample.dialogs, sample.labels), key=str)
    row = row_of(sample, [("bmp", b"")])
    again = built("built", "", row | {"0.bmp": Ref("range://0+0/0.bmp::x")})
    assert (again.dialogs, again.labels) == (sample.dialogs, sample.labels)


def test_questions_have_their_possible_answers_and_scores_their_families(folder):
    asked_of = scenes_task.read(None, "test", "", f"scenes:{folder}?split={{}}&scenes=30", True)
    assert all(q.answer in q.candidates for q in asked_of)
    rows = [
        {"prediction": q.answer.upper(), "answer": q.answer, "loss": 1.0} | q.facts
        for q in asked_of
    ]
    for row in rows:
        if row["label"] == "text/word":
            row |= {"prediction": "?", "loss": 3.0}
    each, whole = scenes_task.score(rows)
    known = {name: np.mean([v for v in of if v is not None]) for name, of in each.items()}
    text = [row["label"] == "text/digit" for row in rows if row["label"].startswith("text")]
    assert known["accuracy, name"] == known["accuracy, text/digit"] == 100
    assert known["accuracy, text/word"] == 0 and known["loss, text/word"] == 3
    assert known["accuracy, text"] == pytest.approx(100 * np.mean(text))
    assert whole["accuracy, mean of families"] == pytest.approx(80 + 20 * np.mean(text))
    assert whole["loss, mean of families"] == pytest.approx((4 + known["loss, text"]) / 5)


def test_inspect_shows_the_truth_of_a_scene_and_of_no_other_picture(folder):
    sample = open_source(f"scenes:{folder}?split=test&scenes=5")[3]
    scene = scene_of(sample.refs[0])
    shown = _truth(sample.refs[0])
    boxes = [
        [left, top, right - left, bottom - top]
        for left, top, right, bottom in (thing.box for thing in scene.things)
    ]
    np.testing.assert_allclose([box for _, box in shown], np.multiply(boxes, 100 / 112))
    texts = [text for text, _ in shown]
    assert f"object {scene.objects[0].what}" in texts and any(scene.side in t for t in texts)
    assert _truth(ImageRef("a.png")) == _truth(ImageRef("page://3::ocr-en:emoji-en")) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ("split=rest", "split has 'rest'; there are train, validation, test, known, style, all"),
        ("ask=name,size", "ask has 'size'; there are name, count,"),
        ("size=20", "option size must be a whole number of at least 56, not '20'"),
        ("split=style", "split style is of the shipped drawings alone"),
        ("language=zh", "names.json has no zh of 'kite'"),
        ("colour=red", "has the unknown option 'colour'"),
        ("frames=4", "with frames ask has 'name'; there are colour, text"),
        ("bare=1", "with bare ask has 'colour'; there are name, count"),
        (
            "ask=colour&frames=2fps",
            "option frames must be a whole number of at least 1, not '2fps'",
        ),
    ],
)
def test_what_is_not_understood_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"scenes:{folder}?{options}")


def test_a_clip_shows_its_scene_in_one_frame_and_no_disc_or_text_in_others(folder):
    name = f"scenes:{folder}?split=test&scenes=16&ask=colour,text"
    alone, clips = open_source(name), open_source(f"{name}&frames=24")
    for number in range(16):
        sample, (own,) = clips[number], alone[number].refs
        ((at,),) = np.nonzero([ref == own for ref in sample.refs])
        assert len(sample.visuals) == 1 and len(sample.refs) == 24 and at * 8 // 24 == number % 8
        assert sample.dialogs == alone[number].dialogs
        assert sample.labels[0] == f"colour/part {number % 8 + 1} of 8"
    scene, whole = scene_of(own), decode(own.path)
    bare = decode(f"scene://15::scenes:{folder}?split=test&bare=1&ask=name")
    differs = (np.asarray(whole) != np.asarray(bare)).any(-1)
    for thing in (scene.disc, *scene.texts):
        left, top, right, bottom = thing.box
        assert differs[top:bottom, left:right].mean() > 0.1
        differs[top:bottom, left:right] = False
    assert not differs.any()
    assert all("bare=1" in ref.path and scene_of(ref) is None for ref in sample.refs if ref != own)


def test_needles_are_asked_with_frames_and_blind(folder, monkeypatch):
    source = f"scenes:{folder}?split=test&scenes=8&ask=colour,text&frames={{}}"
    monkeypatch.setattr(scenes_task, "NEEDLE", source)
    seen, blind = (find("needle").questions(None, split) for split in ("4", "blind"))
    assert {len(frames) for asked in seen for frames in asked.visuals} == {4}
    assert [asked.visuals for asked in blind] == [()] * len(seen)
    assert [(a.text, a.answer, a.facts) for a in seen] == [
        (a.text, a.answer, a.facts) for a in blind
    ]


def test_too_few_pictures_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="0 folders of cut-outs, scenes need two names"):
        open_source(f"scenes:{tmp_path}")
    for name in ("a", "b"):
        (tmp_path / "objects" / name).mkdir(parents=True)
        Image.new("RGBA", (9, 9), "red").save(tmp_path / "objects" / name / "0.png")
    with pytest.raises(
        ValueError, match="objects/a: 1 pictures, 3 are needed: give more, or split=all"
    ):
        open_source(f"scenes:{tmp_path}")
    (tmp_path / "grounds").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "grounds" / "g.png")
    assert len(open_source(f"scenes:{tmp_path}?split=all&scenes=3")) == 3


@pytest.mark.parametrize(
    "facts, message",
    [
        ("[]", "an object of names, not list"),
        ('{"kites": {"zh": "筝"}}', "has 'kites', of which there is no folder"),
        ('{"kite": "筝"}', "'kite' has '筝'; texts are understood of zh, plural, category"),
        ('{"kite": {"plurals": "kites"}}', "'kite' has plurals 'kites'"),
        ('{"kite": {"category": "toy"}}', r"has category 'toy'; .* \(animal, food,"),
    ],
)
def test_names_that_are_not_understood_are_refused(tmp_path, facts, message):
    for name in ("kite", "pond"):
        (tmp_path / "objects" / name).mkdir(parents=True)
    (tmp_path / "names.json").write_text(facts, "utf-8")
    with pytest.raises(ValueError, match=message):
        from_folder(str(tmp_path), "all")


def test_a_scene_depends_on_its_number_alone(folder):
    name = f"scenes:{folder}?split=test"
    there = [digest(name, range(i, i + 1)) for i in range(8)]
    back = [digest(name, range(i, i + 1)) for i in reversed(range(8))]
    assert there == back[::-1] and len(set(there)) == 8
    assert there[0] != digest(f"{name}&seed=1", range(1))
