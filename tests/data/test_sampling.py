"""Clusters and balanced draws."""

import numpy as np
import pytest

from evlm_jax.data.sampling import balanced, cluster
from evlm_jax.data.sources import open_source
from tests.data.made import write_jsonl


def test_clusters_are_found_by_direction():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 3000)
    centres = np.linalg.qr(rng.standard_normal((16, 16)))[0][:5]
    embeddings = (centres[truth] + 0.05 * rng.standard_normal((3000, 16))) * rng.uniform(
        0.1, 9, (3000, 1)
    )
    found = cluster(embeddings.astype(np.float16), 5, seed=0)
    assert len({(a, b) for a, b in zip(truth, found, strict=True)}) == 5  # the same partition
    np.testing.assert_array_equal(found, cluster(embeddings.astype(np.float16), 5, seed=0))
    with pytest.raises(ValueError, match="4 clusters of 3"):
        cluster(embeddings[:3], 4, seed=0)


@pytest.mark.parametrize("size", [0, 1, 7, 40, 150, 1110])
def test_every_cluster_gives_the_same_or_all_it_has(size):
    clusters = np.random.default_rng(1).permutation(np.repeat([7, 3, 5], [10, 100, 1000]))
    found = balanced(clusters, size, seed=0)
    assert len(set(found.tolist())) == size and (np.diff(found) > 0).all()
    counts = np.array([(clusters[found] == c).sum() for c in (7, 3, 5)])
    level = counts.max(initial=0)
    assert all(
        count >= level - 1 or count == whole
        for count, whole in zip(counts, (10, 100, 1000), strict=True)
    )


def test_draws_differ_by_seed_and_reach_everything():
    clusters = np.repeat([0, 1], [30, 10])
    draws = [balanced(clusters, 8, seed) for seed in range(200)]
    assert (draws[0] == balanced(clusters, 8, 0)).all() and any(
        (d != draws[0]).any() for d in draws
    )
    assert set(np.concatenate(draws).tolist()) == set(range(40))
    with pytest.raises(ValueError, match="9 samples of 2"):
        balanced(clusters[:2], 9, 0)


def test_a_source_of_what_was_kept(tmp_path):
    name = write_jsonl(
        tmp_path / "rows.jsonl", [{"id": str(i), "text": f"t{i}"} for i in range(9)]
    ).replace("llava", "text")
    np.save(tmp_path / "keep.npy", [1, 4, 8])
    source = open_source(f"{name}?keep={tmp_path}/keep.npy")
    assert [sample.key for sample in source] == ["1", "4", "8"] and source.dialog_counts() == [
        1,
        1,
        1,
    ]
    for wrong in ([9], [-1], [0.5], [[0]]):
        np.save(tmp_path / "keep.npy", wrong)
        with pytest.raises(ValueError, match="keep.npy must hold whole numbers from 0 to 8"):
            open_source(f"{name}?keep={tmp_path}/keep.npy")
