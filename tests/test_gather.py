"""Leaks, hashes, marks and gathering, on vectors and pictures with known results."""

import numpy as np
import pytest
from PIL import Image

from troodon.config import UsageError
from troodon.copies import hashes as hashes_module
from troodon.copies.hashes import near_hashes, perceptual_hash
from troodon.curate import scores
from troodon.curate.config import CurateConfig
from troodon.curate.leak import best_matches, propagate_matches
from troodon.curate.retrieve import Hits, fill_hits
from troodon.curate.sampling import balanced_quotas, draw_order, hierarchical_kmeans, sample_clusters, sample_hierarchy
from troodon.search.exact import iter_pairs_above, l2_normalise
from troodon.views.attacks import attack

from .test_curate import chain, picture


def test_leaks_are_the_nearest_benchmark_images_and_components_chain():
    x, benchmark = chain(0, 20, 41, 90, 180), chain(95, 2, 1)
    row, score = best_matches(5, iter_pairs_above(x, 0.93, benchmark))
    assert row.tolist() == [2, 1, -1, 0, -1]
    np.testing.assert_allclose(score[[0, 1, 3]], np.cos(np.radians([1, 18, 5])), atol=1e-6)
    assert np.isnan(score[[2, 4]]).all()
    joined = propagate_matches(row, score, iter_pairs_above(x, 0.93))
    assert joined.tolist() == [2, 1, 2, 0, -1]  # 41 degrees resembles 20, which resembles 1
    assert best_matches(5, iter_pairs_above(x, 0.9, benchmark[:0]))[0].tolist() == [-1] * 5


def test_the_best_match_does_not_depend_on_the_order_of_tiles():
    random = np.random.default_rng(0)
    i, j = random.integers(0, 50, 400), random.integers(0, 80, 400)
    score = random.integers(0, 5, 400).astype(np.float32) / 10  # many are equal
    expected = {}
    for hit in sorted(zip(i.tolist(), (-score).tolist(), j.tolist())):
        expected.setdefault(hit[0], hit[2])
    for parts in (1, 9):
        order = random.permutation(400)
        row, _ = best_matches(50, [(i[p], j[p], score[p]) for p in np.array_split(order, parts)])
        assert {at: r for at, r in enumerate(row.tolist()) if r >= 0} == expected


def test_perceptual_hashes_of_copies_are_near_and_of_other_pictures_are_not():
    random = np.random.default_rng(0)
    images = [picture(seed) for seed in range(120)]
    hashes = np.array([perceptual_hash(image) for image in images], np.uint64)
    for kind in ("shrink", "resave", "jpeg", "brightness"):
        copies = np.array([perceptual_hash(attack(image, kind, random, 0.3)) for image in images], np.uint64)
        assert (np.bitwise_count(copies ^ hashes) <= 6).mean() > 0.9, kind
    others = np.bitwise_count(hashes[:, None] ^ hashes[None])[~np.eye(120, dtype=bool)]
    assert others.min() > 6
    assert perceptual_hash(np.full((40, 30, 3), 77, np.uint8)) is None
    grey = np.asarray(Image.fromarray(images[0]).convert("L"))[..., None]
    assert np.bitwise_count(np.uint64(perceptual_hash(grey)) ^ hashes[0]) <= 4


@pytest.mark.parametrize("radius", [0, 2, 5])
def test_hashes_within_a_radius_are_all_found_once(radius, monkeypatch):
    random = np.random.default_rng(1)
    hashes = random.integers(0, 2**64, 300, np.uint64)
    hashes[200:] = hashes[:100]
    for at in range(200, 300):
        for bit in random.integers(0, 64, random.integers(0, 7)).tolist():
            hashes[at] ^= np.uint64(1 << bit)
    hashes[10:30] = hashes[10]
    monkeypatch.setattr(hashes_module, "BLOCK", 7)
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = set(zip(*(part.tolist() for part in np.nonzero(np.triu(bits <= radius, 1)))))
    found = [(i, j) for part in near_hashes(hashes, radius) for i, j in zip(part[0].tolist(), part[1].tolist())]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) > 190 + (radius > 1) * 20


def test_marks_compare_scores_with_limits():
    sharp, soft = picture(1), attack(picture(1), "blur", np.random.default_rng(0), 1.0)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    assert scores.sharpness(noise) > scores.sharpness(sharp) > scores.sharpness(soft)
    assert scores.sharpness(np.full((9, 9, 1), 3, np.uint8)) == 0
    assert (scores.side(sharp), scores.aspect(sharp)) == (48, 1.25)
    names = ("side<50", "aspect>1.5", "tests.test_gather:redness>0.5")
    loaded = scores.load_scores(names)
    assert list(loaded) == ["side", "aspect", "tests.test_gather:redness"]
    values = {name: np.array([score(sharp), score(np.full((60, 200, 3), (255, 0, 0), np.uint8))])
              for name, score in loaded.items()}  # fmt: skip
    assert scores.image_marks(names, values) == ["side<50", "aspect>1.5 tests.test_gather:redness>0.5"]
    with pytest.raises(UsageError, match="did you mean 'sharpness'"):
        scores.load_scores(["sharpnes<1"])
    with pytest.raises(UsageError, match="no_such_module"):
        scores.load_scores(["no_such_module:x<1"])
    with pytest.raises(UsageError, match="expected a score, < or >, and a number"):
        CurateConfig(marks=("sharpness=1",))


def redness(image: np.ndarray) -> float:
    return float(image[..., 0].mean() / 255 - image[..., 1].mean() / 255)


def test_fill_gives_every_query_its_own_images():
    # Both queries like 7 best, the second more; the first takes its next, and so on.
    hits = Hits(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 2, 3, 1, 2, 3]), np.array([7, 8, 9, 7, 9, 8]),
                np.array([0.8, 0.7, 0.6, 0.9, 0.5, 0.4], np.float32))  # fmt: skip
    one = fill_hits(hits, np.full(6, 1))
    assert list(zip(one.query_H.tolist(), one.row_H.tolist(), one.rank_H.tolist())) == [(0, 8, 2), (1, 7, 1)]
    two = fill_hits(hits, np.full(6, 2))  # of three images the nearer query has one more
    assert sorted(two.row_H.tolist()) == [7, 8, 9]
    assert fill_hits(Hits(*(column[:0] for column in vars(hits).values())), np.zeros(0, int)).row_H.tolist() == []
    random = np.random.default_rng(0)
    query, row = np.repeat(np.arange(40), 30), np.concatenate([random.permutation(200)[:30] for _ in range(40)])
    many = Hits(query, np.tile(np.arange(1, 31), 40), row, -np.tile(np.arange(30), 40).astype(np.float32))
    filled = fill_hits(many, np.full(1200, 4))
    assert len(set(filled.row_H.tolist())) == len(filled.row_H) == 160
    assert (np.bincount(filled.query_H) == 4).all()


def test_clusters_with_more_than_three_curated_images_are_sampled():
    rows, cluster = np.arange(100, 200), np.repeat([0, 1, 2, 3], 25)
    cluster_Q, dataset_Q = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]), np.array([0] * 7 + [1] * 5)
    drawn = sample_clusters(cluster_Q, dataset_Q, rows, cluster, more_than=3, per_cluster=10, cap=1000, seed=0)
    assert drawn.cluster.tolist() == [0, 2]
    assert drawn.dataset.tolist() == [0, 1]
    assert (drawn.hits.tolist(), drawn.size.tolist(), drawn.taken.tolist()) == ([4, 5], [25, 25], [10, 10])
    assert np.bincount(cluster[drawn.rows - 100], minlength=4).tolist() == [10, 0, 10, 0]
    assert (
        len(sample_clusters(cluster_Q, dataset_Q, rows, cluster, more_than=0, per_cluster=99, cap=7, seed=0).rows) <= 14
    )
    capped = sample_clusters(cluster_Q, dataset_Q * 0, rows, cluster, more_than=2, per_cluster=99, cap=7, seed=0)
    assert len(capped.rows) == capped.taken.sum() == 7
    assert not len(sample_clusters(cluster_Q, dataset_Q, rows, cluster, more_than=9, per_cluster=9, cap=9, seed=0).rows)


def test_draws_depend_only_on_row_and_seed():
    rows = np.arange(1000)
    first = set(rows[draw_order(rows, 0)][:100].tolist())
    assert set(rows[::-1][draw_order(rows[::-1], 0)][:100].tolist()) == first
    assert len(first & set(rows[draw_order(rows, 1)][:100].tolist())) < 30
    assert abs(np.mean(list(first)) - 500) < 100


def test_quotas_are_as_even_as_sizes_allow():
    assert balanced_quotas(np.array([10, 2, 5]), 9).tolist() == [4, 2, 3]
    assert balanced_quotas(np.array([10, 2, 5]), 99).tolist() == [10, 2, 5]
    assert balanced_quotas(np.array([3, 3, 3]), 8).sum() == 8
    assert balanced_quotas(np.array([0, 4]), 3).tolist() == [0, 3]


def test_hierarchical_sampling_balances_common_and_rare_content():
    random = np.random.default_rng(0)
    middle = l2_normalise(random.standard_normal((8, 24)))
    kind = np.repeat(np.arange(8), [1000, 500, 200, 100, 60, 40, 30, 20])
    x = l2_normalise(middle[kind] + 0.15 * random.standard_normal((len(kind), 24)))
    rows = np.arange(len(x)) + 5
    drawn = sample_hierarchy(rows, hierarchical_kmeans(x, (60, 8), 0), 160, 0)
    assert len(drawn) == len(np.unique(drawn)) == 160
    counts, chance = np.bincount(kind[drawn - 5], minlength=8), 160 * np.bincount(kind) / len(kind)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0] / p.sum()
        return float(-(p * np.log(p)).sum())

    assert entropy(counts) > 0.9 * np.log(8)
    assert entropy(counts) > entropy(chance) + 0.4
    assert sample_hierarchy(rows, hierarchical_kmeans(x, (60, 8), 0), 10_000, 0).tolist() == rows.tolist()
