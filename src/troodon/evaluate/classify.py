"""Frozen features and class labels: k-NN, linear classifiers, logistic regression, clusters.

One set of images teaches, and one or several test: ImageNet's own validation images, and others that were collected
for the same classes. Of these, one that holds only some of the classes is answered with them alone, and an image may
have several right labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from troodon.config import UsageError
from troodon.evaluate import metrics
from troodon.evaluate.cluster import kmeans
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, FrozenFeatures, Reader, extract, same_images
from troodon.evaluate.knn import knn, leave_one_out, used_ks
from troodon.evaluate.linear import probe
from troodon.evaluate.logistic import logistic
from troodon.evaluate.results import Result, likeness
from troodon.evaluate.sets.benchmark import SEVERAL
from troodon.evaluate.split import few_shot
from troodon.images.index import Index

# Shape suffixes: N training images, M images to test on, A right labels of an image, C classes, S seeds.

BLOCKS = 4  # of which features are kept, at least, so that other settings find them
JUDGES = 5000  # training images, at most, that choose k
GROUPS = 20  # of images that the interval of a clustering leaves out in turn


@dataclass(frozen=True)
class Lesson:
    """Images to learn from, and sets of images to test on, by name; how they were divided, in words."""

    name: str
    train: Index
    tests: dict[str, Index]
    how: str


@dataclass(frozen=True)
class Task:
    """One backbone's features; labels are places in `classes`, the sorted names of all that occur."""

    train: FrozenFeatures
    val: FrozenFeatures  # of all tests, one after the other
    labels_N: np.ndarray
    labels_MA: np.ndarray  # -1 where an image has fewer right labels than another
    classes: list[str]
    test_M: np.ndarray  # the test that an image is of
    allowed_MC: np.ndarray | None  # the classes that may be the answer, where not all may

    def right(self, predicted_SM: np.ndarray) -> np.ndarray:
        """Whether each is one of the right labels (S, M)."""
        return (predicted_SM[:, :, None] == self.labels_MA).any(-1)


@dataclass(frozen=True)
class Outcome:
    """What a protocol gives: variants, each with what it is and predictions (S, M); the one that counts; and why it."""

    protocol: str
    variants: list[tuple[dict, np.ndarray]]
    counts: int
    settings: dict
    like: dict
    details: dict = field(default_factory=dict)


def classify(backbone: Extractor, lesson: Lesson, config: EvaluateConfig, reader: Reader) -> Iterator[Result]:
    """All scores of one backbone. Nothing is chosen on the images it is measured on, unless it says so."""
    task = tasked(backbone, lesson, config, reader)
    tests = list(lesson.tests)
    prints = [
        same_images(lesson.train, "label"),
        *(same_images(i, "label") for i in lesson.tests.values()),
    ]
    for outcome in _outcomes(task, config):
        for place, name in enumerate(tests):
            like = likeness(backbone, f"{prints[0]} {prints[1 + place]}", **outcome.like)
            yield _result(outcome, task, place, name, lesson.how, like, config)
    if "kmeans" in config.protocols:
        for place, name in enumerate(tests):
            yield _clusters(backbone, task, place, name, prints[1 + place], config)


def check(lesson: Lesson) -> None:
    """UsageError for fewer than two classes, and for images on both sides."""
    _two_classes(lesson.train.column("label"))
    places = set(zip(lesson.train.column("container"), lesson.train.column("offset"), strict=True))
    for test in lesson.tests.values():
        if both := len(places & set(zip(test.column("container"), test.column("offset"), strict=True))):
            raise UsageError(f"{both} of {len(test)} images to test on are also images to learn from: keep them apart")


def tasked(backbone: Extractor, lesson: Lesson, config: EvaluateConfig, reader: Reader) -> Task:
    """Features of all images, once, and labels as numbers."""
    blocks = max(BLOCKS, *config.linear.blocks)
    near = extract(backbone, lesson.train, blocks=blocks, reader=reader)
    far = [extract(backbone, index, blocks=blocks, reader=reader) for index in lesson.tests.values()]
    labels_N = np.asarray(lesson.train.column("label"))[near.rows]
    _two_classes(labels_N)
    taught = sorted(set(lesson.train.column("label")))
    answers = []
    for place, (index, features) in enumerate(zip(lesson.tests.values(), far)):
        said = _named(index.column("label"), taught) if place else index.column("label")
        answers.append([said[row].split(SEVERAL) if place else [said[row]] for row in features.rows])
    classes = sorted({*taught, *(name for test in answers for names in test for name in names)})
    code = {name: i for i, name in enumerate(classes)}
    widest = max(len(names) for test in answers for names in test)
    labels_MA = np.array([[*map(code.get, n), *[-1] * (widest - len(n))] for test in answers for n in test])
    test_M = np.repeat(np.arange(len(far)), [len(test) for test in answers])
    allowed = [_allowed(test, taught, code) if i else None for i, test in enumerate(answers)]
    return Task(
        near, _joined(far), np.array([code[name] for name in labels_N]), labels_MA, classes, test_M,
        np.stack([np.ones(len(code), bool) if a is None else a for a in allowed])[test_M]
        if any(a is not None for a in allowed) else None,
    )  # fmt: skip


def _outcomes(task: Task, config: EvaluateConfig) -> Iterator[Outcome]:
    if "knn" in config.protocols:
        yield _knn(task, config)
        for shots in config.shots:
            yield _few_shot(task, config, shots)
    if "linear" in config.protocols:
        yield from _linear(task, config)
    if "logistic" in config.protocols:
        yield _logistic(task, config)


def _neighbours(task: Task, rows: np.ndarray, ks: Sequence[int], temperature: float) -> dict[int, np.ndarray]:
    """k-NN (M,) from these training images; for a test of some classes, from images of these alone."""
    x_ND, y_N = task.train.final_ND[rows], task.labels_N[rows]
    predicted = {k: np.full(len(task.test_M), -1) for k in ks}
    for test in np.unique(task.test_M):
        at = np.flatnonzero(task.test_M == test)
        may = np.ones(len(y_N), bool) if task.allowed_MC is None else task.allowed_MC[at[0]][y_N]
        if may.any():
            near, labels, far = (torch.from_numpy(x) for x in (x_ND[may], y_N[may], task.val.final_ND[at]))
            for k, found in knn(near, labels, far, ks, temperature).items():
                predicted[k][at] = found.numpy()
    return predicted


def _knn(task: Task, config: EvaluateConfig) -> Outcome:
    x_ND, labels_N = torch.from_numpy(task.train.final_ND), torch.from_numpy(task.labels_N)
    used = used_ks(config.ks, len(x_ND))
    predicted = _neighbours(task, np.arange(len(x_ND)), list(used), config.temperature)
    judges = np.random.default_rng(config.seed).permutation(len(x_ND))[:JUDGES]
    judged = leave_one_out(x_ND, labels_N, list(used), config.temperature, torch.from_numpy(np.sort(judges)))
    variants = [
        ({"k": k} | ({} if asked == [k] else {"k asked for": asked}), predicted[k][None]) for k, asked in used.items()
    ]
    return Outcome(
        "knn",
        variants,
        counts=list(used).index(max(judged, key=lambda k: (judged[k], -k))),
        settings={
            "chosen on": f"{len(judges)} training images, leave-one-out",
            "temperature": config.temperature,
            "features": "class token of the last block",
        },
        like={"ks": config.ks, "temperature": config.temperature, "seed": config.seed},
        details={"leave-one-out": {str(k): value for k, value in judged.items()}},
    )


def _few_shot(task: Task, config: EvaluateConfig, shots: int) -> Outcome:
    """As many neighbours vote as a class has images; the value is the mean over choices of these images."""
    predicted = [
        _neighbours(task, few_shot(task.labels_N, shots, config.seed + seed), [shots], config.temperature)[shots]
        for seed in range(config.shot_seeds)
    ]
    what = {"k": shots, "images of each class": shots, "seeds": config.shot_seeds}
    like = {"shots": shots, "temperature": config.temperature, "seed": config.seed, "seeds": config.shot_seeds}
    settings = {"temperature": config.temperature}
    return Outcome(f"knn_{shots}_shot", [(what, np.stack(predicted))], 0, settings, like)


def _linear(task: Task, config: EvaluateConfig) -> Iterator[Outcome]:
    """The classifier chosen on held-out images; and, where it is asked for, the one that is best on the first test."""
    linear = config.linear
    probes = [
        probe(task.train, task.labels_N, task.val, len(task.classes), linear, config.seed + seed, task.allowed_MC)
        for seed in range(linear.seeds)
    ]
    first_M = task.test_M == 0
    right_SH = np.stack([task.right(p.predicted_HM.numpy())[:, first_M].mean(1) for p in probes])
    variants = []
    for how, heads in (("held-out", [p.chosen for p in probes]), ("best on val", right_SH.argmax(1).tolist())):
        said = [_classifier(*p.settings[h]) for p, h in zip(probes, heads)]
        what = {"choice": how, "classifier": said[0] if len(said) == 1 else said}
        variants.append((what, np.stack([p.predicted_HM[h].numpy() for p, h in zip(probes, heads)])))
    held_out_SH = np.stack([p.held_out_H.numpy() for p in probes])
    for chosen in config.choose:
        val = chosen == "val"
        yield Outcome(
            "linear_chosen_on_val" if val else "linear",
            variants,
            counts=int(val),
            settings={
                "chosen on": "the images it is measured on" if val else probes[0].chosen_on,
                "chosen from": len(probes[0].settings),
                "scale": linear.scale,
                "steps": probes[0].steps,
                "batch": probes[0].batch,
                "seeds": linear.seeds,
            },
            like={"linear": linear, "seed": config.seed},
            details={
                "classifiers": [
                    {"classifier": _classifier(*s), "held-out": float(held), "val": float(right)}
                    for s, held, right in zip(probes[0].settings, held_out_SH.mean(0), right_SH.mean(0), strict=True)
                ]
            },
        )


def _logistic(task: Task, config: EvaluateConfig) -> Outcome:
    found = logistic(
        task.train.final_ND, task.labels_N, task.val.final_ND, len(task.classes), config.logistic, config.seed
    )
    said_MC = found.logits_MC
    if task.allowed_MC is not None:
        said_MC = said_MC.masked_fill(~torch.from_numpy(task.allowed_MC), -torch.inf)
    strengths = {f"{c:.3g}": float(v) for c, v in zip(found.strengths, found.held_out_J)}
    return Outcome(
        "logistic",
        [({"C": float(f"{found.strengths[found.chosen]:.4g}")}, said_MC.argmax(1).numpy()[None])],
        counts=0,
        settings={
            "chosen on": found.chosen_on,
            "chosen from": len(found.strengths),
            "features": "class token of the last block",
        },
        like={"logistic": config.logistic, "seed": config.seed},
        details={"held-out accuracy by C": strengths},
    )


def _clusters(backbone: Any, task: Task, place: int, dataset: str, images: str, config: EvaluateConfig) -> Result:
    """Agreement of as many clusters as there are classes with these, over several beginnings."""
    at = np.flatnonzero(task.test_M == place)
    labels_M, x_MD = task.labels_MA[at, 0], torch.from_numpy(task.val.final_ND[at])
    clusters = len(np.unique(labels_M))
    found_SM = [kmeans(x_MD, clusters, config.rounds, config.seed + s).numpy() for s in range(config.cluster_seeds)]

    def agreement(kept_M: np.ndarray) -> float:
        return float(np.mean([metrics.mutual_information(found_M[kept_M], labels_M[kept_M]) for found_M in found_SM]))

    value, everyone = agreement(np.arange(len(at))), np.random.default_rng(config.seed).permutation(len(at))
    groups = min(GROUPS, len(at))
    without = np.array([agreement(np.delete(everyone, np.s_[g::groups])) for g in range(groups)])
    error = 1.96 * float(np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum()))
    settings = {
        "clusters": clusters, "seeds": config.cluster_seeds, "rounds": config.rounds, "val": len(at),
        "features": "class token of the last block", "interval": f"95 %, jackknife over {groups} groups of images",
    }  # fmt: skip
    like = likeness(backbone, images, rounds=config.rounds, seeds=config.cluster_seeds, seed=config.seed)
    low, high = max(0.0, value - error), min(1.0, value + error)
    return Result("kmeans", dataset, "nmi", min(1.0, value), low, high, settings, like)


def _classifier(blocks: int, pooling: str, rate: float) -> str:
    return f"{blocks} {'block' if blocks == 1 else 'blocks'}, {pooling}, rate {rate:g}"


def _result(
    outcome: Outcome, task: Task, place: int, dataset: str, how: str, like: dict, config: EvaluateConfig
) -> Result:
    """The score of an outcome on one of the tests, and its details."""
    at = np.flatnonzero(task.test_M == place)
    labels_M, tried = task.labels_MA[at, 0], []
    for what, predicted_SM in outcome.variants:
        right_M = task.right(predicted_SM)[:, at].mean(0)
        low, high = metrics.interval(right_M, config.resamples, config.seed)
        tried.append(what | {"value": float(right_M.mean()), "low": low, "high": high})
    what, predicted_SM = outcome.variants[outcome.counts]
    headline, best = tried[outcome.counts], max(tried, key=lambda t: t["value"])
    unseen = int((~np.isin(labels_M, task.labels_N)).sum())
    settings = what | outcome.settings
    if len(tried) > 1:
        settings["best on val"] = {k: v for k, v in best.items() if k not in ("choice", "low", "high")}
    settings |= {"train": len(task.labels_N), "val": len(at), "classes": len(task.classes), "split": how}
    if task.allowed_MC is not None and not task.allowed_MC[at[0]].all():
        settings["answers"] = f"only the {int(task.allowed_MC[at[0]].sum())} classes of this set"
    settings["interval"] = f"95 %, bootstrap over images, {config.resamples} resamples"
    if left_out := len(task.train.left_out) + len(task.val.left_out):
        settings["images left out"] = left_out
    if unseen:
        settings["val images of classes without training images (counted as wrong)"] = unseen
    right_M, predicted_SM = task.right(predicted_SM)[:, at].mean(0), predicted_SM[:, at]
    per_class_C = metrics.class_accuracy(right_M, labels_M, len(task.classes))
    wrong_SM = np.where(task.right(outcome.variants[outcome.counts][1])[:, at], labels_M, predicted_SM)
    mistakes = metrics.confusions(wrong_SM.ravel(), np.tile(labels_M, len(wrong_SM)), len(task.classes))
    details = {
        "variants": tried,
        "class mean": float(np.nanmean(per_class_C)),
        "per class": {task.classes[c]: float(v) for c, v in enumerate(per_class_C) if not np.isnan(v)},
        "mistakes": [{"class": task.classes[a], "taken for": task.classes[b], "images": n} for a, b, n in mistakes],
        "left out": {"train": task.train.left_out, "val": task.val.left_out},
    }
    return Result(
        outcome.protocol, dataset, "accuracy", headline["value"], headline["low"], headline["high"], settings, like,
        details | outcome.details,
    )  # fmt: skip


def _named(labels: Sequence[str], taught: list[str]) -> list[str]:
    """Labels that are numbers where the classes taught are not: places among these, sorted (ImageNet-V2, ReaL)."""
    parts = {part for label in set(labels) for part in label.split(SEVERAL)}
    if not all(p.isdecimal() and int(p) < len(taught) for p in parts) or parts <= set(taught):
        return list(labels)
    return [SEVERAL.join(taught[int(part)] for part in label.split(SEVERAL)) for label in labels]


def _allowed(test: list[list[str]], taught: list[str], code: dict[str, int]) -> np.ndarray | None:
    """The classes of a test that has only some of those taught; None where it has them all."""
    there = {name for names in test for name in names}
    if there >= set(taught):
        return None
    allowed_C = np.zeros(len(code), bool)
    allowed_C[[code[name] for name in there]] = True
    return allowed_C


def _joined(parts: list[FrozenFeatures]) -> FrozenFeatures:
    if len(parts) == 1:
        return parts[0]
    cls, mean, rows = (np.concatenate([getattr(p, name) for p in parts]) for name in ("cls_NLD", "mean_NLD", "rows"))
    left_out = {path: why for part in parts for path, why in part.left_out.items()}
    return FrozenFeatures(parts[0].backbone, cls, mean, rows, left_out)


def _two_classes(labels: Sequence[str] | np.ndarray) -> None:
    if len(found := set(labels)) < 2:
        raise UsageError(f"all {len(labels)} images to learn from have the label {found.pop()!r}: two are needed")
