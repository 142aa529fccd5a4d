"""Neighbours are exact: equal to sorting everything, whatever the blocks, the type of the rows and the device."""

import numpy as np
import pytest
import torch

from troodon.search.exact import cosines, count_tiles, iter_pairs_above, l2_normalise, pairs_above, top_k


def vectors(count: int, channels: int = 24, seed: int = 0) -> np.ndarray:
    """Random rows; a third of them repeat others, times powers of two, which do not round: so they tie."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((count, channels)).astype(np.float32)
    x[random.permutation(count)[: count // 3]] = x[random.integers(0, count, count // 3)]
    return x * np.exp2(random.integers(-3, 4, (count, 1))).astype(np.float32)


def cosine_matrix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (x, y))
    return np.round(x @ y.T, 10)  # so that equal rows tie here too


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_best_k_are_those_of_a_full_sort_and_ties_go_to_the_lower_row(k):
    queries, base = vectors(70, seed=1), vectors(300)
    base[17] = base[250] = queries[3]  # a tie at the top
    expected = np.argsort(-cosine_matrix(queries, base), axis=1, kind="stable")[:, :k]
    score, row = top_k(queries, base, k, block=64)
    assert score.dtype == np.float32
    assert row.dtype == np.int64
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_allclose(score, np.take_along_axis(cosine_matrix(queries, base), row, 1), atol=1e-5)
    assert row[3, 0] == 17


def test_equal_rows_tie_wherever_they_lie_in_a_block():
    query = vectors(1, 384)
    base = np.repeat(query, 500, axis=0)  # every product of a tile, whose bits differ at its edges
    for block in (7, 33, 4096):
        score, row = top_k(query, base, 9, block=block)
        np.testing.assert_array_equal(row[0], np.arange(9))
        assert len(set(score[0].tolist())) == 1


@pytest.mark.parametrize("device", [None, "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_do_not_depend_on_blocks_or_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = vectors(260, 96)
    scores, rows = top_k(x[:90], x, 12)
    pairs = pairs_above(x, 0.25)
    assert len(pairs[0]) > 90
    for block in (5, 64, 128) if device is None else (64,):
        again = top_k(x[:90], x, 12, block=block, device=device)
        assert scores.tobytes() == again[0].tobytes()
        assert rows.tobytes() == again[1].tobytes()
        for a, b in zip(pairs, pairs_above(x, 0.25, block=block, device=device), strict=True):
            assert a.tobytes() == b.tobytes()


def test_k_is_clipped_and_matrices_may_be_empty():
    x = vectors(5)
    score, row = top_k(x, x[:3], 10)
    assert score.shape == row.shape == (5, 3)
    assert np.isfinite(score).all()
    assert [len(set(r)) for r in row.tolist()] == [3] * 5
    assert top_k(x, x[:0], 4)[0].shape == (5, 0)
    assert top_k(x[:0], x, 4)[1].shape == (0, 4)


@pytest.mark.parametrize("block", [13, 100, 4096])
@pytest.mark.parametrize("threshold", [-0.5, 0.3, 0.999])
def test_pairs_are_exactly_those_above_the_threshold(block, threshold):
    x, y = vectors(230), vectors(61, seed=2)
    matrix = cosine_matrix(x, x)
    assert np.abs(matrix - threshold).min() > 1e-5  # none too close to call
    i, j, score = pairs_above(x, threshold, block=block)
    np.testing.assert_array_equal(np.stack([i, j]), np.stack(np.nonzero(np.triu(matrix > threshold, 1))))
    np.testing.assert_allclose(score, matrix[i, j], atol=1e-5)
    i, j, _ = pairs_above(x, threshold, y, block=block)
    np.testing.assert_array_equal(np.stack([i, j]), np.stack(np.nonzero(cosine_matrix(x, y) > threshold)))
    assert len(list(iter_pairs_above(x, threshold, block=block))) == count_tiles(230, block=block)
    assert len(list(iter_pairs_above(x, threshold, y, block=block))) == count_tiles(230, 61, block=block)


def test_the_threshold_is_exclusive():
    x = np.eye(3, dtype=np.float32)
    assert len(pairs_above(x, 0.0)[0]) == 0
    assert len(pairs_above(x, -1e-3)[0]) == 3
    assert len(pairs_above(np.ones((4, 3)), 1.0)[0]) == 0
    assert len(pairs_above(x[:0], 0.5)[0]) == 0


def test_float16_files_give_the_scores_of_their_normalised_rows(tmp_path):
    x = l2_normalise(vectors(300, 64)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    exact = x.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    i, j, score = pairs_above(stored, 0.3, block=77)
    assert len(i) > 100
    np.testing.assert_allclose(score, (exact[i] * exact[j]).sum(1), atol=3e-7)
    np.testing.assert_array_equal(score, cosines(stored, i, j))
    score, row = top_k(stored[:50], stored, 3, block=77)
    np.testing.assert_allclose(score, np.take_along_axis(exact[:50] @ exact.T, row, 1), atol=3e-7)


def test_a_row_of_zeros_resembles_nothing():
    x = vectors(20)
    x[4] = 0
    assert 4 not in np.concatenate(pairs_above(x, 0.01)[:2])
    assert top_k(x[4:5], x, 2)[0].tolist() == [[0, 0]]


def test_non_finite_numbers_are_refused():
    with pytest.raises(AssertionError, match="finite"):
        top_k(np.full((1, 2), np.nan), np.ones((1, 2)), 1)
