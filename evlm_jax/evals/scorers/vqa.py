"""Short answers: VQA accuracy over ten answers, and GQA's exact match.

Functions take N predictions and N targets and return N scores from 0 to 1. Rules, by the harness
that has them:

vqa_accuracy  "official"   the VQA script: normalises, but only where the given answers differ from
                           each other (VQAv2)
              "lmms-eval"  the same, always (VQAv2 there)
              "evalai"     the EvalAI processor, always: before that, commas and question marks go
                           and 's stands apart (TextVQA, VizWiz)
gqa           "lmms-eval"  lower case, no ASCII punctuation, on both sides
              "llava"      the prediction in lower case without final periods
"""

import re
import string
from collections.abc import Sequence
from functools import partial

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
OFFICIAL_THOUSANDS, THOUSANDS = re.compile(r"\d,\d"), re.compile(r"\d,+\d")
PERIOD = re.compile(r"\.(?!\d)")
# at most so many are removed: the scripts pass re.UNICODE, which is 32, where the count belongs
PERIODS = 32
DIGITS = {"none": "0"} | {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll
    ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
    shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # fmt: skip
# A word with one apostrophe left out (of several: any one) is mended; "somebody'd" loses its own,
# as in the scripts.
MENDED = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTED
    for i, letter in enumerate(word)
    if letter == "'"
}
MENDED |= {"somebody'd": "somebodyd"}


def vqa_accuracy(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], rule: str
) -> list[float]:
    """Mean over the annotators of min(1, matches among the OTHER annotators / 3). `answers`:
    usually ten of each question.

    Raises ValueError for a question without answers.
    """
    scores = []
    for prediction, given in zip(predictions, answers, strict=True):
        if not given:
            raise ValueError(
                f"prediction {len(scores)} ({prediction!r}) has no answers to compare with"
            )
        clean = {"official": _flat, "lmms-eval": _normal, "evalai": _evalai}[rule]
        if rule == "official" and len({_flat(answer) for answer in given}) > 1:
            clean = partial(_normal, thousands=OFFICIAL_THOUSANDS)
        said = clean(prediction)
        same, count = sum(clean(answer) == said for answer in given), len(given)
        scores.append(
            (same * min(1, (same - 1) / 3) + (count - same) * min(1, same / 3)) / count
            if same
            else 0.0
        )
    return scores


def gqa(predictions: Sequence[str], answers: Sequence[str], rule: str) -> list[float]:
    """1 where the answer is exactly right."""
    if rule == "llava":
        return [
            float(prediction.rstrip(".").lower() == answer)
            for prediction, answer in zip(predictions, answers, strict=True)
        ]
    return exact_match(predictions, answers)


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where both are equal in lower case and without ASCII punctuation (lmms-eval's exact_match
    with both options).
    """

    def bare(text):
        return text.lower().translate(_NO_PUNCTUATION)

    return [
        float(bare(prediction) == bare(answer))
        for prediction, answer in zip(predictions, answers, strict=True)
    ]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normal(text: str, thousands: re.Pattern = THOUSANDS) -> str:
    """Punctuation first, then numbers, articles and contractions."""
    text = out = _flat(text)
    number = thousands.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if number or beside_space else " ")
    words = (DIGITS.get(word, word) for word in PERIOD.sub("", out, count=PERIODS).lower().split())
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def _evalai(text: str) -> str:
    return _normal(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())
