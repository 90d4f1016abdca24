"""Multiple choice: which letter a prediction means, by the rules of the harnesses, and MMBench's
CircularEval.

"scienceqa"        lmms-eval on ScienceQA: the letter alone, or "X." in front
"scienceqa-llava"  LLaVA's script: the letter alone, "X. ..." in front, or one "The answer is X."
"ai2d"             lmms-eval on AI2D: "X." in front, or a letter and punctuation
"mmbench"          MMBench without a judge: a letter that stands apart, else the one option whose
                   text occurs
"mmbench-static"   lmms-eval's static mode: the same, else the best of its `guess`
"""

import re
import string
from collections.abc import Mapping, Sequence

LETTERS = "ABCDE"
# What may surround a letter that stands apart, in the order in which MMBench tries them.
FRAMES = [
    (a, b)
    for a, ends in (("", ". , : ) )."), ("(", ") )."), (":", " , . ) )."))
    for b in ends.split(" ")
]
GUESSES = {
    7: (),
    6: ("(", ")"),
    5: ("", "."),
    4: ("", ":"),
    3: ("", ")"),
    2: ("", " "),
}  # trust -> what surrounds the letter
PHRASES = (
    "the answer is|answer is|the correct answer is|correct answer is|the best answer is|best answer"
    " is|the correct option is|correct option is|the best option is|best option is|the choice"
    " is|choice is|the correct choice is|correct choice is|i choose|i select|i pick|my answer is|my"
    " choice is|옵션|정답은|답은|답:|答案是|答案为|选|答えは"
).split("|")
ROTATION = 10**6  # MMBench numbers the rotations of question n: n, n + 1e6, n + 2e6, ...


def letter(prediction: str, options: Mapping[str, str], rule: str) -> str:
    """The letter that is meant, or "" for none.

    Args:
      options: letter -> text of the option.
    """
    return RULES[rule](prediction, options)


def circular(right: Sequence[bool], indices: Sequence[int]) -> list[float | None]:
    """CircularEval: at each question's first round 1 where all of its rotations are right, else 0;
    None at the others.

    Raises ValueError for a rotation without its first round.
    """
    whole: dict[int, bool] = {}
    for good, index in zip(right, indices, strict=True):
        whole[index % ROTATION] = whole.get(index % ROTATION, True) and bool(good)
    if lost := set(whole) - set(indices):
        raise ValueError(f"mmbench: question {min(lost)} has rotations but no first round")
    return [float(whole[index]) if index < ROTATION else None for index in indices]


def _scienceqa(prediction: str, options: Mapping[str, str]) -> str:
    text = prediction.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if text[1:2] == "." and text[0].isupper() else ""


def _scienceqa_llava(prediction: str, options: Mapping[str, str]) -> str:
    if prediction in tuple(LETTERS):
        return prediction
    if prediction[:1] in tuple(LETTERS) and prediction[1:3] == ". ":
        return prediction[0]
    said = re.findall(r"The answer is ([A-Z]).", prediction)
    return said[0] if len(said) == 1 else ""


def _ai2d(prediction: str, options: Mapping[str, str]) -> str:
    if first := re.match(r"\s*([A-Z])\.", prediction):
        return first.group(1)
    return prediction.lower().translate(str.maketrans("", "", string.punctuation)).upper()


def _mmbench(prediction: str, options: Mapping[str, str]) -> str:
    words = prediction.split()
    article = "A" in words and len(words) > 3  # "A" may be no letter there
    for before, after in [("", "")] * (not article) + FRAMES:
        standing = [name for name in LETTERS if before + name + after in words]
        if len(standing) == 1:
            return standing[0]
    named = [name for name, text in options.items() if text.lower() in prediction.lower()]
    return named[0] if len(named) == 1 else ""


def _static(prediction: str, options: Mapping[str, str]) -> str:
    return _mmbench(prediction, options) or guess(prediction, sorted(options))


def guess(prediction: str, letters: Sequence[str]) -> str:
    """The letter in the form that is trusted most; of several in one form the last. "" where no
    letter occurs.
    """
    text = prediction.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded, text, found = f" {text} ", text.strip(), []  # found: (trust, place, letter)
    for trust, frame in GUESSES.items():
        if frame:
            forms = {name: name.join(frame) for name in letters}
            found += [
                (trust, padded.rfind(form), name) for name, form in forms.items() if form in padded
            ]
            continue
        for phrase in PHRASES:
            if (start := padded.lower().find(phrase)) >= 0:
                places = ((padded.find(name, start + len(phrase)), name) for name in letters)
                found += [(trust, place, name) for place, name in places if place >= 0]
    found += [
        (10, 0, name) for name in letters if text.startswith(name) and not text[1:2].isalpha()
    ]
    found += [
        (9, len(padded) - 1, name)
        for name in letters
        if text.endswith(name) and not text[-2:-1].isalpha()
    ]
    found = found or [(0, padded.rfind(name), name) for name in letters if name in padded]
    return max(found, key=lambda each: each[:2])[2] if found else ""


RULES = {
    "scienceqa": _scienceqa,
    "scienceqa-llava": _scienceqa_llava,
    "ai2d": _ai2d,
    "mmbench": _mmbench,
    "mmbench-static": _static,
}
