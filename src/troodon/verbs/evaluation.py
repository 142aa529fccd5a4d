"""The verb `evaluate`: what frozen features are worth."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

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
    settings: dict | None = None,
    threads: int = 0,
    cache: str | Path | None = None,
) -> list[dict]:
    """Measure frozen features on labelled images, beside a random network, a colour histogram and raw pixels."""
    config = configured(name, EvaluateConfig(), suite, settings)
    from troodon.data.sources import open_source
    from troodon.evaluate.baselines import ColourHistogram, RawPixels
    from troodon.evaluate.suite import evaluate as evaluating
    from troodon.evaluate.suite import how_split, split
    from troodon.model.backbone import Backbone

    index = open_source(*paths_of(data))
    ours = opened(backbone)
    # Layer scale 1: at the small values that training starts from, a random network hardly mixes its patches.
    untrained = replace(ours.config, layer_scale=1.0)
    trivial = [ColourHistogram(channels=ours.channels), RawPixels(channels=ours.channels)]
    others = [Backbone.random(untrained, ours.preprocessing, seed=config.seed), *trivial]
    train, val = split(index, config.seed)
    return evaluating(
        [ours, *(others if baselines else [])],
        train,
        val,
        " + ".join(Path(p).name if isinstance(p, str | Path) else type(p).__name__ for p in paths_of(data)),
        config,
        Path(out),
        how=how_split(index, config.seed),
        threads=threads,
        cache=None if cache is None else Path(cache),
    )


@dataclass(frozen=True)
class Evaluate:
    """What frozen features are worth on labelled images, beside trivial ones: scores with intervals."""

    suite: Positional[str]
    """A suite: mine, quick or paper; or a YAML file."""
    backbone: str
    """A run, a backbone folder, released weights (.pth), or a Hugging Face folder."""
    data: Images
    """Labelled images: labels from folder names or a labels.csv, splits from folders named train and val."""
    out: str
    """A new folder for the scores."""
    baselines: bool = True
    """Also a random network, a colour histogram and raw pixels."""
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
            baselines=self.baselines, cache=self.cache, threads=self.threads,
        )  # fmt: skip
        print(json.dumps(scores, indent=1) if self.json else table(scores))
        suggest(f"troodon report {quoted(self.out)}")


def table(scores: list[dict]) -> str:
    """Scores for people: a line each."""
    width = max(len(s["backbone"]) for s in scores)
    return "\n".join(
        f"{s['protocol']:<12} {s['metric']:<10} {s['backbone']:<{width}} {s['value']:6.1%}  "
        f"({s['low']:.1%} to {s['high']:.1%})"
        for s in sorted(scores, key=lambda s: (s["protocol"], s["metric"], -s["value"]))
    )
