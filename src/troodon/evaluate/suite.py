"""Every protocol for every backbone: one artifact of scores.

scores.json    one entry for each backbone and protocol, as it would be without having seen the validation labels
details.json   for each of these: every variant tried, with intervals; classes; mistakes; images left out
pictures/      of the first backbone: pca.png (where it has patches), neighbours.png
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from troodon import run
from troodon.config import UsageError, fingerprint, to_dict
from troodon.data.decode import decode
from troodon.data.index import Index
from troodon.evaluate import metrics
from troodon.evaluate.config import EvaluateConfig
from troodon.evaluate.features import Extractor, FrozenFeatures, extract, images_fingerprint
from troodon.evaluate.knn import knn, leave_one_out, used_ks
from troodon.evaluate.linear import probe
from troodon.evaluate.pictures import PAIRS, neighbours_picture, pca_picture, spread
from troodon.evaluate.split import few_shot, how_split, labelled, split

__all__ = ["evaluate", "how_split", "split"]

# Shape suffixes: N training images, M validation images, S seeds.

BLOCKS = 4  # of which features are kept, at least, so that other settings find them
JUDGES = 5000  # training images, at most, that choose k


@dataclass(frozen=True)
class Task:
    """One backbone's features of one data set; labels are places in `classes`, the sorted names of all that occur."""

    train: FrozenFeatures
    val: FrozenFeatures
    labels_N: np.ndarray
    labels_M: np.ndarray
    classes: list[str]


@dataclass(frozen=True)
class Outcome:
    """What a protocol gives: variants, each with what it is and predictions (S, M); the one that counts; and why it."""

    protocol: str
    variants: list[tuple[dict, np.ndarray]]
    counts: int
    settings: dict
    details: dict


def evaluate(
    backbones: Sequence[Extractor],
    train: Index,
    val: Index,
    dataset: str,
    config: EvaluateConfig,
    out: Path,
    *,
    how: str = "as given",
    batch: int = 64,
    threads: int = 0,
    cache: Path | None = None,
) -> list[dict]:
    """Scores of every backbone, the one of interest first, written to the folder `out` and returned.

    `how` says in words how the images were divided (see `how_split`); it is recorded. Finished scores are returned as
    they are. UsageError for data without labels, with fewer than two classes, or with images on both sides, and for
    an `out` that holds other scores.
    """
    train, val = labelled(train), labelled(val)
    _check(train, val)
    named = _distinct(backbones)
    settings = to_dict(config) | {"dataset": dataset, "split": how, "backbones": list(named)}
    images = [images_fingerprint(index, "label") for index in (train, val)]
    made_of = fingerprint(settings, images, [b.fingerprint for b in named.values()])
    if run.is_done(out, "scores", made_of, settings):
        run.say(f"{out}: already there")
        return run.read_json(out / "scores.json")

    scores, details = [], []
    blocks = max(BLOCKS, *config.linear.blocks)
    run.say(f"suite {config.suite}: {len(named)} backbones, {len(train)} images to learn from, {len(val)} to test on")
    with run.publish(out, "scores", made_of, settings) as folder:
        for place, (name, backbone) in enumerate(named.items()):
            near, far = (
                extract(backbone, index, blocks=blocks, batch=batch, threads=threads, cache=cache)
                for index in (train, val)
            )
            task = _task(near, far, train, val)
            for outcome in _outcomes(task, config):
                score, detail = _report(outcome, task, dataset, name, how, config)
                scores.append(score)
                details.append(detail)
                run.say(f"{name}: {outcome.protocol} {score['value']:.1%} ({score['low']:.1%} to {score['high']:.1%})")
            if place == 0:
                _draw(backbone, near, far, train, val, folder / "pictures")
        run.write_json(folder / "scores.json", scores)
        run.write_json(folder / "details.json", details)
    return scores


def _outcomes(task: Task, config: EvaluateConfig) -> Iterator[Outcome]:
    if "knn" in config.protocols:
        yield _knn(task, config)
        for shots in config.shots:
            yield _few_shot(task, config, shots)
    if "linear" in config.protocols:
        yield _linear(task, config)


def _knn(task: Task, config: EvaluateConfig) -> Outcome:
    x_ND, labels_N = torch.from_numpy(task.train.final_ND), torch.from_numpy(task.labels_N)
    used = used_ks(config.ks, len(x_ND))
    predicted = knn(x_ND, labels_N, torch.from_numpy(task.val.final_ND), list(used), config.temperature)
    judges = np.random.default_rng(config.seed).permutation(len(x_ND))[:JUDGES]
    judged = leave_one_out(x_ND, labels_N, list(used), config.temperature, torch.from_numpy(np.sort(judges)))
    variants = [
        ({"k": k} | ({} if asked == [k] else {"k asked for": asked}), predicted[k].numpy()[None])
        for k, asked in used.items()
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
        details={"leave-one-out": {str(k): value for k, value in judged.items()}},
    )


def _few_shot(task: Task, config: EvaluateConfig, shots: int) -> Outcome:
    """As many neighbours vote as a class has images; the value is the mean over choices of these images."""
    x_ND, x_MD = torch.from_numpy(task.train.final_ND), torch.from_numpy(task.val.final_ND)
    predicted = []
    for seed in range(config.shot_seeds):
        rows = torch.from_numpy(few_shot(task.labels_N, shots, config.seed + seed))
        found = knn(x_ND[rows], torch.from_numpy(task.labels_N)[rows], x_MD, [shots], config.temperature)
        predicted.append(found[shots].numpy())
    what = {"k": shots, "images of each class": shots, "seeds": config.shot_seeds}
    return Outcome(
        f"knn_{shots}_shot", [(what, np.stack(predicted))], 0, {"temperature": config.temperature}, details={}
    )


def _linear(task: Task, config: EvaluateConfig) -> Outcome:
    linear = config.linear
    probes = [
        probe(task.train, task.labels_N, task.val, len(task.classes), linear, config.seed + seed)
        for seed in range(linear.seeds)
    ]
    right_SH = np.stack([(p.predicted_HM.numpy() == task.labels_M).mean(1) for p in probes])
    variants = []
    for how, heads in (("held-out", [p.chosen for p in probes]), ("best on val", right_SH.argmax(1).tolist())):
        said = [_classifier(*p.settings[h]) for p, h in zip(probes, heads)]
        what = {"choice": how, "classifier": said[0] if len(said) == 1 else said}
        variants.append((what, np.stack([p.predicted_HM[h].numpy() for p, h in zip(probes, heads)])))
    held_out_SH = np.stack([p.held_out_H.numpy() for p in probes])
    return Outcome(
        "linear",
        variants,
        counts=0,
        settings={
            "chosen on": probes[0].chosen_on,
            "chosen from": len(probes[0].settings),
            "scale": linear.scale,
            "steps": probes[0].steps,
            "batch": probes[0].batch,
            "seeds": linear.seeds,
        },
        details={
            "classifiers": [
                {"classifier": _classifier(*s), "held-out": float(held), "val": float(right)}
                for s, held, right in zip(probes[0].settings, held_out_SH.mean(0), right_SH.mean(0), strict=True)
            ]
        },
    )


def _classifier(blocks: int, pooling: str, rate: float) -> str:
    return f"{blocks} {'block' if blocks == 1 else 'blocks'}, {pooling}, rate {rate:g}"


def _report(
    outcome: Outcome, task: Task, dataset: str, name: str, how: str, config: EvaluateConfig
) -> tuple[dict, dict]:
    """The entry of scores.json and that of details.json."""
    tried = []
    for what, predicted_SM in outcome.variants:
        right_M = (predicted_SM == task.labels_M).mean(0)
        low, high = metrics.interval(right_M, config.resamples, config.seed)
        tried.append(what | {"value": float(right_M.mean()), "low": low, "high": high})
    what, predicted_SM = outcome.variants[outcome.counts]
    headline, best = tried[outcome.counts], max(tried, key=lambda t: t["value"])
    unseen = int((~np.isin(task.labels_M, task.labels_N)).sum())
    settings = what | outcome.settings
    if len(tried) > 1:
        settings["best on val"] = {k: v for k, v in best.items() if k not in ("choice", "low", "high")}
    settings |= {"train": len(task.labels_N), "val": len(task.labels_M), "classes": len(task.classes), "split": how}
    settings["interval"] = f"95 %, bootstrap over images, {config.resamples} resamples"
    if left_out := len(task.train.left_out) + len(task.val.left_out):
        settings["images left out"] = left_out
    if unseen:
        settings["val images of classes without training images (counted as wrong)"] = unseen
    score = metrics.score(
        outcome.protocol, dataset, "accuracy", headline["value"], headline["low"], headline["high"], settings, name
    )
    right_M = (predicted_SM == task.labels_M).mean(0)
    per_class_C = metrics.class_accuracy(right_M, task.labels_M, len(task.classes))
    mistakes = metrics.confusions(predicted_SM.ravel(), np.tile(task.labels_M, len(predicted_SM)), len(task.classes))
    details = {
        "backbone": name,
        "protocol": outcome.protocol,
        "variants": tried,
        "class mean": float(np.nanmean(per_class_C)),
        "per class": {task.classes[c]: float(v) for c, v in enumerate(per_class_C) if not np.isnan(v)},
        "mistakes": [{"class": task.classes[a], "taken for": task.classes[b], "images": n} for a, b, n in mistakes],
        "left out": {"train": task.train.left_out, "val": task.val.left_out},
    }
    return score, details | outcome.details


def _task(near: FrozenFeatures, far: FrozenFeatures, train: Index, val: Index) -> Task:
    labels = [np.asarray(index.column("label"))[f.rows] for index, f in ((train, near), (val, far))]
    _two_classes(labels[0])
    classes, codes = np.unique(np.concatenate(labels), return_inverse=True)
    return Task(near, far, codes[: len(near.rows)], codes[len(near.rows) :], classes.tolist())


def _check(train: Index, val: Index) -> None:
    _two_classes(train.column("label"))
    places = [set(zip(i.column("container"), i.column("offset"), strict=True)) for i in (train, val)]
    if both := len(places[0] & places[1]):
        raise UsageError(f"{both} of {len(val)} images to test on are also images to learn from: keep them apart")


def _two_classes(labels: Sequence[str] | np.ndarray) -> None:
    if len(found := set(labels)) < 2:
        raise UsageError(f"all {len(labels)} images to learn from have the label {found.pop()!r}: two are needed")


def _distinct(backbones: Sequence[Extractor]) -> dict[str, Extractor]:
    """Backbones by name; one given twice is taken once, and different ones of one name get their fingerprints."""
    unique = {b.fingerprint: b for b in backbones}.values()
    names = [b.name for b in unique]
    return {b.name if names.count(b.name) == 1 else f"{b.name} {b.fingerprint[:6]}": b for b in unique}


def _draw(
    backbone: Extractor, near: FrozenFeatures, far: FrozenFeatures, train: Index, val: Index, folder: Path
) -> None:
    neighbours_picture(train, val, (near, far), folder / "neighbours.png")
    if far.mean_NLD.shape[-1]:
        rows = far.rows[spread([val.table["label"][int(row)].as_py() for row in far.rows], 3 * PAIRS)]
        pca_picture(backbone, [decode(val.read(int(row)), backbone.channels) for row in rows], folder / "pca.png")
