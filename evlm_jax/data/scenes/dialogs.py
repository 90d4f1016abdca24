"""What is asked about a scene, and what is said of it, in English and Chinese.

Five families of questions with open answers, none of them yes or no: `name`, `count`, `colour`,
`text` (a digit or a word), `where` (`place`: on which side the disc is; `which`: the name of the
object that is larger, nearest to the disc, or furthest to one side). Besides, captions and boxes.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from evlm_jax.data.formats.grounding import box
from evlm_jax.data.samples import MARKER, Turn, literal, question
from evlm_jax.data.scenes.compose import CLEAR, COLOURS, SIDES, Scene, Thing
from evlm_jax.data.scenes.material import Material
from evlm_jax.data.scenes.names import CATEGORIES

FAMILIES = ("name", "count", "colour", "text", "where")
ASKED = (*FAMILIES, "caption", "box")
ENDS = ("left", "right", "top", "bottom")  # where one of two is
Dialog = tuple[str, tuple[Turn, ...]]  # its label, `family` or `family/kind`, and its turns


@dataclass(frozen=True)
class Language:
    """Words of a language; of a question the wordings, the first of which is asked in tests."""

    counts: tuple[str, ...]
    colours: dict[str, str]
    sides: dict[str, str]
    kinds: dict[str, str]  # what a disc is beside
    name: tuple[str, ...]
    count: tuple[str, ...]
    colour: tuple[str, ...]
    text: dict[str, tuple[str, ...]]
    place: tuple[str, ...]
    which: dict[str, tuple[str, ...]]
    locate: str
    said: tuple[str, ...]  # captions
    written: dict[str, str]
    disc: str
    joined: str
    last: str


ENGLISH = Language(
    counts=("one", "two", "three", "four", "five", "six"),
    colours={colour: colour for colour in COLOURS},
    sides={side: side for side in SIDES},
    kinds={"object": "object", "digit": "digit", "word": "word"},
    name=("What is shown?", "What can be seen?"),
    count=("How many are there?", "How many are shown?"),
    colour=("What colour is the disc?", "Which colour has the disc?"),
    text={
        "digit": ("What digit is written?", "Which digit can be read?"),
        "word": ("What word is written?", "Which word can be read?"),
    },
    place=("Where is the disc from the {}?", "On which side of the {} is the disc?"),
    which={
        "larger": ("What is larger?", "Which one is larger?"),
        "smaller": ("What is smaller?", "Which one is smaller?"),
        "nearest": ("What is nearest to the disc?", "Which one is nearest to the disc?"),
        "left": ("What is on the left?", "Which one is further left?"),
        "right": ("What is on the right?", "Which one is further right?"),
        "top": ("What is at the top?", "Which one is higher?"),
        "bottom": ("What is at the bottom?", "Which one is lower?"),
    },
    locate="Locate: ",
    said=("{things}, {disc} and {texts}.", "A picture of {things}, with {disc} and {texts}."),
    written={"digit": "the digit {}", "word": "the word {}"},
    disc="{} disc",
    joined=", ",
    last=" and ",
)
CHINESE = Language(
    counts=tuple("一二三四五六"),
    colours=dict(zip(COLOURS, "红色 绿色 蓝色 黄色 白色 黑色 紫色 橙色".split())),
    sides=dict(zip(SIDES, "左边 右边 上边 下边".split())),
    kinds={"object": "物体", "digit": "数字", "word": "单词"},
    name=("图里是什么？", "能看到什么？"),
    count=("有几个？", "一共有几个？"),
    colour=("圆是什么颜色？", "圆的颜色是什么？"),
    text={
        "digit": ("写的是哪个数字？", "数字是几？"),
        "word": ("写的是哪个单词？", "单词是什么？"),
    },
    place=("圆在{}的哪边？", "圆位于{}的哪一边？"),
    which={
        "larger": ("哪个更大？", "更大的是什么？"),
        "smaller": ("哪个更小？", "更小的是什么？"),
        "nearest": ("离圆最近的是什么？", "哪个离圆最近？"),
        "left": ("左边是什么？", "哪个更靠左？"),
        "right": ("右边是什么？", "哪个更靠右？"),
        "top": ("上边是什么？", "哪个更高？"),
        "bottom": ("下边是什么？", "哪个更低？"),
    },
    locate="定位：",
    said=("{things}，{disc}和{texts}。", "图里有{things}，还有{disc}和{texts}。"),
    written={"digit": "数字{}", "word": "单词{}"},
    disc="{}的圆",
    joined="、",
    last="和",
)
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
MEASURES = dict(zip(CATEGORIES, "只个辆个", strict=True))


@dataclass(frozen=True)
class Speaker:
    """Says what is true of scenes, in one language.

    `plain`: every question in its first wording."""

    language: str
    material: Material
    words: tuple[str, ...]
    plain: bool

    @property
    def of(self) -> Language:
        """Its words."""
        return LANGUAGES[self.language]

    def called(self, name: str) -> str:
        """An object's name."""
        return name if self.language == "en" else self.material.names[name].zh

    def _called_disc(self, disc: Thing) -> str:
        return self.of.disc.format(self.of.colours[disc.what])

    def answers(self, label: str) -> list[str]:
        """All answers that a question of this label may have, each as likely as the others."""
        names = [self.called(name) for name in self.material.names]
        return {
            "name": names,
            "count": list(self.of.counts),
            "colour": list(self.of.colours.values()),
            "text/digit": list("0123456789"),
            "text/word": list(self.words),
            "where/place": list(self.of.sides.values()),
            "where/which": names,
        }[label]

    def dialogs(self, scene: Scene, asked: tuple[str, ...], rng: random.Random) -> list[Dialog]:
        """Every dialog of the families `asked`, which are of ASKED; without the picture's mark."""
        made: list[Dialog] = []
        for family in asked:
            made += self._asks()[family](scene, rng)
        return made

    def _asks(self) -> dict[str, Callable[[Scene, random.Random], list[Dialog]]]:
        return {
            "name": self._name,
            "count": self._count,
            "colour": self._colour,
            "text": self._text,
            "where": self._where,
            "caption": self._caption,
            "box": self._boxes,
        }

    def _one(self, label: str, wordings: tuple[str, ...], answer: str, rng) -> Dialog:
        text = wordings[0] if self.plain else rng.choice(wordings)
        return label, question(MARKER + text, literal(answer))

    def _name(self, scene: Scene, rng) -> list[Dialog]:
        if scene.kind == "pair":  # there, `which` asks for both
            return []
        return [self._one("name", self.of.name, self.called(scene.objects[0].what), rng)]

    def _count(self, scene: Scene, rng) -> list[Dialog]:
        if scene.kind != "group":  # of the others the size says it
            return []
        return [self._one("count", self.of.count, self.of.counts[len(scene.objects) - 1], rng)]

    def _colour(self, scene: Scene, rng) -> list[Dialog]:
        return [self._one("colour", self.of.colour, self.of.colours[scene.disc.what], rng)]

    def _text(self, scene: Scene, rng) -> list[Dialog]:
        return [
            self._one(f"text/{text.kind}", self.of.text[text.kind], text.what, rng)
            for text in scene.texts
        ]

    def _where(self, scene: Scene, rng) -> list[Dialog]:
        beside = self.of.kinds[scene.reference.kind]
        place = tuple(wording.format(beside) for wording in self.of.place)
        made = [self._one("where/place", place, self.of.sides[scene.side], rng)]
        if scene.kind == "pair":
            found = relations(scene)
            sizes, places = list(found)[:2], list(found)[2:]
            for relation in (rng.choice(sizes), *rng.sample(places, min(1, len(places)))):
                answer = self.called(found[relation].what)
                made.append(self._one("where/which", self.of.which[relation], answer, rng))
        return made

    def _things(self, scene: Scene) -> str:
        """All objects in words: "three cats", "a cat and a dog"."""
        if scene.kind == "pair":
            return self.of.last.join(self._some(thing.what, 1) for thing in scene.objects)
        return self._some(scene.objects[0].what, len(scene.objects))

    def _some(self, name: str, count: int) -> str:
        if self.language == "zh":
            number = "两" if count == 2 else self.of.counts[count - 1]
            return f"{number}{MEASURES[self.material.names[name].category]}{self.called(name)}"
        if count > 1:
            return f"{self.of.counts[count - 1]} {plural(name, self.material.names[name].plural)}"
        return name if plural(name, self.material.names[name].plural) == name else article(name)

    def _caption(self, scene: Scene, rng) -> list[Dialog]:
        texts = self.of.last.join(
            self.of.written[text.kind].format(text.what) for text in scene.texts
        )
        disc = self._called_disc(scene.disc)
        disc = article(disc) if self.language == "en" else f"一个{disc}"
        said = self.of.said[0] if self.plain else rng.choice(self.of.said)
        text = said.format(things=self._things(scene), disc=disc, texts=texts)
        return [("caption", (Turn("assistant", MARKER + literal(text[:1].upper() + text[1:])),))]

    def _boxes(self, scene: Scene, rng) -> list[Dialog]:
        """One question for each name, and one for the disc."""
        wanted: dict[str, list[Thing]] = {}
        for thing in (*scene.objects, scene.disc):
            called = self.called(thing.what) if thing.drawing else self._called_disc(thing)
            wanted.setdefault(called, []).append(thing)
        made = []
        for called, things in wanted.items():
            found = sorted(thing.box for thing in things)
            boxes = "".join(box([side / scene.size for side in each]) for each in found)
            answer = f"<ref>{literal(called)}</ref>{boxes}"
            made.append(("box", question(f"{MARKER}{self.of.locate}{literal(called)}", answer)))
        return made


def relations(scene: Scene) -> dict[str, Thing]:
    """Which of two objects is larger and smaller; and, where it is clear, which is nearest to the
    disc, on the left, right, at the top, at the bottom.
    """
    first, second = scene.objects
    larger, smaller = sorted(scene.objects, key=lambda thing: -_long(thing))
    found = {"larger": larger, "smaller": smaller}
    near, far = sorted(scene.objects, key=lambda thing: _distance(thing, scene.disc))
    if _distance(far, scene.disc) >= CLEAR * _distance(near, scene.disc):
        found["nearest"] = near
    for axis, ends in ((0, ENDS[:2]), (1, ENDS[2:])):
        low, high = sorted((first, second), key=lambda thing: thing.centre[axis])
        if low.box[axis + 2] <= high.box[axis]:
            found |= {ends[0]: low, ends[1]: high}
    return found


def _long(thing: Thing) -> int:
    left, top, right, bottom = thing.box
    return max(right - left, bottom - top)


def _distance(a: Thing, b: Thing) -> float:
    return math.dist(a.centre, b.centre)


def article(name: str) -> str:
    """A cat, an owl."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def plural(name: str, given: str = "") -> str:
    """More than one, by the rules of English; `given` where they do not hold."""
    if given:
        return given
    small = name.lower()
    if small.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if small.endswith("y") and small[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"
