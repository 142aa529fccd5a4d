"""Near pairs by lists and by faiss: scores are exact, few pairs are missed, and threads do not matter."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from troodon.config import UsageError
from troodon.search import join
from troodon.search.exact import l2_normalise, pairs_above
from troodon.search.inverted_lists import InvertedLists, assign_probes, kmeans, list_count, nearest_centroids


def planted(rows: int, channels: int = 48, seed: int = 0) -> np.ndarray:
    """Unit vectors; every fifth is a copy, cosine 0.9 and more, of the one before."""
    random = np.random.default_rng(seed)
    x = l2_normalise(random.standard_normal((rows, channels)))
    copies = np.arange(1, rows, 5)
    x[copies] = l2_normalise(x[copies - 1] + 0.06 * random.standard_normal((len(copies), channels)))
    return x


def edges(x: np.ndarray, index: join.SearchIndex, threshold: float) -> dict[tuple[int, int], float]:
    """Return all edges of a search index. No edge may come twice."""
    parts = [part for at in range(len(index)) for part in index.pairs(x, threshold, at)]
    pairs = [(i, j) for part in parts for i, j in zip(part[0].tolist(), part[1].tolist())]
    assert len(set(pairs)) == len(pairs)
    return dict(zip(pairs, np.concatenate([part[2] for part in parts]).tolist()))


def test_lists_find_nearly_all_pairs_with_exact_scores(tmp_path):
    x = planted(6000).astype(np.float16)
    exact = edges(x, join.build_index(x, "exact"), 0.8)
    assert list(exact) == list(zip(*(part.tolist() for part in pairs_above(x, 0.8)[:2])))
    assert len(exact) > 1000
    lists = InvertedLists.build(x, 3, probes=8)
    found = edges(x, lists, 0.8)
    assert found.items() <= exact.items()
    assert len(found) > 0.95 * len(exact)
    assert all(i < j for i, j in found)
    both = found | edges(x, InvertedLists.build(x, 4, probes=8), 0.8)
    assert len(exact) - len(both) <= 0.5 * (len(exact) - len(found))
    InvertedLists.build(x, 3, probes=8, folder=tmp_path)
    assert edges(x, join.load_index(tmp_path), 0.8) == found


def test_lists_from_probes_in_parts_equal_lists_built_at_once(monkeypatch):
    x = planted(900, 16)
    monkeypatch.setattr("troodon.search.inverted_lists.SORT_BLOCK", 100)
    whole, centroids = InvertedLists.build(x, 0), kmeans(x, list_count(len(x)), 0)
    parts = InvertedLists.from_probes(
        x, np.concatenate([assign_probes(part, centroids) for part in (x[:200], x[200:])]), len(centroids)
    )
    for field in dataclasses.fields(InvertedLists):
        assert np.array_equal(getattr(parts, field.name), getattr(whole, field.name)), field.name
    for at in range(len(whole)):
        queries = whole.queries[whole.query_starts[at] : whole.query_starts[at + 1]]
        assert queries.tolist() == np.flatnonzero((whole.probes_Np == at).any(1)).tolist()


def test_lists_that_probe_all_lists_find_everything():
    x = planted(900, 16)
    exact = edges(x, join.build_index(x, "exact"), 0.5)
    assert len(exact) > 3000
    assert edges(x, InvertedLists.build(x, 0, count=7, probes=7), 0.5) == exact
    assert edges(x, InvertedLists.build(x, 0, count=1, probes=9), 0.5) == exact


def test_a_list_larger_than_a_block_is_searched_in_blocks(monkeypatch):
    x = planted(500, 16)
    whole = edges(x, InvertedLists.build(x, 0, count=3, probes=3), 0.5)
    monkeypatch.setattr("troodon.search.inverted_lists.BLOCK", 37)
    monkeypatch.setattr("troodon.search.inverted_lists.blocks.__defaults__", (37,))
    assert edges(x, InvertedLists.build(x, 0, count=3, probes=3), 0.5) == whole


def test_nearest_centroids_are_exact():
    random = np.random.default_rng(0)
    x, centroids = l2_normalise(random.standard_normal((300, 24))), kmeans(random.standard_normal((4000, 24)), 1500, 0)
    assert centroids.shape == (1500, 24)
    assert (centroids == np.rint(centroids)).all()
    exact = np.rint(x.astype(np.float64) * 4000) @ centroids.T.astype(np.float64)
    for p in (1, 5, 16):
        score, index = nearest_centroids(x, centroids, p)
        np.testing.assert_array_equal(index, np.argsort(-exact, axis=1, kind="stable")[:, :p])
        np.testing.assert_allclose(score, np.take_along_axis(exact, index, 1) / 4000**2, rtol=1e-6)


def test_kmeans_finds_planted_clusters_and_leaves_none_empty():
    random = np.random.default_rng(1)
    middle = l2_normalise(random.standard_normal((12, 32)))
    x = l2_normalise(np.repeat(middle, 50, 0) + 0.1 * random.standard_normal((600, 32)))
    lists = nearest_centroids(x, kmeans(x, 12, 0, iterations=20, sampled=50), 1)[1][:, 0]
    assert len(set(lists.tolist())) == 12
    found = [len(set(lists[c * 50 : c * 50 + 50].tolist())) for c in range(12)]
    assert sorted(found)[:9] == [1] * 9  # k-means may split a few and merge others
    assert len(kmeans(x[:5], 12, 0)) == 5
    same = np.ones((40, 4), np.float32)
    assert nearest_centroids(same, kmeans(same, 4, 0), 1)[1].max() == 0


def test_lists_do_not_depend_on_threads():
    program = (
        "import hashlib, numpy as np; from troodon.search.inverted_lists import InvertedLists;"
        "x = np.random.default_rng(0).standard_normal((3000, 96)).astype(np.float16);"
        "lists = InvertedLists.build(x, 0);"
        "print(hashlib.sha256(lists.probes_Np.tobytes() + lists.codes_ND.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1


def test_faiss_finds_nearly_all_pairs_with_exact_scores(tmp_path):
    pytest.importorskip("faiss")
    x = planted(10_000, 16)
    exact = edges(x, join.build_index(x, "exact"), 0.9)
    index = join.build_index(x, "faiss", folder=tmp_path)
    found = edges(x, index, 0.9)
    assert found.items() <= exact.items()
    assert len(found) > 0.95 * len(exact)
    assert edges(x, join.load_index(tmp_path), 0.9) == found


def test_the_search_method_depends_on_size_and_is_checked():
    assert join.resolve_method("auto", 500_000) == "exact"
    assert join.resolve_method("auto", 500_001) == "lists"
    assert join.resolve_method("lists", 3) == "lists"
    with pytest.raises(UsageError, match="did you mean 'exact'"):
        join.resolve_method("exakt", 3)
    for method in ("exact", "lists"):
        assert list(join.near_pairs(np.zeros((0, 4), np.float32), 0.5, method)) == []


def test_an_audit_counts_the_remaining_copies():
    x = planted(2000)
    remaining = np.delete(np.arange(2000), np.arange(1, 2000, 5)[20:])  # 20 copies are still there
    survivors = x[remaining]
    every = join.audit(survivors, 0.8, np.arange(len(remaining)))
    assert every.checked == len(remaining)
    assert every.similar == 40
    assert every.low < every.share < every.high
    some = join.audit(survivors, 0.8, np.arange(len(remaining)), images=500, seed=1)
    assert some.low <= 40 / len(remaining) <= some.high
    assert join.wilson_interval(0, 1000).low == 0
    assert 0.003 < join.wilson_interval(0, 1000).high < 0.004
