"""The verbs `evaluate` (scores of frozen features) and `compare` (scores side by side)."""

import contextlib
import json
import os
import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from troodon.config import Range, UsageError, nearest
from troodon.devices import TRAINABLE, check_device, choose_device, ranks_to_start
from troodon.evaluate.config import EvaluateConfig, get_suite
from troodon.verbs.common import (
    Data,
    Device,
    Paths,
    as_list,
    check_devices,
    common_range,
    is_first,
    launch_ranks,
    on_device,
    require_some,
    resolve_config,
    suggest_next,
    write_config,
)

if TYPE_CHECKING:
    from troodon.images.index import Index
    from troodon.model.backbone import Backbone


def evaluate(
    suite: str | EvaluateConfig,
    backbone: "str | Path | Backbone | list",
    data: Data,
    out: str | Path,
    *,
    baselines: bool = True,
    layout: str | None = None,
    settings: dict | None = None,
    threads: int = 0,
    batch: int = 64,
    cache: str | Path | None = None,
    devices: str | int = "auto",
    compute: str = "fp32",
    range: Range | None = None,
    device: str = "auto",
) -> list[dict]:
    """Measure frozen features by the ground truth that the data has (labels, masks, depths, pairs, ...).

    `backbone` may be a list. With `baselines`, a random network of each shape and descriptors without learning are
    measured too. `compute` is the precision of the networks' products, "fp32" or "bf16". It is never chosen
    automatically, since only scores of the same precision are compared. `range` gives the values of images of more than
    8 bits that become black and white, in place of the backbone's own.

    A place with ground truth in a known layout (see evaluate/sets/layouts.py) is one dataset, and so is a place with
    labels and its own split into training and test images; all other places together are one more dataset. `layout`
    names the layout where the files do not show it. On several devices of this machine ("auto" is all), a process on
    each device processes a part of the images, if backbone and data are given by their paths. `device` is "auto" or
    "cuda" for all of these, or the only one that computes: "cuda:1", "mps" or "cpu". Returns the scores, with their
    intervals and settings.
    """
    config = resolve_config(suite, EvaluateConfig(), get_suite, settings)
    check_devices(devices)
    check_device(device)
    if compute not in ("fp32", "bf16"):
        raise nearest("compute", compute, ("fp32", "bf16"))
    from troodon import dist

    all_paths = all(isinstance(place, str | Path) for place in (*as_list(backbone), *as_list(data)))
    chosen = choose_device(device, TRAINABLE)
    ranks = ranks_to_start(devices) if device in ("auto", "cuda") else 1
    if device not in ("auto", "cuda") and devices not in ("auto", 1, "1"):
        raise UsageError(f"devices {devices}: {chosen} is one device; set device to auto or cuda")
    if all_paths and ranks > 1:
        options = {"layout": layout, "threads": threads, "batch": batch, "cache": cache, "compute": compute}
        options |= {"range": range, "device": device}
        return _evaluate_on_ranks(ranks, config, backbone, data, out, options, baselines)
    with dist.process_group() if "RANK" in os.environ else contextlib.nullcontext():
        return _evaluate(
            config, backbone, data, Path(out), baselines, layout, threads, batch, cache, compute, range, device
        )


def _evaluate_on_ranks(
    ranks: int, config: EvaluateConfig, backbone: object, data: Data, out: str | Path, options: dict, baselines: bool
) -> list[dict]:
    """Evaluate on several processes of this machine."""
    from troodon.run import read_json

    with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
        words = ["evaluate", write_config(config, Path(folder) / "suite.yaml")]
        words += ["--backbone", *map(str, as_list(backbone)), "--data", *map(str, as_list(data))]
        words += ["--out", str(out), *([] if baselines else ["--no-baselines"])]
        words += [
            word
            for key, value in options.items()
            if value is not None
            for word in (f"--{key}", *map(str, as_list(value)))
        ]
        launch_ranks(words, ranks)
    return read_json(Path(out) / "scores.json")


def _evaluate(
    config: EvaluateConfig, backbone: "str | Path | Backbone | list", data: Data, out: Path, baselines: bool,
    layout: str | None, threads: int, batch: int, cache: str | Path | None, compute: str,
    range: Range | None, device: str,
) -> list[dict]:  # fmt: skip
    """Evaluate on this process, which may be one of several ranks."""
    from troodon import dist
    from troodon.evaluate.baselines import ColourHistogram, LocationPrior, PatchColours, RawPixels
    from troodon.evaluate.features import Reader
    from troodon.evaluate.suite import evaluate as run_suite
    from troodon.model.backbone import Backbone

    benchmarks = open_benchmarks(data, layout)
    trained = [on_device(b, range, device, TRAINABLE) for b in as_list(backbone)]
    benchmarks = [with_values(benchmark, common_range(range, *trained)) for benchmark in benchmarks]
    first = trained[0]
    # Layer scale 1: at the small values that training starts from, a random network hardly mixes its patches.
    shapes: dict[tuple, str] = {}
    for b in trained:
        name = f"random, as {b.name}" if shapes else "random"
        shapes.setdefault((replace(b.config, layer_scale=1.0), b.preprocessing), name)
    untrained = [
        replace(Backbone.random(*shape, seed=config.seed), name=name).to(first.device) for shape, name in shapes.items()
    ]
    networks = [*trained, *(untrained if baselines else [])]
    if compute != "fp32":
        networks = [b.optimized(compute) for b in networks]
    descriptors: list[Any] = [
        ColourHistogram(channels=first.channels),
        RawPixels(channels=first.channels),
        PatchColours(first.preprocessing, first.config.patch),
        LocationPrior(),
    ]
    folder = None if cache is None else Path(cache)
    reader = Reader(batch, threads, folder, shared=dist.world_size() > 1, task="features")
    return run_suite([*networks, *(descriptors if baselines else [])], benchmarks, config, out, reader=reader)


def open_benchmarks(data: Data, layout: str | None = None) -> list:
    """The datasets at these places, as Benchmark objects. UsageError for two of one name."""
    from troodon.evaluate.sets.benchmark import Benchmark
    from troodon.evaluate.sets.layouts import open_benchmark
    from troodon.images.sources import open_source

    benchmarks, rest = [], []
    for place in [data] if _is_items(data) else as_list(data):
        benchmark = open_benchmark(place, layout)
        if benchmark is None:
            rest.append(place)
        else:
            benchmarks.append(benchmark)
    if len(rest) > 1:  # a place with its own split is a dataset by itself
        for place in list(rest):
            index = _with_item_labels(open_source(place))
            splits = set(index.column("split"))
            if "train" in splits and splits & {"val", "test"} and index.table["label"].null_count < len(index):
                benchmarks.append(Benchmark(_dataset_name(place), "label", index))
                rest.remove(place)
    if rest:
        index = _with_item_labels(open_source(*rest))
        benchmarks.append(Benchmark(" + ".join(map(_dataset_name, rest)), "label", index))
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two datasets are called {repeated}: rename the folder of one")
    return benchmarks


def with_values(benchmark: Any, range: Range | None) -> Any:
    """The dataset with this range of values of its images. It says where these lose much without one."""
    from troodon.images.values import look_at
    from troodon.run import say

    images = benchmark.images.with_range(range)
    if is_first() and (line := look_at(images)):
        say(f"{benchmark.name}: {line}")
    return replace(benchmark, images=images)


def _is_items(data: Data) -> bool:
    """Whether a list holds the items of one dataset, such as (image, label), and not several datasets."""
    return isinstance(data, list) and bool(data) and all(isinstance(item, tuple | dict) for item in data)


def _with_item_labels(index: "Index") -> "Index":
    """The index with the labels that Python datasets give beside their images, where none are known."""
    import pyarrow as pa

    from troodon.images.members import item_labels
    from troodon.run import say

    labels, containers, offsets = (index.column(name) for name in ("label", "container", "offset"))
    for key, dataset in index.datasets.items():
        rows = [row for row, container in enumerate(containers) if container == key]
        if any(labels[row] is not None for row in rows):
            continue
        of_items = item_labels(dataset)
        if of_items is None:
            what = "its items are neither (image, label) nor dicts with a label"
            say(f"{type(dataset).__name__}: no labels are known, as {what}")
            continue
        for row in rows:
            labels[row] = of_items[offsets[row]]
    if not index.datasets:
        return index
    place = index.table.schema.get_field_index("label")
    return replace(index, table=index.table.set_column(place, "label", pa.array(labels, pa.string())))


def _dataset_name(place: object) -> str:
    return Path(place).name if isinstance(place, str | Path) else type(place).__name__


@dataclass(frozen=True)
class Evaluate:
    """Scores of frozen features on labelled images, with intervals, beside those of trivial features."""

    suite: Positional[str]
    """A suite: mine, quick or paper; or a YAML file."""
    backbone: Paths
    """A run, a backbone folder, weights in any file, or a name such as dinov2_vits14; or several."""
    data: Paths
    """Labelled images: labels from folder names or a labels.csv, splits from folders named train and val; or datasets
    with tags, masks, depths, instances or pairs, as their owners publish them or with an index.csv."""
    out: str
    """A new folder for the scores."""
    baselines: bool = True
    """Also random networks, a colour histogram, raw pixels, and for dense tasks patch colours and a location prior."""
    layout: str | None = None
    """A published layout that the places must have, such as ade20k; a missing file is then an error."""
    batch: int = 64
    """Images that go through the network together."""
    devices: str = "auto"
    """Devices of this machine; auto is all. Each processes a part of the images."""
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""
    cache: str | None = None
    """A folder that keeps the features, so that they are not computed again."""
    threads: int = 0
    """Threads that read images; 0 is one per processor."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks' products; scores of one are not compared with scores of the other."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    json: bool = False
    """Print the scores as JSON."""
    config: Annotated[EvaluateConfig, arg(name="")] = EvaluateConfig()

    def run(self) -> None:
        scores = evaluate(
            self.config, list(require_some(self.backbone, "backbones")), self.data, self.out,
            baselines=self.baselines, layout=self.layout, batch=self.batch, cache=self.cache,
            threads=self.threads, devices=self.devices, compute=self.compute, range=self.range,
            device=self.device,
        )  # fmt: skip
        print(json.dumps(scores, indent=1) if self.json else scores_table(scores))
        suggest_next(f"troodon report {shlex.quote(self.out)}")


def compare(paths: Data) -> list[dict]:
    """Scores of several artifacts, side by side only where they were measured alike.

    A row is one metric of one protocol on one dataset, with the scores by artifact. Scores that were measured
    differently are a row of their own, which lists the differences from the first such row: settings, images, or
    releases of packages between which scores may change. Other versions of the same releases are listed with the
    scores. Descriptors and random networks are skipped. UsageError for a folder without scores.
    """
    from troodon.config import differences
    from troodon.report.scores import is_baseline
    from troodon.run import read_json

    rows: dict[tuple, dict] = {}
    for path in as_list(paths):
        file = Path(path) / "scores.json"
        if not file.is_file():
            raise UsageError(f"{path}: holds no scores.json: give a folder that `troodon evaluate` has made")
        for entry in (e for e in read_json(file) if not is_baseline(e)):
            key = {name: entry[name] for name in ("dataset", "protocol", "metric")}
            like = entry.get("fingerprint") or str(path)
            row = rows.setdefault((*key.values(), like), key | {"like": like, "scores": {}, "differs": []})
            row["scores"][f"{path}: {entry['backbone']}"] = {name: entry[name] for name in ("value", "low", "high")}
            row.setdefault("settings", entry["settings"].get("protocol", {}))
            versions = entry["settings"].get("versions", {})
            if later := differences(row.setdefault("versions", versions), versions):
                row.setdefault("later", {})[str(path)] = later
    first_rows: dict[tuple, dict] = {}
    for row in rows.values():
        first = first_rows.setdefault((row["dataset"], row["protocol"], row["metric"]), row)
        if first is not row:
            row["differs"] = differences(first["settings"], row["settings"]) or ["how it was measured is not recorded"]
    return sorted(rows.values(), key=lambda r: (r["dataset"], r["protocol"], r["metric"]))


@dataclass(frozen=True)
class Compare:
    """Scores of several folders, side by side only where they were measured alike."""

    paths: Positional[Paths]
    """Folders that `evaluate` has made, two or more."""
    json: bool = False
    """Print the rows as JSON."""

    def run(self) -> None:
        rows = compare(require_some(self.paths, "scores to compare"))
        print(json.dumps(rows, indent=1) if self.json else render_comparison(rows))


def render_comparison(rows: list[dict]) -> str:
    """The rows of `compare` as text: the best score first in each, and its differences from the first row."""
    lines = []
    for row in rows:
        lines.append(f"{row['dataset']}, {row['protocol']}, {row['metric']}")
        lines += [f"  not to be compared with the one above: {difference}" for difference in row["differs"]]
        ranking = sorted(row["scores"].items(), key=lambda item: sort_key(row | item[1]))
        lines += [f"  {format_score(row | score)}  {name}" for name, score in ranking]
        lines += [f"  with other versions: {path}: {', '.join(v)}" for path, v in row.get("later", {}).items()]
    return "\n".join(lines)


def scores_table(scores: list[dict]) -> str:
    """Scores as Markdown: backbones in columns, the best of a row in bold.

    Only the main metrics of each protocol are shown. Datasets with the same backbones share a table. Where networks
    see images of different sizes, the sizes are shown: `compare` would not put these scores side by side.
    """
    from troodon.report.scores import main_metrics

    rows: dict[tuple, dict[str, dict]] = {}
    for s in scores:
        rows.setdefault((s["dataset"], s["protocol"], s["metric"]), {})[s["backbone"]] = s
    blocks: dict[tuple, list[list[str]]] = {}
    for (dataset, protocol, metric), row in sorted(main_metrics(rows).items()):
        names = tuple({s["backbone"]: None for s in scores if s["dataset"] == dataset})
        best = min(map(sort_key, row.values()))
        cells = [score_cell(row[name], sort_key(row[name]) == best) if name in row else "" for name in names]
        blocks.setdefault(names, []).append([dataset, protocol, metric_label(metric), *cells])
    crops = {s["backbone"]: s["settings"].get("protocol", {}).get("view", {}).get("crop") for s in scores}
    several = len({str(crop) for crop in crops.values() if crop}) > 1
    titles = {name: f"{name}, {crop} px" if several and crop else name for name, crop in crops.items()}
    heads = [["data", "protocol", "metric", *(titles[name] for name in names)] for names in blocks]
    return "\n\n".join(map(markdown_table, heads, blocks.values()))


def score_cell(score: dict, best: bool) -> str:
    """A value, in per cent unless it is an error, and its interval."""
    scale, digits = (1, 3) if is_error(score) else (100, 1)
    low, value, high = (f"{scale * score[key]:.{digits}f}" for key in ("low", "value", "high"))
    return f"{f'**{value}**' if best else value} ({low}-{high})"


def metric_label(metric: str) -> str:
    """A metric with its unit or its direction."""
    return f"{metric}, lower is better" if is_error({"metric": metric}) else f"{metric}, %"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in lines)


def format_score(score: dict) -> str:
    """A value and its interval, as text."""
    low, value, high = (f"{score[k]:.3f}" if is_error(score) else f"{score[k]:.1%}" for k in ("low", "value", "high"))
    return f"{value:>6}  ({low} to {high})"


def is_error(score: dict) -> bool:
    """Whether the metric is an error: lower is better, and it is no share."""
    return score["metric"] in ("absrel", "rmse", "rmse_log")


def sort_key(score: dict) -> float:
    """A number that is lowest for the best score."""
    return score["value"] if is_error(score) else -score["value"]
