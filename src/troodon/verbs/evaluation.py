"""The verb `evaluate`: what frozen features are worth."""

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from troodon.config import UsageError, nearest
from troodon.evaluate.config import EvaluateConfig, suite
from troodon.verbs.common import Data, Images, configured, opened, paths_of, quoted, some, suggest
from troodon.verbs.training import check_devices, on_several, written

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def evaluate(
    name: str | EvaluateConfig,
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
) -> list[dict]:
    """Measure frozen features, on labels, masks, depths, pairs or whatever truth the data has, beside trivial ones.

    `backbone` may be a list; a random network of each shape, and descriptors, stand beside them. Networks make their
    products in `compute`, "fp32" or "bf16": which is never chosen here, as scores are compared only within one.

    A place whose files say what is true of its images (see evaluate/sets/layouts.py), or that has labels and says
    itself which images test, is a set of data by itself; all others together are one more. `layout` says what the
    places are, where their files do not. On several devices of this machine ("auto" is all), a process on each does a
    part of the images, if backbone and data are given by their paths.
    """
    config = configured(name, EvaluateConfig(), suite, settings)
    check_devices(devices)
    if compute not in ("fp32", "bf16"):
        raise nearest("compute", compute, ("fp32", "bf16"))
    from troodon import dist

    by_path = all(isinstance(place, str | Path) for place in (*paths_of(backbone), *paths_of(data)))
    if by_path and (ranks := dist.to_start(devices)) > 1:
        kept = {"layout": layout, "threads": threads, "batch": batch, "cache": cache, "compute": compute}
        return _launched(ranks, config, backbone, data, out, kept, baselines)
    with dist.group() if "RANK" in os.environ else contextlib.nullcontext():
        return _evaluate(config, backbone, data, Path(out), baselines, layout, threads, batch, cache, compute)


def _launched(
    ranks: int, config: EvaluateConfig, backbone: object, data: Data, out: str | Path, kept: dict, baselines: bool
) -> list[dict]:
    """The same on several processes; what ends them is raised here."""
    from troodon.run import read_json

    with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
        words = ["evaluate", written(config, Path(folder) / "suite.yaml")]
        words += ["--backbone", *map(str, paths_of(backbone)), "--data", *map(str, paths_of(data))]
        words += ["--out", str(out), *([] if baselines else ["--no-baselines"])]
        words += [word for key, value in kept.items() if value is not None for word in (f"--{key}", str(value))]
        on_several(words, ranks)
    return read_json(Path(out) / "scores.json")


def _evaluate(
    config: EvaluateConfig, backbone: "str | Path | Backbone | list", data: Data, out: Path, baselines: bool,
    layout: str | None, threads: int, batch: int, cache: str | Path | None, compute: str,
) -> list[dict]:  # fmt: skip
    """On this process, or as one of a group of ranks."""
    from troodon import dist
    from troodon.evaluate.baselines import ColourHistogram, LocationPrior, PatchColours, RawPixels
    from troodon.evaluate.features import Reader
    from troodon.evaluate.suite import evaluate as evaluating
    from troodon.model.backbone import Backbone

    benchmarks = opened_benchmarks(data, layout)
    device = dist.device()
    trained = [opened(b).to(device) if isinstance(b, str | Path) else b for b in paths_of(backbone)]
    ours = trained[0]
    # Layer scale 1: at the small values that training starts from, a random network hardly mixes its patches.
    shapes: dict[tuple, str] = {}
    for b in trained:
        called = f"random, as {b.name}" if shapes else "random"
        shapes.setdefault((replace(b.config, layer_scale=1.0), b.preprocessing), called)
    untrained = [
        replace(Backbone.random(*shape, seed=config.seed), name=name).to(ours.device) for shape, name in shapes.items()
    ]
    networks = [*trained, *(untrained if baselines else [])]
    if compute != "fp32":
        networks = [b.faster(compute) for b in networks]
    descriptors: list[Any] = [
        ColourHistogram(channels=ours.channels),
        RawPixels(channels=ours.channels),
        PatchColours(ours.preprocessing, ours.config.patch),
        LocationPrior(),
    ]
    reader = Reader(batch, threads, None if cache is None else Path(cache), shared=dist.world() > 1)
    return evaluating([*networks, *(descriptors if baselines else [])], benchmarks, config, out, reader=reader)


def opened_benchmarks(data: Data, layout: str | None = None) -> list:
    """The sets of data at these places."""
    from troodon.evaluate.sets.benchmark import Benchmark
    from troodon.evaluate.sets.layouts import open_benchmark
    from troodon.images.sources import open_source

    found, rest = [], []
    for place in paths_of(data):
        known = open_benchmark(place, layout)
        if known is None:
            rest.append(place)
        else:
            found.append(known)
    if len(rest) > 1:  # those that divide their images themselves stand alone
        for place in list(rest):
            index = open_source(place)
            splits = set(index.column("split"))
            if "train" in splits and splits & {"val", "test"} and index.table["label"].null_count < len(index):
                found.append(Benchmark(_called(place), "label", index))
                rest.remove(place)
    if rest:
        found.append(Benchmark(" + ".join(map(_called, rest)), "label", open_source(*rest)))
    if twice := {b.name for b in found if [other.name for other in found].count(b.name) > 1}:
        raise UsageError(f"two sets of data are called {twice.pop()}: rename the folder of one")
    return found


def _called(place: object) -> str:
    return Path(place).name if isinstance(place, str | Path) else type(place).__name__


@dataclass(frozen=True)
class Evaluate:
    """What frozen features are worth on labelled images, beside trivial ones: scores with intervals."""

    suite: Positional[str]
    """A suite: mine, quick or paper; or a YAML file."""
    backbone: Images
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder; or several."""
    data: Images
    """Labelled images: labels from folder names or a labels.csv, splits from folders named train and val; or sets with
    tags, masks, depths, instances or pairs, as their owners publish them or with an index.csv."""
    out: str
    """A new folder for the scores."""
    baselines: bool = True
    """Also random networks, a colour histogram, raw pixels, and for dense tasks patch colours and a location prior."""
    layout: str | None = None
    """An owner's layout that the places must have, such as ade20k: then what is missing is told."""
    batch: int = 64
    """Images that go through the network together."""
    devices: str = "auto"
    """How many of this machine's; auto is all. Each does a part of the images."""
    cache: str | None = None
    """A folder that keeps features for the next time."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks' products; scores of one are not compared with scores of the other."""
    json: bool = False
    """Print the scores as JSON."""
    config: Annotated[EvaluateConfig, arg(name="")] = EvaluateConfig()

    def run(self) -> None:
        scores = evaluate(
            self.config, list(some(self.backbone, "backbones")), self.data, self.out,
            baselines=self.baselines, layout=self.layout, batch=self.batch, cache=self.cache,
            threads=self.threads, devices=self.devices, compute=self.compute,
        )  # fmt: skip
        print(json.dumps(scores, indent=1) if self.json else table(scores))
        suggest(f"troodon report {quoted(self.out)}")


def compare(paths: Data) -> list[dict]:
    """Scores of several artifacts, side by side only where they were measured alike.

    A row is one metric of one protocol on one set of data, with the scores by artifact; what was measured in another
    way stands in a row of its own, which says what differs from the first: settings, images, or releases of packages
    that promise no likeness. Later versions of one release are named beside the scores. Descriptors and random networks
    are left out. UsageError for a folder without scores.
    """
    from troodon.config import differences
    from troodon.report.scores import is_reference
    from troodon.run import read_json

    rows: dict[tuple, dict] = {}
    for path in paths_of(paths):
        file = Path(path) / "scores.json"
        if not file.is_file():
            raise UsageError(f"{path}: holds no scores.json: give a folder that `troodon evaluate` has made")
        for entry in (e for e in read_json(file) if not is_reference(e)):
            what = {key: entry[key] for key in ("dataset", "protocol", "metric")}
            like = entry.get("fingerprint") or str(path)
            row = rows.setdefault((*what.values(), like), what | {"like": like, "scores": {}, "differs": []})
            row["scores"][f"{path}: {entry['backbone']}"] = {key: entry[key] for key in ("value", "low", "high")}
            row.setdefault("settings", entry["settings"].get("protocol", {}))
            used = entry["settings"].get("versions", {})
            if later := differences(row.setdefault("versions", used), used):
                row.setdefault("later", {})[str(path)] = later
    first: dict[tuple, dict] = {}
    for row in rows.values():
        one = first.setdefault((row["dataset"], row["protocol"], row["metric"]), row)
        if one is not row:
            row["differs"] = differences(one["settings"], row["settings"]) or ["how it was measured is not recorded"]
    return sorted(rows.values(), key=lambda r: (r["dataset"], r["protocol"], r["metric"]))


@dataclass(frozen=True)
class Compare:
    """Scores of several folders, side by side only where they were measured alike."""

    paths: Positional[Images]
    """Folders that `evaluate` has made, two or more."""
    json: bool = False
    """Print the rows as JSON."""

    def run(self) -> None:
        rows = compare(some(self.paths, "scores to compare"))
        print(json.dumps(rows, indent=1) if self.json else compared(rows))


def compared(rows: list[dict]) -> str:
    """Rows for people, the best first in each; below one that is unlike the first, what differs."""
    lines = []
    for row in rows:
        lines.append(f"{row['dataset']}, {row['protocol']}, {row['metric']}")
        lines += [f"  not to be compared with the one above: {said}" for said in row["differs"]]
        best = sorted(row["scores"].items(), key=lambda kept: better(row | kept[1]))
        lines += [f"  {form(row | kept)}  {name}" for name, kept in best]
        lines += [f"  with other versions: {path}: {', '.join(said)}" for path, said in row.get("later", {}).items()]
    return "\n".join(lines)


def table(scores: list[dict]) -> str:
    """Scores for people, as Markdown: backbones in columns, the best of a row in bold.

    Of each protocol the metrics that say most. Data that other backbones were measured on has a table of its own. Where
    networks see images of several sizes, theirs are told: `compare` would not put these side by side.
    """
    from troodon.report.scores import leading

    rows: dict[tuple, dict[str, dict]] = {}
    for s in scores:
        rows.setdefault((s["dataset"], s["protocol"], s["metric"]), {})[s["backbone"]] = s
    blocks: dict[tuple, list[list[str]]] = {}
    for (dataset, protocol, metric), row in sorted(leading(rows).items()):
        names = tuple({s["backbone"]: None for s in scores if s["dataset"] == dataset})
        best = min(map(better, row.values()))
        cells = [cell(row[name], better(row[name]) == best) if name in row else "" for name in names]
        blocks.setdefault(names, []).append([dataset, protocol, told(metric), *cells])
    crops = {s["backbone"]: s["settings"].get("protocol", {}).get("view", {}).get("crop") for s in scores}
    several = len({str(crop) for crop in crops.values() if crop}) > 1
    called = {name: f"{name}, {crop} px" if several and crop else name for name, crop in crops.items()}
    heads = [["data", "protocol", "metric", *(called[name] for name in names)] for names in blocks]
    return "\n\n".join(map(markdown, heads, blocks.values()))


def cell(score: dict, best: bool) -> str:
    """A value, in per cent unless it is an error, and its interval."""
    times, digits = (1, 3) if is_error(score) else (100, 1)
    low, value, high = (f"{times * score[key]:.{digits}f}" for key in ("low", "value", "high"))
    return f"{f'**{value}**' if best else value} ({low}-{high})"


def told(metric: str) -> str:
    return f"{metric}, lower is better" if is_error({"metric": metric}) else f"{metric}, %"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose columns are as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in lines)


def form(score: dict) -> str:
    """A value and its interval."""
    low, value, high = (f"{score[k]:.3f}" if is_error(score) else f"{score[k]:.1%}" for k in ("low", "value", "high"))
    return f"{value:>6}  ({low} to {high})"


def is_error(score: dict) -> bool:
    """Whether lower is better, and the value no share of anything."""
    return score["metric"] in ("absrel", "rmse", "rmse_log")


def better(score: dict) -> float:
    """What is smallest for the best."""
    return score["value"] if is_error(score) else -score["value"]
