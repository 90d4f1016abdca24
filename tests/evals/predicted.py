"""Predictions, awkward ones included, and answers to compare them with."""

import importlib
import random

import pytest

NEED = "needs lmms-eval: pip install -e '.[lmms]' and pip install --no-deps lmms-eval==0.7.3"
COUNT = 600
AWKWARD = [
    "", " ", "Yes.", "yes", "No, it is not.", "not", "12%", "12.0", "0", "0.0", "-3", "1,000",
    "1,,000", "$5.00", "nan", "inf", "五", "红色的猫", "红苹果。", "a cat", "The  Cat\n", "it's",
    "its", "dont", "Couldn'tve", "somebody'd", "ow's'at", "ten", "None", "a.b.c.", "...", "?",
    "U.S.A.", "yes/no", "t-shirt", "\"red\" ", "(B)", "B", "b", "B.", "B. dog", "A: cat",
    "The answer is B.", "The answer is C", "D)", "A B", "A big dog runs", "答案是B", "y", "N.",
    "yesterday", "nothing", "[0.1, 0.2, 0.5, 0.75]", "[0, 0, 1, 1] [1, 1, 2, 2]",
    "[0.5,0.5,0.2,0.1]", "(10,20),(500,600)", "ß", "straße", "I choose A, not B", "C: is it", "E",
    "e.", " A.", "option B) or C)", "A, B, C", "naïve café!", "3 dogs, 2 cats", "one o'clock",
]  # fmt: skip
WORDS = (
    "yes no a the two 2 red cat cats dog 5 5.0 12% it's its dont left, right. unanswerable".split()
)
OPTIONS = {"A": "cat", "B": "dog", "C": "red cat", "D": "it"}


def lmms(module):
    """A module of lmms-eval's tasks."""
    pytest.importorskip("lmms_eval", reason=NEED)
    return importlib.import_module(f"lmms_eval.{module}")


def predictions():
    """COUNT predictions: all awkward ones, alone and joined, and short texts of common words."""
    rng = random.Random(0)
    made = AWKWARD + [
        f"{a}{rng.choice([' ', ', ', '. ', '-'])}{b}"
        for a, b in zip(rng.sample(AWKWARD, len(AWKWARD)), AWKWARD)
    ]
    return made + [
        " ".join(rng.choices(WORDS + AWKWARD, k=rng.randint(1, 4)))
        for _ in range(COUNT - len(made))
    ]


def ten_answers(said):
    """Ten answers a prediction, some of them equal to it, some of them all the same."""
    rng = random.Random(1)

    def bare(text):
        return text.replace(",", "").replace("?", "").replace("'s", " 's").upper()

    drawn = [
        rng.choices([text, bare(text), *rng.choices(said, k=2), *WORDS[:2]], k=10) for text in said
    ]
    return [[group[0]] * 10 if i % 7 == 0 else group for i, group in enumerate(drawn)]


@pytest.fixture(scope="module")
def said():
    return predictions()


@pytest.fixture(scope="module")
def answers(said):
    return ten_answers(said)


def grid_boxes(said):
    """Predictions in Qwen-VL's form, good ones, bad ones and `said`, and true boxes from 0 to 1."""
    rng, predictions, truth = random.Random(8), [], []
    for text in said:
        left, top = rng.randint(0, 500), rng.randint(0, 500)
        box = [left, top, left + rng.randint(50, 400), top + rng.randint(50, 400)]
        near = [x + round(rng.gauss(0, 40)) for x in box]
        good = "<ref>it</ref><box>({},{}),({},{})</box>".format(*near)
        predictions.append(
            rng.choice(
                [
                    good,
                    good,
                    good,
                    text,
                    good[:-9],
                    good.replace(",", ", "),
                    good + good,
                    "({},{})".format(*near),
                ]
            )
        )
        truth.append([x / 1000 for x in box])
    return predictions, truth
