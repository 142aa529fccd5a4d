"""Run every protocol for every backbone on every dataset, and write one artifact of scores.

scores.json    one entry for each backbone, protocol and metric. Nothing in it is chosen on test labels, unless the
               protocol name says so
details.json   for each entry: all variants with their intervals, per-class accuracy, confusions, unreadable images
pictures/      of the first backbone: pca.png (if it has patches) and neighbours.png
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from troodon import dist, run
from troodon.config import UsageError, fingerprint, to_dict
from troodon.evaluate import classify, dense_protocols, tags
from troodon.evaluate.baselines import LocationPrior
from troodon.evaluate.config import EvaluateConfig, Protocol
from troodon.evaluate.discover import discover
from troodon.evaluate.features import Extractor, Reader, extract, files_fingerprint
from troodon.evaluate.match import match
from troodon.evaluate.metrics import ERROR_METRICS, score_entry
from troodon.evaluate.pictures import PAIRS, draw_neighbours, draw_pca, spread_over_classes
from troodon.evaluate.results import Result, releases, versions, view
from troodon.evaluate.retrieve import detect_copies, retrieve
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.evaluate.split import describe_split, labelled, split
from troodon.images.index import Index
from troodon.lock import one_at_a_time
from troodon.text import plural, set_aside

ProtocolFunction = Callable[[Any, Benchmark, EvaluateConfig, Reader], Iterator[Result]]
# For each kind of dataset except "label": protocol, function, and whether the function needs patch tokens.
PROTOCOLS_OF_KIND: dict[str, list[tuple[Protocol, ProtocolFunction, bool]]] = {
    "tags": [("logistic", tags.classify_tags, False), ("discover", discover, True)],
    "retrieval": [("retrieve", retrieve, False)],
    "copies": [("copies", detect_copies, False)],
    "mask": [("segment", dense_protocols.evaluate_dense, True), ("match", match, True)],
    "depth": [("depth", dense_protocols.evaluate_dense, True), ("match", match, True)],
    "none": [("match", match, True)],
}


@one_at_a_time
def evaluate(
    backbones: Sequence[Extractor],
    benchmarks: Sequence[Benchmark],
    config: EvaluateConfig,
    out: Path,
    *,
    reader: Reader | None = None,
) -> list[dict]:
    """Score every backbone, write the scores to the folder `out`, and return them.

    The first backbone is the one of interest, of which pictures are drawn. Several ranks share the feature extraction;
    then every rank computes the same scores, and rank 0 writes them. Finished scores are read and returned. Raises
    UsageError before anything runs if the protocols cannot measure a dataset, if an image is in both the training and a
    test set, or if `out` holds other scores.
    """
    reader = reader or Reader()
    datasets, others = group_datasets(benchmarks, config)
    for dataset in datasets:
        classify.check(dataset)
    for benchmark in others:
        dense_protocols.check(benchmark, config)
    by_name = _unique_backbones(backbones)
    settings = _recorded(config) | {"datasets": [b.name for b in benchmarks], "backbones": list(by_name)}
    settings["compute"] = [view(b).get("compute", "none") for b in by_name.values()]
    images = [files_fingerprint(index, *columns) for index, *columns in _all_indexes(benchmarks)]
    images += [digest for b in benchmarks if (digest := b.truth_digest())]
    inputs = fingerprint(settings, images, [b.fingerprint for b in by_name.values()])
    if run.is_done(out, "scores", inputs, settings):
        run.say(f"{out}: already there")
        return run.read_json(out / "scores.json")
    scores, details, packages = [], [], versions()
    report = run.say if dist.rank() == 0 else lambda message: None
    count = sum(len(b.images) for b in benchmarks)
    counts = (plural(len(by_name), "backbone"), plural(len(benchmarks), "dataset"), plural(count, "image"))
    report(f"suite {config.suite}: {', '.join(counts)}")
    for note in _notes(benchmarks, datasets, config):
        report(note)
    for name, backbone in by_name.items():
        # Features of the first backbone stay in memory until its pictures are drawn.
        backbone_reader = replace(reader, in_memory={} if scores else reader.in_memory)
        for result in _run_protocols(backbone, datasets, others, config, backbone_reader):
            entry = score_entry(result.protocol, result.dataset, result.metric, result.value, result.low, result.high,
                                result.settings | {"versions": packages}, name,
                                result.like | {"releases": releases(packages)})  # fmt: skip
            scores.append(entry)
            identity = {"protocol": result.protocol, "dataset": result.dataset, "metric": result.metric}
            details.append({"backbone": name} | identity | result.details)
            report(format_score(entry))
    if not scores:
        raise UsageError(f"suite {config.suite}: no dataset here suits its protocols ({', '.join(config.protocols)})")
    if dist.rank() == 0:
        with run.publish(out, "scores", inputs, settings) as folder:
            if datasets and hasattr(backbones[0], "features"):
                _draw_pictures(backbones[0], datasets[0], config, replace(reader, shared=False), folder / "pictures")
            run.write_json(folder / "scores.json", scores)
            run.write_json(folder / "details.json", details)
    if reader.set_aside:
        report(f"evaluate: {set_aside(Counter(reader.set_aside.values()), count)}")
    dist.barrier()
    return scores


def _notes(
    benchmarks: Sequence[Benchmark], datasets: Sequence[classify.LabelledDataset], config: EvaluateConfig
) -> Iterator[str]:
    """What is missing from the ground truth of the datasets, in lines."""
    for benchmark in (b for b in benchmarks if b.kind == "label"):
        count, missing = len(benchmark.images), benchmark.images.table["label"].null_count
        if missing == count:
            yield f"{benchmark.name}: none of its {count:,} images has a label, as folders of one name are no classes"
        elif missing:
            text = f"{missing:,} of its {count:,} images have no label, and are set aside"
            yield f"{'alarm: ' if 2 * missing > count else ''}{benchmark.name}: {text}"
    for dataset in datasets:
        yield from classify.notes(dataset)


def _recorded(config: EvaluateConfig) -> dict:
    """The settings under their names on disk. These never change, so that earlier scores are still found."""
    on_disk = {new: old for old, new in config.RENAMED.items()}
    return {on_disk.get(name, name): value for name, value in to_dict(config).items()}


def format_score(entry: dict) -> str:
    """Format a score as a line of text."""
    number_format = ".3f" if entry["metric"] in ERROR_METRICS else ".1%"
    low, value, high = (f"{entry[key]:{number_format}}" for key in ("low", "value", "high"))
    identity = f"{entry['backbone']}: {entry['protocol']} on {entry['dataset']}"
    return f"{identity}, {entry['metric']} {value} ({low} to {high})"


def group_datasets(
    benchmarks: Sequence[Benchmark], config: EvaluateConfig
) -> tuple[list[classify.LabelledDataset], list[Benchmark]]:
    """Group classification datasets with the test sets that use their training images; return these and all others.

    With the protocol match, a dataset without any label is one of the others. Raises UsageError for a test set whose
    training dataset is not given.
    """
    if "match" in config.protocols:
        benchmarks = [replace(b, kind="none") if _without_labels(b) else b for b in benchmarks]
    labels = [b for b in benchmarks if b.kind == "label"]
    datasets = {}
    for b in (b for b in labels if b.train_benchmark is None):
        train, val = split(b.images, config.seed)
        datasets[b.name] = classify.LabelledDataset(b.name, train, {b.name: val}, describe_split(b.images, config.seed))
    for b in (b for b in labels if b.train_benchmark is not None):
        if b.train_benchmark not in datasets:
            raise UsageError(f"{b.name}: has only test images; also give {b.train_benchmark}, to train on")
        datasets[b.train_benchmark].tests[b.name] = labelled(b.images)
    return list(datasets.values()), [b for b in benchmarks if b.kind != "label"]


def _without_labels(benchmark: Benchmark) -> bool:
    return benchmark.kind == "label" and benchmark.images.table["label"].null_count == len(benchmark.images)


def _run_protocols(
    backbone: Any, datasets: list[classify.LabelledDataset], others: list[Benchmark], config: EvaluateConfig,
    reader: Reader,
) -> Iterator[Result]:  # fmt: skip
    """Run the protocols that this backbone supports: a descriptor may have no patches, or only patches."""
    if hasattr(backbone, "features"):
        for dataset in datasets:
            yield from classify.classify(backbone, dataset, config, reader)
    for benchmark in others:
        for protocol, function, needs_patches in PROTOCOLS_OF_KIND[benchmark.kind]:
            if protocol in config.protocols and isinstance(backbone, LocationPrior):
                if function is dense_protocols.evaluate_dense:
                    yield from dense_protocols.evaluate_location_prior(benchmark, config)
            elif protocol in config.protocols and hasattr(backbone, "tokens" if needs_patches else "features"):
                yield from function(backbone, benchmark, config, reader)


def _all_indexes(benchmarks: Sequence[Benchmark]) -> Iterator[tuple[Index, str, str]]:
    for benchmark in benchmarks:
        yield benchmark.images, "label", "split"
        if benchmark.ground_truth is not None:
            yield benchmark.ground_truth, "label", "split"


def _unique_backbones(backbones: Sequence[Extractor]) -> dict[str, Extractor]:
    """Backbones by name. Duplicates are removed; different backbones of one name get their fingerprints appended."""
    unique = {b.fingerprint: b for b in reversed(backbones)}  # the first one gives the name
    unique = [b for b in backbones if unique[b.fingerprint] is b]
    names = [b.name for b in unique]
    return {b.name if names.count(b.name) == 1 else f"{b.name} {b.fingerprint[:6]}": b for b in unique}


def _draw_pictures(
    backbone: Any, dataset: classify.LabelledDataset, config: EvaluateConfig, reader: Reader, folder: Path
) -> None:
    blocks = max(classify.MIN_BLOCKS, *config.linear.blocks)
    train, val = dataset.train, next(iter(dataset.tests.values()))
    train_features, val_features = (extract(backbone, index, blocks=blocks, reader=reader) for index in (train, val))
    draw_neighbours(train, val, (train_features, val_features), folder / "neighbours.png")
    if val_features.mean_NLD.shape[-1]:
        labels = [val.table["label"][int(row)].as_py() for row in val_features.rows]
        rows = val_features.rows[spread_over_classes(labels, 3 * PAIRS)]
        draw_pca(backbone, [val.decode(int(row), backbone.channels) for row in rows], folder / "pca.png")
