"""Every protocol for every backbone on every set of data: one artifact of scores.

scores.json    one entry for each backbone, protocol and metric, as it would be without having seen the answers
details.json   for each of these: every variant tried, with intervals; classes; mistakes; images left out
pictures/      of the first backbone: pca.png (where it has patches), neighbours.png
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from troodon import dist, run
from troodon.config import UsageError, fingerprint, to_dict
from troodon.evaluate import classify, pixels, tags
from troodon.evaluate.baselines import LocationPrior
from troodon.evaluate.config import EvaluateConfig, Protocol
from troodon.evaluate.discover import discover
from troodon.evaluate.features import Extractor, Reader, extract, images_fingerprint
from troodon.evaluate.match import match
from troodon.evaluate.metrics import ERRORS, score
from troodon.evaluate.pictures import PAIRS, neighbours_picture, pca_picture, spread
from troodon.evaluate.results import Result, releases, versions, view
from troodon.evaluate.retrieve import find_copies, retrieve
from troodon.evaluate.sets.benchmark import Benchmark
from troodon.evaluate.split import how_split, labelled, split
from troodon.images.decode import decode
from troodon.images.index import Index

Measure = Callable[[Any, Benchmark, EvaluateConfig, Reader], Iterator[Result]]
# What is measured of a set of data that is no set of labels: the protocol, its function, and whether it needs patches.
MEASURES: dict[str, list[tuple[Protocol, Measure, bool]]] = {
    "tags": [("logistic", tags.measure, False), ("discover", discover, True)],
    "retrieval": [("retrieve", retrieve, False)],
    "copies": [("copies", find_copies, False)],
    "mask": [("segment", pixels.measure, True), ("match", match, True)],
    "depth": [("depth", pixels.measure, True), ("match", match, True)],
    "none": [("match", match, True)],
}


def evaluate(
    backbones: Sequence[Extractor],
    benchmarks: Sequence[Benchmark],
    config: EvaluateConfig,
    out: Path,
    *,
    reader: Reader | None = None,
) -> list[dict]:
    """Scores of every backbone, the one of interest first, written to the folder `out` and returned.

    Several ranks, where there are some, share the images; then each does the same sums, and the first writes. Finished
    scores are returned as they are. UsageError, before anything runs, for data that the protocols cannot measure, for
    images on both sides, and for an `out` that holds other scores.
    """
    reader = reader or Reader()
    lessons, others = divided(benchmarks, config)
    for lesson in lessons:
        classify.check(lesson)
    for benchmark in others:
        pixels.check(benchmark, config)
    named = _distinct(backbones)
    settings = to_dict(config) | {"datasets": [b.name for b in benchmarks], "backbones": list(named)}
    settings["compute"] = [view(b).get("compute", "none") for b in named.values()]
    images = [images_fingerprint(index, *columns) for index, *columns in _all_images(benchmarks)]
    made_of = fingerprint(settings, images, [b.fingerprint for b in named.values()])
    if run.is_done(out, "scores", made_of, settings):
        run.say(f"{out}: already there")
        return run.read_json(out / "scores.json")
    scores, details, used = [], [], versions()
    tell = run.say if dist.rank() == 0 else lambda message: None
    count = sum(len(b.images) for b in benchmarks)
    tell(f"suite {config.suite}: {len(named)} backbones, {len(benchmarks)} sets of data, {count:,} images")
    for name, backbone in named.items():
        kept = replace(reader, kept={} if scores else reader.kept)  # of the first, until its pictures are drawn
        for result in _results(backbone, lessons, others, config, kept):
            entry = score(result.protocol, result.dataset, result.metric, result.value, result.low, result.high,
                          result.settings | {"versions": used}, name,
                          result.like | {"releases": releases(used)})  # fmt: skip
            scores.append(entry)
            what = {"protocol": result.protocol, "dataset": result.dataset, "metric": result.metric}
            details.append({"backbone": name} | what | result.details)
            tell(said(entry))
    if not scores:
        raise UsageError(f"suite {config.suite}: none of its protocols ({', '.join(config.protocols)}) has data here")
    if dist.rank() == 0:
        with run.publish(out, "scores", made_of, settings) as folder:
            if lessons and hasattr(backbones[0], "features"):
                _draw(backbones[0], lessons[0], config, replace(reader, shared=False), folder / "pictures")
            run.write_json(folder / "scores.json", scores)
            run.write_json(folder / "details.json", details)
    dist.barrier()
    return scores


def said(entry: dict) -> str:
    """A score in words."""
    form = ".3f" if entry["metric"] in ERRORS else ".1%"
    low, value, high = (f"{entry[key]:{form}}" for key in ("low", "value", "high"))
    what = f"{entry['backbone']}: {entry['protocol']} on {entry['dataset']}"
    return f"{what}, {entry['metric']} {value} ({low} to {high})"


def divided(benchmarks: Sequence[Benchmark], config: EvaluateConfig) -> tuple[list[classify.Lesson], list[Benchmark]]:
    """Sets of labels, each with those that it teaches; and the others, that without a label among them where patches
    are to be matched, which takes none. UsageError for one that nothing here teaches."""
    if "match" in config.protocols:
        benchmarks = [replace(b, kind="none") if _without_labels(b) else b for b in benchmarks]
    labels = [b for b in benchmarks if b.kind == "label"]
    lessons = {}
    for b in (b for b in labels if b.learns_from is None):
        train, val = split(b.images, config.seed)
        lessons[b.name] = classify.Lesson(b.name, train, {b.name: val}, how_split(b.images, config.seed))
    for b in (b for b in labels if b.learns_from is not None):
        if b.learns_from not in lessons:
            raise UsageError(f"{b.name}: has only images to test on; give {b.learns_from}, to learn from, beside it")
        lessons[b.learns_from].tests[b.name] = labelled(b.images)
    return list(lessons.values()), [b for b in benchmarks if b.kind != "label"]


def _without_labels(benchmark: Benchmark) -> bool:
    return benchmark.kind == "label" and benchmark.images.table["label"].null_count == len(benchmark.images)


def _results(
    backbone: Any, lessons: list[classify.Lesson], others: list[Benchmark], config: EvaluateConfig, reader: Reader
) -> Iterator[Result]:
    """All that this backbone can do: a descriptor may have no patches, or nothing else."""
    if hasattr(backbone, "features"):
        for lesson in lessons:
            yield from classify.classify(backbone, lesson, config, reader)
    for benchmark in others:
        for protocol, measure, patches in MEASURES[benchmark.kind]:
            if protocol in config.protocols and isinstance(backbone, LocationPrior):
                if measure is pixels.measure:
                    yield from pixels.place_prior(benchmark, config)
            elif protocol in config.protocols and hasattr(backbone, "tokens" if patches else "features"):
                yield from measure(backbone, benchmark, config, reader)


def _all_images(benchmarks: Sequence[Benchmark]) -> Iterator[tuple[Index, str, str]]:
    for benchmark in benchmarks:
        yield benchmark.images, "label", "split"
        if benchmark.truth is not None:
            yield benchmark.truth, "label", "split"


def _distinct(backbones: Sequence[Extractor]) -> dict[str, Extractor]:
    """Backbones by name; one given twice is taken once, and different ones of one name get their fingerprints."""
    unique = {b.fingerprint: b for b in reversed(backbones)}  # the name is that of the first
    unique = [b for b in backbones if unique[b.fingerprint] is b]
    names = [b.name for b in unique]
    return {b.name if names.count(b.name) == 1 else f"{b.name} {b.fingerprint[:6]}": b for b in unique}


def _draw(backbone: Any, lesson: classify.Lesson, config: EvaluateConfig, reader: Reader, folder: Path) -> None:
    blocks = max(classify.BLOCKS, *config.linear.blocks)
    train, val = lesson.train, next(iter(lesson.tests.values()))
    near, far = (extract(backbone, index, blocks=blocks, reader=reader) for index in (train, val))
    neighbours_picture(train, val, (near, far), folder / "neighbours.png")
    if far.mean_NLD.shape[-1]:
        rows = far.rows[spread([val.table["label"][int(row)].as_py() for row in far.rows], 3 * PAIRS)]
        pca_picture(backbone, [decode(val.read(int(row)), backbone.channels) for row in rows], folder / "pca.png")
