"""Scores of generated text against references: exact match, ROUGE-L, CIDEr-D, BLEU-1..4.

The scorers take sentences as token lists (`words` makes them) and equal pycocoevalcap on the same
tokens. COCO's own tokenizer is a Java program; `words` does what it does to captions (lower case,
no punctuation), except that a contraction is cut at its apostrophe ("don 't", there "do n't") and
that Chinese and Japanese are scored by character.

Everywhere: predictions is a list of N token lists, references a list of N lists of token lists (at
least one each)."""

import math
import re
from collections import Counter

import numpy as np

ORDERS = 4  # longest n-gram of BLEU and CIDEr
CJK = "\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{CJK}]|\d+(?:[.,:]\d+)+|[^\W_{CJK}]+(?:-[^\W_{CJK}]+)*|'[^\W\d_]+")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; "A man's 2-wheeled bike." ->
    ["a", "man", "'s", "2-wheeled", "bike"].
    """
    return WORD.findall(text.lower().replace("\u2019", "'"))


def exact_match(predictions, references) -> list[float]:
    """1.0 where the prediction equals a reference, else 0.0."""
    return [float(any(p == r for r in refs)) for p, refs in _pairs(predictions, references)]


def rouge_l(predictions, references, beta: float = 1.2) -> list[float]:
    """F-score of the longest common subsequence, best precision and best recall over the references
    (COCO's rule).

    With beta = 1 and one reference this is the F1 of the package rouge-score.
    """
    scores = []
    for p, refs in _pairs(predictions, references):
        common = [_lcs(p, r) for r in refs]
        precision = max(common) / max(len(p), 1)
        recall = max(c / max(len(r), 1) for c, r in zip(common, refs))
        found = precision > 0 and recall > 0
        scores.append(
            (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if found else 0.0
        )
    return scores


def bleu(predictions, references) -> list[float]:
    """[BLEU-1, .., BLEU-4] of the corpus, closest reference length, unsmoothed (the tiny terms are
    COCO's).
    """
    right, total, length, reference_length = np.zeros(ORDERS), np.zeros(ORDERS), 0, 0
    for p, refs in _pairs(predictions, references):
        allowed = Counter()
        for r in refs:
            allowed |= _ngrams(r)
        for gram, count in (_ngrams(p) & allowed).items():
            right[len(gram) - 1] += count
        total += [max(0, len(p) - k) for k in range(ORDERS)]
        length += len(p)
        reference_length += min((abs(len(r) - len(p)), len(r)) for r in refs)[1]
    precision = np.cumprod((right + 1e-15) / (total + 1e-9))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(brevity * precision[k] ** (1 / (k + 1))) for k in range(ORDERS)]


def cider(predictions, references, sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each prediction, 0 to 10 (Vedantam et al. 2015); document frequencies from all
    references given.

    The mean is what papers report. One image alone scores 0: every n-gram of its references is in
    every document."""
    frequency = Counter(
        gram
        for _, refs in _pairs(predictions, references)
        for gram in set().union(*map(_ngrams, refs))
    )
    log_documents = math.log(len(references)) if references else 0.0

    def weigh(tokens):
        """tf-idf of every n-gram, the norm for each order, and the length (in bigrams, as COCO
        counts it).
        """
        vector = {
            g: c * (log_documents - math.log(max(1, frequency[g])))
            for g, c in _ngrams(tokens).items()
        }
        square = np.zeros(ORDERS)
        for gram, value in vector.items():
            square[len(gram) - 1] += value**2
        return vector, np.sqrt(square), max(0, len(tokens) - 1)

    scores = []
    for p, refs in _pairs(predictions, references):
        vector, norm, length = weigh(p)
        total = 0.0
        for r in refs:
            other, other_norm, other_length = weigh(r)
            dot = np.zeros(ORDERS)
            for gram, value in vector.items():
                dot[len(gram) - 1] += min(value, other.get(gram, 0.0)) * other.get(gram, 0.0)
            cosine = np.divide(dot, norm * other_norm, out=dot, where=norm * other_norm != 0)
            total += cosine.mean() * math.exp(-((length - other_length) ** 2) / (2 * sigma**2))
        scores.append(float(10 * total / len(refs)))
    return scores


def _pairs(predictions, references):
    """Both lists side by side.

    Raises ValueError when their lengths differ or a prediction has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} lists of references; give one"
            " list each"
        )
    if empty := [i for i, refs in enumerate(references) if not refs]:
        raise ValueError(f"prediction {empty[0]} has no reference; drop it or give one")
    return list(zip(predictions, references))


def _ngrams(tokens) -> Counter:
    """Counts of all n-grams up to ORDERS."""
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1)
    )


def _lcs(a, b) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], last + 1 if x == y else max(row[j + 1], row[j])
    return row[-1]
