"""The verb `leak`: which images of a benchmark are in the training images, and what this does to scores."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from troodon.config import Range, UsageError, from_dict, to_dict
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import get_suite
from troodon.lock import one_at_a_time
from troodon.verbs.common import Data, Device, Paths, as_list, suggest_next
from troodon.verbs.curation import curate
from troodon.verbs.evaluation import evaluate

if TYPE_CHECKING:
    from troodon.images.index import Index
    from troodon.model.backbone import Backbone

# Only the search for a benchmark's images. By the cosine, leaks that are reported shall be right; curation drops more.
LEAK_CONFIG = CurateConfig(steps=("benchmark",), gather="all", benchmark_false_merges=0.001)
LEAKS_FILE = "leaks.json"


@one_at_a_time
def leak(
    backbone: "str | Path | Backbone",
    data: Data,
    benchmark: Data,
    out: str | Path,
    *,
    copies: "str | Path | Backbone | None" = None,
    workers: int = 0,
    suite: str = "mine",
    settings: dict | None = None,
    range: Range | None = None,
    device: str = "auto",
) -> dict:
    """Find images of `data` that are near-duplicates of a benchmark's, as `curate` does, and score with and without.

    Writes to `out`: `selection`, the images of `data` without those; `benchmark`, an index of the benchmark without the
    images that have leaked; leaks.json; and, where the benchmark has labels, the scores of `backbone` on the whole
    benchmark and on the rest: `scores`, `scores-without`. `settings` are those of CurateConfig, such as
    benchmark_threshold. `range`, `device`: see `curate`. Returns the contents of leaks.json: the counts, and a pair of
    paths for every leak, those that are perhaps none last.
    """
    from pyarrow.parquet import read_schema

    from troodon.images.index import saved_range
    from troodon.images.sources import open_source
    from troodon.run import write_json

    config, out = _resolve(settings or {}), Path(out)
    if suite:
        get_suite(suite)
    selection = curate(
        config, None, data, backbone, out / "selection", benchmark=benchmark, copies=copies, workers=workers,
        range=range, device=device,
    )  # fmt: skip
    images, pairs = _leaked_pairs(selection)
    index = open_source(*as_list(benchmark)).with_range(saved_range(read_schema(selection / "images.parquet")))
    leaked = {pair["benchmark"] for pair in pairs}
    remaining = [row for row, path in enumerate(index.column("path")) if path not in leaked]
    leaks: dict[str, Any] = {
        "images": images, "leaked": len(pairs), "perhaps": sum(pair["perhaps"] for pair in pairs),
        "benchmark": len(index), "benchmark_leaked": len(index) - len(remaining), "pairs": pairs,
    }  # fmt: skip
    if remaining:
        _publish_remaining(index, remaining, as_list(benchmark), out / "benchmark")
    if suite and index.table["label"].null_count < len(index):
        datasets: dict[str, tuple[Data, Path]] = {"all": (benchmark, out / "scores")}
        if remaining:
            datasets["without"] = (out / "benchmark", out / "scores-without")
        leaks["scores"] = _scores(suite, backbone, datasets, range=range, device=device)
    write_json(out / LEAKS_FILE, leaks)
    return leaks


def _scores(
    suite: str, backbone: "str | Path | Backbone", datasets: dict[str, tuple[Data, Path]], **options: Any
) -> dict[str, Any]:
    """The scores of each data set, written to its folder. What cannot be measured is told: the leaks are found."""
    from troodon.run import say

    scores = {}
    for name, (dataset, folder) in datasets.items():
        try:
            scores[name] = evaluate(suite, backbone, dataset, folder, baselines=False, **options)
        except UsageError as error:
            say(f"alarm: {folder}: not measured: {error}")
    return scores


def _resolve(settings: dict) -> CurateConfig:
    config = from_dict(LEAK_CONFIG, settings, source="settings")
    if "benchmark" not in config.steps:
        raise UsageError("steps: a search for leaks has the step benchmark")
    if config.verify == "geometric" and config.benchmark_false_merges == LEAK_CONFIG.benchmark_false_merges:
        return replace(config, benchmark_false_merges=CurateConfig.benchmark_false_merges)  # nobody has set it
    return config


def _leaked_pairs(selection: Path) -> tuple[int, list[dict]]:
    """The number of images that were searched, and a pair of paths for each that leaked, the surest first."""
    import numpy as np
    import pyarrow.parquet as pq

    from troodon.curate.ledger import PERHAPS

    ledger = pq.read_table(selection / "images.parquet")
    path, cause, pool = ledger["path"].to_pylist(), ledger["cause"].to_numpy(), ledger["pool"].to_pylist()
    dropped = [stage == "benchmark" and p == "uncurated" for stage, p in zip(ledger["stage"].to_pylist(), pool)]
    leaked = np.flatnonzero(dropped)
    leaked = leaked[np.argsort(-ledger["score"].to_numpy()[leaked], kind="stable")]
    reasons = ledger["reason"].take(leaked).to_pylist()
    pairs = [
        {"image": path[row], "benchmark": path[cause[row]], "reason": reason, "perhaps": reason.startswith(PERHAPS)}
        for row, reason in zip(leaked, reasons)
    ]
    pairs.sort(key=lambda pair: pair["perhaps"])  # stable
    return pool.count("uncurated"), pairs


def _publish_remaining(index: "Index", remaining: list[int], benchmark: list, folder: Path) -> None:
    """Write an index of the benchmark's images that have not leaked, unless it is there."""
    from troodon.run import is_done, publish

    settings = {"benchmark": [str(place) for place in benchmark], "left": len(remaining)}
    fingerprint = f"{index.content_hash()[:12]}-{len(remaining)}"
    if not is_done(folder, "index", fingerprint, settings):
        with publish(folder, "index", fingerprint, settings) as partial:
            index.take(remaining).with_times().save(partial / "images.parquet")


@dataclass(frozen=True)
class Leak:
    """Which images of a benchmark are in the training images, and scores with and without these."""

    backbone: str
    """The backbone that compares images, and is scored: a run, a backbone folder, weights in
    any file, or a name such as dinov2_vits14."""
    data: Paths
    """The training images: folders, tars, paths inside tars, an index or a selection."""
    benchmark: Paths
    """The images that scores are measured on."""
    out: str
    """A new folder."""
    copies: str | None = None
    """Finds copies instead of the backbone: another one, such as a run of copies_small, or a copy descriptor's
    TorchScript file (.pt)."""
    workers: int = 0
    """Processes; 0 is this one only."""
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    suite: str = "mine"
    """The suite to score by, if the benchmark has labels; none for no scores."""
    json: bool = False
    """Print all of it as JSON."""
    config: Annotated[CurateConfig, arg(name="")] = LEAK_CONFIG

    def run(self) -> None:
        from troodon.run import read_json

        suite = "" if self.suite == "none" else self.suite
        leaks = leak(
            self.backbone, self.data, self.benchmark, self.out, copies=self.copies, workers=self.workers, suite=suite,
            settings=to_dict(self.config), range=self.range, device=self.device,
        )  # fmt: skip
        if self.json:
            print(json.dumps(leaks, indent=1))
            return
        perhaps = f", {leaks['perhaps']:,} of these perhaps" if leaks["perhaps"] else ""
        print(f"{leaks['leaked']:,} of {leaks['images']:,} images resemble one of the benchmark's{perhaps}")
        print(f"{leaks['benchmark_leaked']:,} of {leaks['benchmark']:,} images of the benchmark have leaked")
        for pair in leaks["pairs"][:10]:
            print(f"  {pair['image']} = {pair['benchmark']} ({pair['reason']})")
        scores = leaks.get("scores", {})
        without = {(s["protocol"], s["metric"]): s["value"] for s in scores.get("without", [])}
        for s in scores.get("all", []):
            other = without.get((s["protocol"], s["metric"]))
            rest = "" if other is None else f", without leaks {other:7.1%}"
            print(f"{s['protocol']:<10} {s['metric']:<10} {s['value']:7.1%}{rest}")
        print(Path(self.out) / LEAKS_FILE)
        training = f"troodon pretrain small --data {shlex.quote(self.out + '/selection')} --out runs/clean"
        report = f"troodon report {shlex.quote(self.out)}"
        suggest_next(*([training] if read_json(Path(self.out, "selection", "summary.json"))["kept"] else []), report)
