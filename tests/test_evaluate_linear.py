"""Linear classifiers against autograd and scikit-learn: they find every signal and none in noise."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.evaluate_world import make_features
from troodon.evaluate import metrics
from troodon.evaluate.config import LinearConfig
from troodon.evaluate.linear import concatenate, fit, list_slices, logits, standardise, train_classifiers

FEW = LinearConfig(rates=(1e-3, 1e-2, 1e-1), epochs=5, least_steps=60)


def make_blobs(
    images: int, apart: float, dim: int = 16, classes: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    centres = np.random.default_rng(9).normal(size=(classes, dim))
    return apart * centres[labels] + random.normal(size=(images, dim)), labels


def accuracy(probes, labels: np.ndarray) -> float:
    return float((probes.predicted_HM[probes.chosen].numpy() == labels).mean())


def test_training_matches_autograd_and_sgd() -> None:
    x, labels = make_blobs(48, 1.0)
    config = LinearConfig(rates=(0.03, 0.1), blocks=(1, 2), epochs=3, least_steps=7, batch=16)
    features = make_features(x, x[:, :4] ** 2, blocks=2)
    slices, x_NF, y = list_slices(features, config), concatenate(features), torch.from_numpy(labels)
    model, steps, batch = fit(x_NF, y, slices, 4, config, seed=5)
    assert (steps, batch, len(slices)) == (9, 16, 4)
    ours = logits(x_NF, slices, model, config)[0]

    random = torch.Generator().manual_seed(5)
    weights = [0.01 * torch.randn(s.last - s.first, 8, generator=random) for s in slices]
    order = torch.cat([torch.randperm(48, generator=random) for _ in range(3)])
    inputs = [x_NF[:, 8:16], x_NF[:, 8:20], x_NF[:, 0:16], x_NF[:, 0:20]]
    for s, (w, inputs_NS) in enumerate(zip(weights, inputs, strict=True)):
        for r, rate in enumerate(config.rates):
            layer = torch.nn.Linear(w.shape[0], 4)
            layer.weight.data, layer.bias.data = w[:, 4 * r : 4 * r + 4].T.clone(), torch.zeros(4)
            optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 16 / 256, momentum=0.9)
            for step in range(9):
                optimizer.param_groups[0]["lr"] = rate * 16 / 256 * 0.5 * (1 + math.cos(math.pi * step / 9))
                rows = order[16 * step : 16 * step + 16]
                optimizer.zero_grad()
                F.cross_entropy(layer(inputs_NS[rows]), y[rows]).backward()
                optimizer.step()
            assert torch.allclose(layer(inputs_NS), ours[2 * s + r], atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_separable_classes_are_separated_at_any_scale(scale: float) -> None:
    (x, y), (x_val, y_val) = make_blobs(400, 6.0), make_blobs(200, 6.0, seed=1)
    fitted = train_classifiers(make_features(scale * x), y, make_features(scale * x_val), 4, FEW, seed=0)
    assert accuracy(fitted, y_val) == 1.0


def test_separable_classes_are_separated_without_standardisation() -> None:
    (x, y), (x_val, y_val) = make_blobs(400, 6.0), make_blobs(200, 6.0, seed=1)
    config = dataclasses.replace(FEW, scale="none")
    assert accuracy(train_classifiers(make_features(x), y, make_features(x_val), 4, config, seed=0), y_val) == 1.0
    assert (
        accuracy(train_classifiers(make_features(1e-4 * x), y, make_features(1e-4 * x_val), 4, config, seed=0), y_val)
        < 1.0
    )


def test_accuracy_is_close_to_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (x_val, y_val) = make_blobs(1000, 0.5), make_blobs(1000, 0.5, seed=1)
    reference = linear_model.LogisticRegression(max_iter=500).fit(x, y).score(x_val, y_val)
    assert 0.5 < reference < 0.97
    assert (
        accuracy(train_classifiers(make_features(x), y, make_features(x_val), 4, LinearConfig(), seed=0), y_val)
        > reference - 0.02
    )


@pytest.mark.parametrize("dim", [32, 600])
def test_random_labels_stay_at_chance(dim: int) -> None:
    """Also with enough channels to memorise every training image: held-out images must not be trained on."""
    random = np.random.default_rng(0)
    x, x_val = random.normal(size=(400, dim)), random.normal(size=(400, dim))
    y, y_val = random.integers(0, 4, 400), random.integers(0, 4, 400)
    fitted = train_classifiers(make_features(x), y, make_features(x_val), 4, FEW, seed=0)
    low, high = metrics.bootstrap_interval(fitted.predicted_HM[fitted.chosen].numpy() == y_val, 1000, 0)
    assert low <= 0.25 <= high
    assert fitted.held_out_H.max() < 0.5


def test_every_slice_of_the_features_can_be_chosen() -> None:
    (good, y), (good_val, y_val) = make_blobs(300, 4.0), make_blobs(200, 4.0, seed=1)
    noise, noise_val = (
        np.random.default_rng(5).normal(size=(2, 300, 16)),
        np.random.default_rng(6).normal(size=(2, 200, 16)),
    )
    parts = {
        (1, "cls"): (np.hstack([noise[0], good]), np.hstack([noise_val[0], good_val]), None, None),
        (2, "cls"): (np.hstack([good, noise[0]]), np.hstack([good_val, noise_val[0]]), None, None),
        (1, "cls+mean"): (np.hstack(noise), np.hstack(noise_val), good, good_val),
    }
    config = dataclasses.replace(FEW, blocks=(1, 2))
    for (blocks, pooling), (x, x_val, mean, mean_val) in parts.items():
        fitted = train_classifiers(
            make_features(x, mean, blocks=2), y, make_features(x_val, mean_val, blocks=2), 4, config, seed=0
        )
        right = (fitted.predicted_HM.numpy() == y_val).mean(1)
        has_it = np.array([b >= blocks and (pooling == "cls" or p == pooling) for b, p, _ in fitted.settings])
        assert accuracy(fitted, y_val) > 0.97
        assert right[~has_it].max(initial=0) < 0.5
        assert has_it[fitted.chosen]


def test_the_choice_never_sees_the_validation_labels() -> None:
    (x, y), (x_val, _) = make_blobs(200, 1.0), make_blobs(100, 1.0, seed=1)
    fitted = train_classifiers(make_features(x), y, make_features(x_val), 4, FEW, seed=0)
    assert fitted.chosen_on == "held-out training images"
    assert fitted.held_out_H[fitted.chosen] == fitted.held_out_H.max()
    shifted = train_classifiers(make_features(x), y, make_features(x_val[:50] * 0), 4, FEW, seed=0)
    assert (shifted.chosen, shifted.held_out_H.tolist()) == (fitted.chosen, fitted.held_out_H.tolist())


def test_training_is_deterministic_given_the_seed() -> None:
    (x, y), (x_val, _) = make_blobs(100, 0.5), make_blobs(300, 0.5, seed=1)
    a, b, c = (
        train_classifiers(make_features(x), y, make_features(x_val), 4, FEW, seed).predicted_HM for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_three_images_and_a_class_without_training_images() -> None:
    x = np.eye(3)
    fitted = train_classifiers(make_features(x), np.array([0, 0, 2]), make_features(x[[0, 1, 2]]), 4, FEW, seed=0)
    assert fitted.predicted_HM.shape == (3, 3)
    assert fitted.chosen_on == "held-out training images"
    assert fitted.batch == 3
    alone = train_classifiers(make_features(x[:2]), np.array([0, 2]), make_features(x[:2]), 4, FEW, seed=0)
    assert "too few" in alone.chosen_on
    assert accuracy(alone, np.array([0, 2])) == 1.0


def test_missing_blocks_and_patches_are_not_tried() -> None:
    config = LinearConfig()
    assert [(s.blocks, s.pooling) for s in list_slices(make_features(np.ones((2, 6)), blocks=3), config)] == [
        (1, "cls"),
        (3, "cls"),
    ]
    full = list_slices(make_features(np.ones((2, 8)), np.ones((2, 2)), blocks=4), config)
    assert [(s.blocks, s.pooling) for s in full] == [(1, "cls"), (1, "cls+mean"), (4, "cls"), (4, "cls+mean")]
    assert [(s.first, s.last) for s in full] == [(6, 8), (6, 10), (0, 8), (0, 10)]


def test_a_constant_channel_becomes_zero() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    x[:, 1] = 1e6 / 3
    train, val = standardise(torch.from_numpy(x).float(), torch.from_numpy(x + 1).float())
    assert train[:, [0, 2]].mean(0).numpy() == pytest.approx(0, abs=1e-5)
    assert train[:, [0, 2]].std(0, correction=0).numpy() == pytest.approx(1, abs=1e-5)
    assert not train[:, 1].any()
    assert not val[:, 1].any()


def test_a_classifier_that_diverges_is_not_chosen() -> None:
    (x, y), (x_val, y_val) = make_blobs(200, 1.0), make_blobs(100, 1.0, seed=1)
    config = LinearConfig(rates=(1e-2, 3e38), scale="none", least_steps=50, epochs=1)
    fitted = train_classifiers(make_features(100 * x), y, make_features(100 * x_val), 4, config, seed=0)
    assert (fitted.predicted_HM[1] == 0).all()
    assert fitted.settings[fitted.chosen][2] == 1e-2
    assert accuracy(fitted, y_val) > 0.9


def test_a_diverged_classifier_is_not_chosen_on_ties() -> None:
    """Nothing can be learned, so all classifiers tie, including the one with NaN weights."""
    x, y = 20 * np.ones((40, 2)), np.repeat([0, 1], [30, 10])  # large enough to overflow
    config = LinearConfig(rates=(1e-2, 3e38), scale="none", least_steps=20, epochs=1)
    fitted = train_classifiers(make_features(x), y, make_features(x), 2, config, seed=0)
    assert fitted.held_out_H.tolist() == [0.75, 0.75]
    assert fitted.chosen == 0
