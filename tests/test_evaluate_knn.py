"""k-NN against its definition, scikit-learn, and degenerate datasets."""

import math

import numpy as np
import pytest
import torch

from troodon.evaluate.knn import knn, knn_accuracy, leave_one_out, usable_ks


def make_blobs(images: int, dim: int = 8, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    centres = np.random.default_rng(9).normal(size=(classes, dim))
    return torch.from_numpy(centres[labels] + 1.5 * random.normal(size=(images, dim))).float(), torch.from_numpy(labels)


def reference_knn(train: torch.Tensor, labels: torch.Tensor, x: torch.Tensor, k: int, temperature: float) -> int:
    """Classify one image as the paper defines it."""
    cosines = [(float(torch.cosine_similarity(t, x, dim=0)), int(y)) for t, y in zip(train, labels)]
    nearest = sorted(cosines, reverse=True)[:k]
    total = sum(math.exp(s / temperature) for s, _ in nearest)
    votes: dict[int, float] = {}
    for s, y in nearest:
        votes[y] = votes.get(y, 0.0) + math.exp(s / temperature) / total
    return max(votes, key=lambda y: votes[y])


def test_knn_matches_its_definition() -> None:
    train, labels = make_blobs(60)
    val, _ = make_blobs(40, seed=1)
    predicted = knn(train, labels, val, (1, 5, 20), 0.07)
    for k in (1, 5, 20):
        assert predicted[k].tolist() == [reference_knn(train, labels, x, k, 0.07) for x in val]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_matches_scikit_learn_with_these_weights(temperature: float) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels = make_blobs(300)
    val, _ = make_blobs(150, seed=1)
    predicted = knn(train, labels, val, (10, 20, 100), temperature)
    for k in (10, 20, 100):
        reference = neighbors.KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
        )
        assert predicted[k].tolist() == reference.fit(train.numpy(), labels.numpy()).predict(val.numpy()).tolist()


def test_the_temperature_decides_between_one_near_and_many_far() -> None:
    angle = torch.tensor([0.1, 0.5, 0.5, 0.5])
    train, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 1, 1])
    val = torch.tensor([[1.0, 0.0]])
    assert knn(train, labels, val, [4], 0.07)[4].tolist() == [0]
    assert knn(train, labels, val, [4], 10.0)[4].tolist() == [1]


def test_the_norm_of_a_feature_does_not_matter() -> None:
    train, labels = make_blobs(50)
    val, _ = make_blobs(20, seed=1)
    scale = torch.linspace(0.01, 100, 50)[:, None]
    assert torch.equal(knn(train, labels, val, [7], 0.07)[7], knn(train * scale, labels, val * 5, [7], 0.07)[7])


def test_labels_may_be_any_integers() -> None:
    train, labels = make_blobs(50)
    val, _ = make_blobs(20, seed=1)
    names = torch.tensor([1000, -7, 3, 50, 12])
    assert torch.equal(knn(train, names[labels], val, [5], 0.07)[5], names[knn(train, labels, val, [5], 0.07)[5]])


def test_k_beyond_the_number_of_images_uses_all_images() -> None:
    train, labels = make_blobs(3)
    val, _ = make_blobs(4, seed=1)
    predicted = knn(train, labels, val, (3, 200), 0.07)
    assert torch.equal(predicted[200], predicted[3])
    assert usable_ks((10, 20, 100, 200), 60) == {10: [10], 20: [20], 60: [100, 200]}


def test_leave_one_out_matches_a_loop() -> None:
    x, labels = make_blobs(40)
    loop = []
    for i in range(40):
        others = torch.arange(40) != i
        loop.append(int(knn(x[others], labels[others], x[i : i + 1], [5], 0.07)[5]) == int(labels[i]))
    assert knn_accuracy(x, labels, k=5) == pytest.approx(np.mean(loop))
    rows = torch.tensor([3, 17, 30])
    assert leave_one_out(x, labels, [5], 0.07, rows)[5] == pytest.approx(np.mean([loop[r] for r in rows]))


def test_an_image_is_not_its_own_neighbour_even_among_copies() -> None:
    x = torch.ones(6, 4)  # collapsed: every image is a copy of every other
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    assert knn_accuracy(x, labels, k=5) == pytest.approx(5 / 6)
    assert knn_accuracy(x[:2], torch.tensor([0, 1]), k=20) == 0.0


def test_knn_accuracy_with_validation_images_matches_knn() -> None:
    train, labels = make_blobs(1500)
    val, val_labels = make_blobs(1100, seed=1)  # more than one chunk
    accuracy = (knn(train, labels, val, [20], 0.07)[20] == val_labels).float().mean().item()
    assert knn_accuracy(train, labels, val, val_labels) == pytest.approx(accuracy, abs=0.002)
    assert 0.4 < accuracy < 1.0


def test_knn_on_noise_is_at_chance() -> None:
    """The mean over 100 random datasets. A single small one may be far off by chance."""
    labels, val_labels, accuracies = torch.arange(96) % 3, torch.arange(48) % 3, []
    for seed in range(100):
        x = torch.randn(144, 3, generator=torch.Generator().manual_seed(seed))
        accuracies.append((knn(x[:96], labels, x[96:], [8], 0.07)[8] == val_labels).float().mean().item())
    assert abs(np.mean(accuracies) - 1 / 3) < 4 * np.std(accuracies) / 10
    assert abs(np.mean(accuracies) - 1 / 3) < 0.03
