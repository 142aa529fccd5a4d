"""Classification protocols on frozen features: k-NN, linear classifiers, logistic regression, k-means.

A dataset has one training set and one or several test sets: for ImageNet its own validation images, and sets that were
collected for the same classes. If such a set holds only some of the classes, predictions are restricted to these. An
image of such a set may have several correct labels.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.cluster import kmeans
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, FrozenFeatures, Reader, dataset_fingerprint, extract
from troodon.evaluate.knn import knn, leave_one_out, usable_ks
from troodon.evaluate.linear import train_classifiers
from troodon.evaluate.logistic import logistic
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import LABEL_SEPARATOR
from troodon.evaluate.split import few_shot
from troodon.images.index import Index
from troodon.text import plural

# Shape suffixes: N training images, M test images, A correct labels of an image, C classes, S seeds.

MIN_BLOCKS = 4  # features are cached of at least this many last blocks, so that other settings can use the cache
MAX_LEAVE_ONE_OUT = 5000  # maximum number of training images on which k is chosen
FEW = 10  # test images, below which a line warns of their scores
JACKKNIFE_GROUPS = 20  # groups of images of the jackknife interval of k-means


@dataclass(frozen=True)
class LabelledDataset:
    """Training images and the test sets by name. `split` says in words how they were divided."""

    name: str
    train: Index
    tests: dict[str, Index]
    split: str


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of one backbone, and labels as positions in `classes`, the sorted names of all classes."""

    train: FrozenFeatures
    val: FrozenFeatures  # of all test sets, concatenated
    labels_N: np.ndarray
    labels_MA: np.ndarray  # padded with -1
    classes: list[str]
    test_M: np.ndarray  # the position of the test set of each image
    allowed_MC: np.ndarray | None  # the classes that may be predicted; None if all may

    def is_correct(self, predicted_SM: np.ndarray) -> np.ndarray:
        """Whether each prediction (S, M) is one of the correct labels of its image."""
        return (predicted_SM[:, :, None] == self.labels_MA).any(-1)


@dataclass(frozen=True)
class Predictions:
    """Predictions of one protocol: variants as (description, predicted classes (S, M)), and the position of the chosen
    one, which gives the score."""

    protocol: str
    variants: list[tuple[dict, np.ndarray]]
    chosen: int
    settings: dict
    like: dict
    details: dict = field(default_factory=dict)


def classify(backbone: Extractor, dataset: LabelledDataset, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """Yield all scores of one backbone. Nothing is chosen on test images, except where the protocol name says so."""
    data = extract_labelled(backbone, dataset, config, reader)
    train = dataset_fingerprint(dataset.train, "label")
    tests = [(name, dataset_fingerprint(index, "label")) for name, index in dataset.tests.items()]
    for predictions in _all_predictions(data, config):
        for test, (name, images) in enumerate(tests):
            like = likeness(backbone, f"{train} {images}", **predictions.like)
            yield _score(predictions, data, test, name, dataset.split, like, config)
    if "kmeans" in config.protocols:
        several = [len(np.unique(data.labels_MA[data.test_M == test, 0])) > 1 for test in range(len(tests))]
        for test, (name, images) in ((test, tests[test]) for test in np.flatnonzero(several).tolist()):
            yield _kmeans_score(backbone, data, test, name, images, config)


def check(dataset: LabelledDataset) -> None:
    """Raise UsageError for fewer than two classes, for images that are in both the training set and a test set, and for
    a test set without any class to train on."""
    _check_two_classes(dataset.train.column("label"))
    train = set(zip(dataset.train.column("container"), dataset.train.column("offset"), strict=True))
    for test in dataset.tests.values():
        if both := len(train & set(zip(test.column("container"), test.column("offset"), strict=True))):
            raise UsageError(f"{both} of {len(test)} test images are also training images: keep the two sets disjoint")
    for name in dataset.tests:
        count = len(dataset.tests[name])
        if count and sum(untrained_classes(dataset, name).values()) == count:
            raise UsageError(f"{name}: no test image has a class of the training images, so none can be right")


def untrained_classes(dataset: LabelledDataset, test: str) -> Counter[str]:
    """The number of images of each class that only this test set has; such images count as wrong."""
    trained = set(dataset.train.column("label"))
    labels, is_first = dataset.tests[test].column("label"), test == next(iter(dataset.tests))
    if not is_first:  # may be numbers, or several correct labels
        labels = _resolve_numbers(labels, sorted(trained))
    correct = ([label] if is_first else label.split(LABEL_SEPARATOR) for label in labels)
    return Counter(names[0] for names in correct if not trained & set(names))


def notes(dataset: LabelledDataset) -> Iterator[str]:
    """What users should know of the classes before they read scores."""
    for name, test in dataset.tests.items():
        if untrained := untrained_classes(dataset, name):
            count, listed = sum(untrained.values()), ", ".join(f"{c} {n:,}" for c, n in untrained.most_common(5))
            text = f"{name}: {count:,} of {len(test):,} test images are of classes without training images"
            yield f"{'alarm: ' if 2 * count > len(test) else ''}{text}, and count as wrong: {listed}"
        if len(test) < FEW:
            yield f"{name}: only {plural(len(test), 'test image')}: such scores and intervals mean little"
        if len(set(test.column("label"))) == 1:
            yield f"{name}: all test images are of one class: k-means would agree with it always, and is not measured"


def extract_labelled(
    backbone: Extractor, dataset: LabelledDataset, config: EvaluateConfig, reader: Reader
) -> LabelledFeatures:
    """Extract the features of all images once, and encode the labels as numbers."""
    blocks = max(MIN_BLOCKS, *config.linear.blocks)
    train = extract(backbone, dataset.train, blocks=blocks, reader=reader)
    tests = [extract(backbone, index, blocks=blocks, reader=reader) for index in dataset.tests.values()]
    labels_N = np.asarray(dataset.train.column("label"))[train.rows]
    _check_two_classes(labels_N)
    train_classes = sorted(set(dataset.train.column("label")))
    test_labels = []
    for test, (index, features) in enumerate(zip(dataset.tests.values(), tests)):
        labels = _resolve_numbers(index.column("label"), train_classes) if test else index.column("label")
        test_labels.append([labels[row].split(LABEL_SEPARATOR) if test else [labels[row]] for row in features.rows])
    classes = sorted({*train_classes, *(name for test in test_labels for names in test for name in names)})
    code = {name: i for i, name in enumerate(classes)}
    widest = max(len(names) for test in test_labels for names in test)
    labels_MA = np.array([[*map(code.get, n), *[-1] * (widest - len(n))] for test in test_labels for n in test])
    test_M = np.repeat(np.arange(len(tests)), [len(test) for test in test_labels])
    allowed = [_allowed_classes(test, train_classes, code) if i else None for i, test in enumerate(test_labels)]
    return LabelledFeatures(
        train, _concatenate(tests), np.array([code[name] for name in labels_N]), labels_MA, classes, test_M,
        np.stack([np.ones(len(code), bool) if a is None else a for a in allowed])[test_M]
        if any(a is not None for a in allowed) else None,
    )  # fmt: skip


def _all_predictions(data: LabelledFeatures, config: EvaluateConfig) -> Iterator[Predictions]:
    if "knn" in config.protocols:
        yield _knn(data, config)
        for shots in config.shots:
            yield _few_shot(data, config, shots)
    if "linear" in config.protocols:
        yield from _linear(data, config)
    if "logistic" in config.protocols:
        yield _logistic(data, config)


def _knn_labels(
    data: LabelledFeatures, rows: np.ndarray, ks: Sequence[int], temperature: float
) -> dict[int, np.ndarray]:
    """Classes (M,) that k-NN predicts from these training rows, for each k; -1 where no training image is allowed.

    For a test set of some classes only, the neighbours are training images of these classes.
    """
    x_ND, y_N = data.train.final_ND[rows], data.labels_N[rows]
    predicted = {k: np.full(len(data.test_M), -1) for k in ks}
    for test in np.unique(data.test_M):
        rows_M = np.flatnonzero(data.test_M == test)
        allowed_N = np.ones(len(y_N), bool) if data.allowed_MC is None else data.allowed_MC[rows_M[0]][y_N]
        if allowed_N.any():
            arrays = x_ND[allowed_N], y_N[allowed_N], data.val.final_ND[rows_M]
            train_ND, train_N, test_MD = map(torch.from_numpy, arrays)
            for k, predicted_M in knn(train_ND, train_N, test_MD, ks, temperature, data.train.device).items():
                predicted[k][rows_M] = predicted_M.numpy()
    return predicted


def _knn(data: LabelledFeatures, config: EvaluateConfig) -> Predictions:
    x_ND, labels_N = torch.from_numpy(data.train.final_ND), torch.from_numpy(data.labels_N)
    usable = usable_ks(config.ks, len(x_ND))
    predicted = _knn_labels(data, np.arange(len(x_ND)), list(usable), config.temperature)
    rows = np.random.default_rng(config.seed).permutation(len(x_ND))[:MAX_LEAVE_ONE_OUT]
    accuracy_of_k = leave_one_out(x_ND, labels_N, list(usable), config.temperature, torch.from_numpy(np.sort(rows)))
    variants = [({"k": k} | ({} if ks == [k] else {"k asked for": ks}), predicted[k][None]) for k, ks in usable.items()]
    return Predictions(
        "knn",
        variants,
        chosen=list(usable).index(max(accuracy_of_k, key=lambda k: (accuracy_of_k[k], -k))),
        settings={
            "chosen on": f"{len(rows)} training images, leave-one-out",
            "temperature": config.temperature,
            "features": "class token of the last block",
        },
        like={"ks": config.ks, "temperature": config.temperature, "seed": config.seed},
        details={"leave-one-out": {str(k): value for k, value in accuracy_of_k.items()}},
    )


def _few_shot(data: LabelledFeatures, config: EvaluateConfig, shots: int) -> Predictions:
    """k-NN with `shots` training images per class and k = `shots`, for several random choices of these images."""
    predicted = [
        _knn_labels(data, few_shot(data.labels_N, shots, config.seed + seed), [shots], config.temperature)[shots]
        for seed in range(config.shot_seeds)
    ]
    description = {"k": shots, "images of each class": shots, "seeds": config.shot_seeds}
    like = {"shots": shots, "temperature": config.temperature, "seed": config.seed, "seeds": config.shot_seeds}
    settings = {"temperature": config.temperature}
    return Predictions(f"knn_{shots}_shot", [(description, np.stack(predicted))], 0, settings, like)


def _linear(data: LabelledFeatures, config: EvaluateConfig) -> Iterator[Predictions]:
    """The classifier that is best on held-out images and, if configured, the one that is best on the first test set."""
    linear = config.linear
    arguments = data.train, data.labels_N, data.val, len(data.classes), linear
    classifiers = [train_classifiers(*arguments, config.seed + seed, data.allowed_MC) for seed in range(linear.seeds)]
    first_M = data.test_M == 0
    correct_SH = np.stack([data.is_correct(p.predicted_HM.numpy())[:, first_M].mean(1) for p in classifiers])
    variants = []
    choices = {"held-out": [p.chosen for p in classifiers], "best on val": correct_SH.argmax(1).tolist()}
    for choice, chosen in choices.items():
        names = [_classifier_name(*p.settings[h]) for p, h in zip(classifiers, chosen)]
        description = {"choice": choice, "classifier": names[0] if len(names) == 1 else names}
        variants.append((description, np.stack([p.predicted_HM[h].numpy() for p, h in zip(classifiers, chosen)])))
    held_out_SH = np.stack([p.held_out_H.numpy() for p in classifiers])
    settings = classifiers[0].settings
    accuracies = zip(settings, held_out_SH.mean(0).tolist(), correct_SH.mean(0).tolist(), strict=True)
    tried = [{"classifier": _classifier_name(*s), "held-out": held_out, "val": val} for s, held_out, val in accuracies]
    for val in (choice == "val" for choice in config.choose):
        yield Predictions(
            "linear_chosen_on_val" if val else "linear",
            variants,
            chosen=int(val),
            settings={
                "chosen on": "the images it is measured on" if val else classifiers[0].chosen_on,
                "chosen from": len(settings),
                "scale": linear.scale,
                "steps": classifiers[0].steps,
                "batch": classifiers[0].batch,
                "seeds": linear.seeds,
            },
            like={"linear": linear, "seed": config.seed},
            details={"classifiers": tried},
        )


def _logistic(data: LabelledFeatures, config: EvaluateConfig) -> Predictions:
    fitted = logistic(
        data.train.final_ND, data.labels_N, data.val.final_ND, len(data.classes), config.logistic, config.seed
    )
    logits_MC = fitted.logits_MC
    if data.allowed_MC is not None:
        logits_MC = logits_MC.masked_fill(~torch.from_numpy(data.allowed_MC), -torch.inf)
    strengths = {f"{c:.3g}": float(v) for c, v in zip(fitted.strengths, fitted.held_out_J)}
    return Predictions(
        "logistic",
        [({"C": float(f"{fitted.strengths[fitted.chosen]:.4g}")}, logits_MC.argmax(1).numpy()[None])],
        chosen=0,
        settings={
            "chosen on": fitted.chosen_on,
            "chosen from": len(fitted.strengths),
            "features": "class token of the last block",
        },
        like={"logistic": config.logistic, "seed": config.seed},
        details={"held-out accuracy by C": strengths},
    )


def _kmeans_score(
    backbone: Any, data: LabelledFeatures, test: int, dataset: str, images: str, config: EvaluateConfig
) -> Result:
    """Agreement of the classes with as many k-means clusters, averaged over initialisations."""
    rows_M = np.flatnonzero(data.test_M == test)
    labels_M, x_MD = data.labels_MA[rows_M, 0], torch.from_numpy(data.val.final_ND[rows_M])
    clusters = len(np.unique(labels_M))
    clusters_SM = [
        kmeans(x_MD, clusters, config.kmeans_iterations, config.seed + s).numpy() for s in range(config.cluster_seeds)
    ]

    def agreement(rows_M: np.ndarray) -> float:
        return float(np.mean([metrics.nmi(clusters_M[rows_M], labels_M[rows_M]) for clusters_M in clusters_SM]))

    value, order = agreement(np.arange(len(rows_M))), np.random.default_rng(config.seed).permutation(len(rows_M))
    groups = min(JACKKNIFE_GROUPS, len(rows_M))
    leave_out = np.array([agreement(np.delete(order, np.s_[g::groups])) for g in range(groups)])
    error = 1.96 * float(np.sqrt((groups - 1) / groups * ((leave_out - leave_out.mean()) ** 2).sum()))
    settings = {
        "clusters": clusters, "seeds": config.cluster_seeds, "rounds": config.kmeans_iterations, "val": len(rows_M),
        "features": "class token of the last block", "interval": f"95 %, jackknife over {groups} groups of images",
    }  # fmt: skip
    like = likeness(backbone, images, rounds=config.kmeans_iterations, seeds=config.cluster_seeds, seed=config.seed)
    low, high = max(0.0, value - error), min(1.0, value + error)
    return Result("kmeans", dataset, "nmi", min(1.0, value), low, high, settings, like)


def _classifier_name(blocks: int, pooling: str, rate: float) -> str:
    return f"{blocks} {'block' if blocks == 1 else 'blocks'}, {pooling}, rate {rate:g}"


def _score(
    predictions: Predictions, data: LabelledFeatures, test: int, dataset: str, split: str, like: dict,
    config: EvaluateConfig,
) -> Result:  # fmt: skip
    """The score and the details of these predictions on one test set."""
    rows_M = np.flatnonzero(data.test_M == test)
    labels_M, scored = data.labels_MA[rows_M, 0], []
    for description, predicted_SM in predictions.variants:
        correct_M = data.is_correct(predicted_SM)[:, rows_M].mean(0)
        low, high = metrics.bootstrap_interval(correct_M, config.resamples, config.seed)
        scored.append(description | {"value": float(correct_M.mean()), "low": low, "high": high})
    description, predicted_SM = predictions.variants[predictions.chosen]
    headline, best = scored[predictions.chosen], max(scored, key=lambda t: t["value"])
    untrained = int((~np.isin(labels_M, data.labels_N)).sum())
    settings = description | predictions.settings
    if len(scored) > 1:
        settings["best on val"] = {k: v for k, v in best.items() if k not in ("choice", "low", "high")}
    settings |= {"train": len(data.labels_N), "val": len(rows_M), "classes": len(data.classes), "split": split}
    if data.allowed_MC is not None and not data.allowed_MC[rows_M[0]].all():
        settings["answers"] = f"only the {int(data.allowed_MC[rows_M[0]].sum())} classes of this set"
    settings["interval"] = f"95 %, bootstrap over images, {config.resamples} resamples"
    if unreadable := len(data.train.unreadable) + len(data.val.unreadable):
        settings["images left out"] = unreadable
    if untrained:
        settings["val images of classes without training images (counted as wrong)"] = untrained
    correct_M, predicted_SM = data.is_correct(predicted_SM)[:, rows_M].mean(0), predicted_SM[:, rows_M]
    per_class_C = metrics.class_accuracy(correct_M, labels_M, len(data.classes))
    wrong_SM = np.where(data.is_correct(predictions.variants[predictions.chosen][1])[:, rows_M], labels_M, predicted_SM)
    mistakes = metrics.top_confusions(wrong_SM.ravel(), np.tile(labels_M, len(wrong_SM)), len(data.classes))
    details = {
        "variants": scored,
        "class mean": float(np.nanmean(per_class_C)),
        "per class": {data.classes[c]: float(v) for c, v in enumerate(per_class_C) if not np.isnan(v)},
        "mistakes": [{"class": data.classes[a], "taken for": data.classes[b], "images": n} for a, b, n in mistakes],
        "left out": {"train": data.train.unreadable, "val": data.val.unreadable},
    }
    return Result(
        predictions.protocol, dataset, "accuracy", headline["value"], headline["low"], headline["high"], settings, like,
        details | predictions.details,
    )  # fmt: skip


def _resolve_numbers(labels: Sequence[str], train_classes: list[str]) -> list[str]:
    """Replace labels that are positions among the sorted training classes by the names (ImageNet-V2, ReaL)."""
    parts = {part for label in set(labels) for part in label.split(LABEL_SEPARATOR)}
    if not all(p.isdecimal() and int(p) < len(train_classes) for p in parts) or parts <= set(train_classes):
        return list(labels)
    return [LABEL_SEPARATOR.join(train_classes[int(part)] for part in label.split(LABEL_SEPARATOR)) for label in labels]


def _allowed_classes(test: list[list[str]], train_classes: list[str], code: dict[str, int]) -> np.ndarray | None:
    """Mask (C,) of the classes of a test set; None if it has all training classes."""
    present = {name for names in test for name in names}
    if present >= set(train_classes):
        return None
    allowed_C = np.zeros(len(code), bool)
    allowed_C[[code[name] for name in present]] = True
    return allowed_C


def _concatenate(parts: list[FrozenFeatures]) -> FrozenFeatures:
    if len(parts) == 1:
        return parts[0]
    cls, mean, rows = (np.concatenate([getattr(p, name) for p in parts]) for name in ("cls_NLD", "mean_NLD", "rows"))
    unreadable = {path: why for part in parts for path, why in part.unreadable.items()}
    return FrozenFeatures(parts[0].backbone, cls, mean, rows, unreadable)


def _check_two_classes(labels: Sequence[str] | np.ndarray) -> None:
    if len(classes := set(labels)) < 2:
        raise UsageError(f"all {len(labels)} training images have the label {classes.pop()!r}: two classes are needed")
