"""How sure a score is: Wilson's interval, standard errors when examples share an image, and
intervals over questions and training seeds.
"""

import functools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

DRAWS = 4000  # of a bootstrap


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion, 95% with the default z.

    (0, 1) without examples.
    """
    if count == 0:
        return 0.0, 1.0
    p, n = successes / count, count
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean when values of one cluster (the questions about an image) are not
    independent.

    The sandwich estimate with the finite-sample factor C / (C - 1) over C clusters; equal to the
    plain standard error (with n - 1) when every value is its own cluster. nan for fewer than two
    clusters."""
    if len(values) != len(clusters):
        raise ValueError(
            f"{len(values)} values for {len(clusters)} clusters; give each value its cluster"
        )
    x = np.asarray(values, np.float64)
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(number)
    if count < 2:
        return math.nan
    sums = np.bincount([number[c] for c in clusters], x - x.mean(), count)
    return float(math.sqrt(count / (count - 1) * np.square(sums).sum()) / len(x))


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired test: are these differences, one a seed, of mean 0? None for
    fewer than two; 1 where all are 0.
    """
    if len(differences) < 2:
        return None
    if not np.ptp(differences):
        return 0.0 if np.any(differences) else 1.0
    from scipy import stats  # a second of every command's start, and few compare runs

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def crossed_interval(
    values: np.ndarray, sizes: Sequence[int], level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean of values [seeds, questions]: seeds and clusters of questions
    are both drawn anew, with replacement.

    A draw is the mean over drawn clusters, moved by how far the mean of drawn seeds is from that of
    all. Few seeds make a plain bootstrap far too narrow: of three, all equal in one of nine draws,
    it leaves the true mean out in a quarter of all cases. So the seeds' part is stretched, by
    sqrt(n / (n - 1)) for the deviation and by Student's quantile over the normal one for its being
    estimated. With one seed the interval is over questions alone (docs/decisions.md, D-EVAL-7).

    Args:
      sizes: questions of each cluster, which are neighbours.
    """
    values = np.asarray(values, np.float64)
    seeds, questions = values.shape
    if sum(sizes) != questions:
        raise ValueError(f"{questions} questions, but clusters of {sum(sizes)}")
    sums = np.add.reduceat(values.mean(0), np.cumsum([0, *sizes[:-1]]))
    weights, of_seed = _multinomial(len(sizes)), values.mean(1)
    draws = (weights @ sums) / (weights @ np.asarray(sizes, np.float64))
    if seeds > 1:
        from scipy import stats

        tail = (1 + level) / 2
        stretch = (
            math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(tail, seeds - 1) / stats.norm.ppf(tail)
        )
        drawn = of_seed[np.random.default_rng(1).integers(seeds, size=(DRAWS, seeds))].mean(1)
        draws = draws + stretch * (drawn - of_seed.mean())
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


@functools.lru_cache(4)
def _multinomial(count: int) -> np.ndarray:
    """How often each of `count` things is drawn, in each of DRAWS draws of `count` with
    replacement.
    """
    return (
        np.random.default_rng(0)
        .multinomial(count, np.full(count, 1 / count), size=DRAWS)
        .astype(np.float64)
    )


def accuracy_table(examples: Iterable[Mapping], types: Mapping[str, Sequence[str]]) -> list[dict]:
    """Accuracy of all examples and by type of the true answer, beside what the most common answer
    of the type would score.

    Args:
      examples: with "image", "answer" and "correct".
    Returns:
      [{"type", "count", "correct", "accuracy", "error": standard error clustered by image or None,
      "interval": Wilson 95%, "majority", "majority_answer"}], "all" first.
    """
    type_of = {answer: kind for kind, answers in types.items() for answer in answers}
    groups: dict[str, list[Mapping]] = {"all": []} | {kind: [] for kind in types}
    for example in examples:
        groups["all"].append(example)
        groups[type_of[example["answer"]]].append(example)
    table = []
    for kind, group in groups.items():
        if not group:
            continue
        right, count = sum(bool(e["correct"]) for e in group), len(group)
        error = clustered_error([float(e["correct"]) for e in group], [e["image"] for e in group])
        (common, times), *_ = Counter(e["answer"] for e in group).most_common(1)
        row = {
            "type": kind,
            "count": count,
            "correct": right,
            "accuracy": right / count,
            "error": None if math.isnan(error) else error,
        }
        table.append(
            row
            | {
                "interval": wilson(right, count),
                "majority": times / count,
                "majority_answer": common,
            }
        )
    return table
