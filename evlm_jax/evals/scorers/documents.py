"""Answers read off documents and charts: ANLS, and accuracy with 5% slack for numbers. N
predictions and targets to N scores.
"""

from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
SLACK = 0.05


def anls(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Normalised Levenshtein similarity to the best of the answers, 0 below the threshold (DocVQA).

    Distances are between strings with case and spaces folded, but lengths are of the original
    strings. Raises ValueError for a question without answers.
    """

    def fold(text):
        return " ".join(text.strip().lower().split())

    scores = []
    for prediction, given in zip(predictions, answers, strict=True):
        if not given:
            raise ValueError(
                f"prediction {len(scores)} ({prediction!r}) has no answers to compare with"
            )
        best = 0.0
        for answer in given:
            length = max(len(answer.upper()), len(prediction.upper()))
            best = max(
                best, 1 - distance(fold(answer), fold(prediction)) / length if length else 1.0
            )
        scores.append(best if best >= ANLS_THRESHOLD else 0.0)
    return scores


def distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def relaxed_accuracy(predictions: Sequence[str], answers: Sequence[str], rule: str) -> list[float]:
    """1 where the number is within 5%, or the text is equal but for case (ChartQA).

    Rules: "lmms-eval", 5% of the answer; "qwen-vl", 5% of the prediction, as Qwen-VL's script calls
    its own function. "12%" is 0.12. A number 0 on the side that is divided by is compared as
    text."""
    scores = []
    for prediction, answer in zip(predictions, answers, strict=True):
        said, true = (prediction, answer) if rule == "lmms-eval" else (answer, prediction)
        number, base = _number(said), _number(true)
        near = (
            abs(number - base) / abs(base) <= SLACK
            if number is not None and base
            else said.lower() == true.lower()
        )
        scores.append(float(near))
    return scores


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
