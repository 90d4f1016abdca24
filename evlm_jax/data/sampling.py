"""Samples by cluster of their embeddings, so that what is frequent on the web does not crowd out
the rest (paper, section 3.2).
"""

import numpy as np
from scipy.cluster.vq import kmeans2, vq

POINTS = 256  # a cluster, on which centres are fitted
CHUNK = 1 << 16


def cluster(embeddings: np.ndarray, count: int, seed: int, rounds: int = 20) -> np.ndarray:
    """The cluster of each of [n, d] embeddings, int [n] below `count`: k-means on directions,
    fitted on at most 256 points a cluster.

    Embeddings may be a memory-mapped array: they are read in chunks.
    """
    n = len(embeddings)
    if not 1 <= count <= n:
        raise ValueError(f"{count} clusters of {n} embeddings")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(n, min(n, POINTS * count), replace=False))
    centres, _ = kmeans2(_directions(embeddings[chosen]), count, iter=rounds, minit="++", rng=rng)
    parts = [
        vq(_directions(embeddings[first : first + CHUNK]), centres)[0]
        for first in range(0, n, CHUNK)
    ]
    return np.concatenate(parts)


def balanced(clusters: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` numbers, ascending: of every cluster as many, or all where it has fewer; within a
    cluster at random.
    """
    if not 0 <= size <= len(clusters):
        raise ValueError(f"{size} samples of {len(clusters)}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(clusters))
    order = order[np.argsort(clusters[order], kind="stable")]  # by cluster, at random within
    _, starts = np.unique(clusters[order], return_index=True)
    turn = np.arange(len(order)) - np.repeat(
        starts, np.diff([*starts, len(order)])
    )  # the how many-th of its cluster
    by_turn = np.lexsort(
        (rng.random(len(order)), turn)
    )  # first ones, second ones, ...; the last turn is drawn
    return np.sort(order[by_turn[:size]])


def _directions(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.asarray(embeddings, np.float32)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
