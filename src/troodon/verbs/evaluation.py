"""The verb `evaluate`: what frozen features are worth."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from troodon.config import UsageError
from troodon.evaluate.config import EvaluateConfig, suite
from troodon.verbs.common import Data, Images, configured, opened, paths_of, quoted, suggest

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone


def evaluate(
    name: str | EvaluateConfig,
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    baselines: bool = True,
    layout: str | None = None,
    settings: dict | None = None,
    threads: int = 0,
    batch: int = 64,
    cache: str | Path | None = None,
) -> list[dict]:
    """Measure frozen features, on labels, masks, depths, pairs or whatever truth the data has, beside trivial ones.

    A place whose files say what is true of its images (see data/benchmarks.py and data/layouts.py), or that has labels
    and says itself which images test, is a set of data by itself; all others together are one more. `layout` says what
    the places are, where their files do not. Inside a group of ranks, these share the images.
    """
    config = configured(name, EvaluateConfig(), suite, settings)
    from troodon import dist
    from troodon.evaluate.baselines import ColourHistogram, LocationPrior, PatchColours, RawPixels
    from troodon.evaluate.features import Reader
    from troodon.evaluate.suite import evaluate as evaluating
    from troodon.model.backbone import Backbone

    benchmarks = opened_benchmarks(data, layout)
    ours = opened(backbone)
    # Layer scale 1: at the small values that training starts from, a random network hardly mixes its patches.
    untrained = replace(ours.config, layer_scale=1.0)
    others: list[Any] = [
        Backbone.random(untrained, ours.preprocessing, seed=config.seed).to(ours.device),
        ColourHistogram(channels=ours.channels),
        RawPixels(channels=ours.channels),
        PatchColours(ours.preprocessing, ours.config.patch),
        LocationPrior(),
    ]
    reader = Reader(batch, threads, None if cache is None else Path(cache), shared=dist.world() > 1)
    return evaluating([ours, *(others if baselines else [])], benchmarks, config, Path(out), reader=reader)


def opened_benchmarks(data: Data, layout: str | None = None) -> list:
    """The sets of data at these places."""
    from troodon.data.benchmarks import Benchmark
    from troodon.data.layouts import open_benchmark
    from troodon.data.sources import open_source

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
    backbone: str
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder."""
    data: Images
    """Labelled images: labels from folder names or a labels.csv, splits from folders named train and val; or sets with
    masks, depths, instances or pairs, as their owners publish them or with an index.csv."""
    out: str
    """A new folder for the scores."""
    baselines: bool = True
    """Also a random network, a colour histogram, raw pixels, and for dense tasks patch colours and a location prior."""
    layout: str | None = None
    """What the places are, where their files do not say it: a name that `troodon evaluate --layout ?` lists."""
    batch: int = 64
    """Images that go through the network together."""
    cache: str | None = None
    """A folder that keeps features for the next time."""
    threads: int = 0
    """Threads that read; 0 is one per processor."""
    json: bool = False
    """Print the scores as JSON."""
    config: Annotated[EvaluateConfig, arg(name="")] = EvaluateConfig()

    def run(self) -> None:
        scores = evaluate(
            self.config, self.backbone, self.data, self.out,
            baselines=self.baselines, layout=self.layout, batch=self.batch, cache=self.cache,
            threads=self.threads,
        )  # fmt: skip
        print(json.dumps(scores, indent=1) if self.json else table(scores))
        suggest(f"troodon report {quoted(self.out)}")


def table(scores: list[dict]) -> str:
    """Scores for people: a line each."""
    width, protocol, dataset = (max(len(s[key]) for s in scores) for key in ("backbone", "protocol", "dataset"))
    lines = []
    for s in sorted(scores, key=lambda s: (s["dataset"], s["protocol"], s["metric"], better(s))):
        low, value, high = (f"{s[key]:.3f}" if is_error(s) else f"{s[key]:.1%}" for key in ("low", "value", "high"))
        what = f"{s['dataset']:<{dataset}} {s['protocol']:<{protocol}} {s['metric']:<14} {s['backbone']:<{width}}"
        lines.append(f"{what} {value:>6}  ({low} to {high})")
    return "\n".join(lines)


def is_error(score: dict) -> bool:
    """Whether lower is better, and the value no share of anything."""
    return score["metric"] in ("absrel", "rmse", "rmse_log")


def better(score: dict) -> float:
    """What is smallest for the best."""
    return score["value"] if is_error(score) else -score["value"]
