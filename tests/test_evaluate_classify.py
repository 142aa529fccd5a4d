"""Logistic regression, k-means and their scores against definitions and scikit-learn."""

import dataclasses

import numpy as np
import pytest
import torch

from troodon.evaluate import metrics
from troodon.evaluate.cluster import assign, kmeans
from troodon.evaluate.config import LogisticConfig
from troodon.evaluate.logistic import logistic, predict, solve

FEW = LogisticConfig(strengths=(1e-6, 1e-3, 1e-1, 1.0, 30.0))


def make_blobs(images: int, apart: float = 1.0, dim: int = 12, classes: int = 4, seed: int = 0) -> tuple:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    centres = np.random.default_rng(9).normal(size=(classes, dim))
    return (apart * centres[labels] + random.normal(size=(images, dim))).astype(np.float32), labels


def test_every_strength_matches_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (x_val, _) = make_blobs(300), make_blobs(200, seed=1)
    models = solve(torch.from_numpy(x), torch.from_numpy(y), 4, FEW.strengths, 2000, 1e-6)
    for strength, model in zip(FEW.strengths, models, strict=True):
        reference = linear_model.LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(x, y)
        ours = predict(torch.from_numpy(x_val), model).softmax(1).numpy()
        assert ours == pytest.approx(reference.predict_proba(x_val), abs=2e-3)
        assert (ours.argmax(1) == reference.predict(x_val)).mean() > 0.99


def test_tags_match_scikit_learn_per_class_and_unknown_tags_are_ignored() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (x_val, _) = make_blobs(300), make_blobs(200, seed=1)
    random = np.random.default_rng(3)
    tags = ((y[:, None] == np.arange(4)) | (random.random((300, 4)) < 0.2)).astype(np.int64)
    tags[random.random((300, 4)) < 0.1] = -1
    for strength, model in zip(
        FEW.strengths, solve(torch.from_numpy(x), torch.from_numpy(tags), 4, FEW.strengths, 2000, 1e-6)
    ):
        ours = predict(torch.from_numpy(x_val), model).sigmoid().numpy()
        for c in range(4):
            known = tags[:, c] >= 0
            reference = linear_model.LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(
                x[known], tags[known, c]
            )
            assert ours[:, c] == pytest.approx(reference.predict_proba(x_val)[:, 1], abs=4e-3)


def test_tag_average_precision_matches_scikit_learn_and_voc() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    score, tags = random.normal(size=(80, 3)), random.integers(-1, 2, (80, 3))
    tags[:, 2] = np.minimum(tags[:, 2], 0)  # a class that is nowhere
    ap = metrics.tag_average_precision(score, tags)
    assert np.isnan(ap[2]).all()
    for c in range(2):
        known = tags[:, c] >= 0
        s, t = score[known, c], tags[known, c]
        assert ap[c, 0] == pytest.approx(sklearn.average_precision_score(t, s))
        hits = t[np.argsort(-s)]
        points = [(hits[: i + 1].sum() / hits.sum(), hits[: i + 1].mean()) for i in range(len(hits))]
        eleven = [max(p for recall, p in points if recall >= tenth / 10 - 1e-9) for tenth in range(11)]
        assert ap[c, 1] == pytest.approx(np.mean(eleven))
        twice = np.repeat(np.arange(80), 1 + (np.arange(80) % 2))  # an image drawn twice is two images
        weight = np.stack([np.ones(80, int), 1 + np.arange(80) % 2])
        many = metrics.tag_average_precision(score, tags, weight)
        assert many[c, :, 0] == pytest.approx(ap[c])
        assert many[c, 1, 1] == pytest.approx(metrics.tag_average_precision(score[twice], tags[twice])[c, 1], abs=0.03)


def test_problems_solved_together_match_problems_solved_alone() -> None:
    x, y = (torch.from_numpy(a) for a in make_blobs(200))
    together = solve(x, y, 4, FEW.strengths, 500, 1e-6)
    for strength, model in zip(FEW.strengths, together, strict=True):
        (alone,) = solve(x, y, 4, (strength,), 500, 1e-6)
        assert torch.allclose(alone, model, atol=2e-2 * float(model.abs().max()) + 1e-4)


def test_the_strength_is_chosen_on_held_out_images() -> None:
    (x, y), (x_val, y_val) = make_blobs(400, 0.7, dim=60), make_blobs(400, 0.7, dim=60, seed=1)
    fitted = logistic(x, y, x_val, 4, LogisticConfig(), seed=0)
    assert fitted.held_out_J[fitted.chosen] == fitted.held_out_J.max() > fitted.held_out_J[0]
    accuracy = (fitted.logits_MC.argmax(1).numpy() == y_val).mean()
    flipped = np.random.default_rng(0).permutation(y)
    chance = logistic(x, flipped, x_val, 4, LogisticConfig(), seed=0)
    assert accuracy > 0.8 > 0.4 > (chance.logits_MC.argmax(1).numpy() == y_val).mean()
    tiny = logistic(1e-4 * x, y, 1e-4 * x_val, 4, LogisticConfig(), seed=0)
    assert (tiny.logits_MC.argmax(1) == fitted.logits_MC.argmax(1)).float().mean() > 0.99  # whatever the scale


def test_classes_of_one_image_have_no_held_out_images() -> None:
    fitted = logistic(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), 3, FEW, seed=0)
    assert fitted.logits_MC.argmax(1).tolist() == [0, 1, 2]
    assert "too few" in fitted.chosen_on
    assert dataclasses.replace(FEW, held_out=0.5).held_out == 0.5


def test_nmi_matches_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.metrics.cluster")
    random = np.random.default_rng(0)
    for parts in ((2, 3), (7, 4), (1, 5), (1, 1), (50, 50)):
        a, b = (random.integers(0, p, 60) * 13 for p in parts)
        assert metrics.nmi(a, b) == pytest.approx(cluster.normalized_mutual_info_score(a, b), abs=1e-9)
    assert metrics.nmi(a, a + 3) == pytest.approx(1.0)


def test_kmeans_finds_separated_clusters_and_converges() -> None:
    x, y = make_blobs(300, 8.0)
    clusters = kmeans(torch.from_numpy(x), 4, 100, seed=0)
    assert metrics.nmi(clusters.numpy(), y) > 0.95
    unit = torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
    centroids = torch.stack([torch.nn.functional.normalize(unit[clusters == k].sum(0), dim=0) for k in range(4)])
    assert torch.equal(assign(unit, centroids)[0], clusters)
    assert torch.equal(kmeans(torch.from_numpy(x), 4, 100, seed=0), clusters)
    assert len(kmeans(torch.from_numpy(x[:2]), 9, 5, seed=0)) == 2
    assert kmeans(torch.ones(6, 3), 3, 5, seed=0).shape == (6,)  # all the same image
