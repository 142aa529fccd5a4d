"""The verb `leak`: what of a benchmark is in the images that were trained on, and what it does to scores."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from troodon.config import UsageError, from_dict, to_dict
from troodon.curate.config import CurateConfig
from troodon.evaluate.config import suite as measured_by
from troodon.verbs.common import Data, Images, paths_of, quoted, suggest
from troodon.verbs.curation import curate
from troodon.verbs.evaluation import evaluate

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone

# It only looks for a benchmark's images. What it names shall be right, where curation would rather lose some.
LEAKS = CurateConfig(steps=("benchmark",), gather="all", benchmark_false_merges=0.001)
ON_DISK = "leaks.json"


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
) -> dict:
    """Find the images of `data` that are near-duplicates of a benchmark's, as curation does; score with and without.

    Leaves in `out`: `selection`, the images of `data` without those; `benchmark`, an index of the benchmark without the
    images that have leaked; leaks.json; and, where the benchmark has labels, the scores of `backbone` on all of it and
    on what is left: `scores`, `scores-without`. `settings` are those of CurateConfig, such as benchmark_threshold.
    Returns what leaks.json says: the numbers, and a pair of paths for every leak.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from troodon.images.index import Index
    from troodon.images.sources import open_source
    from troodon.run import is_done, publish, write_json

    config, out = from_dict(LEAKS, settings or {}, source="settings"), Path(out)
    if suite:
        measured_by(suite)
    if "benchmark" not in config.steps:
        raise UsageError("steps: a search for leaks has the step benchmark")
    selection = curate(
        config, None, data, backbone, out / "selection", benchmark=benchmark, copies=copies, workers=workers
    )
    ledger = pq.read_table(selection / "images.parquet")
    path, cause, pool = ledger["path"].to_pylist(), ledger["cause"].to_numpy(), ledger["pool"].to_pylist()
    went = [stage == "benchmark" and of == "uncurated" for stage, of in zip(ledger["stage"].to_pylist(), pool)]
    leaked = np.flatnonzero(went)
    leaked = leaked[np.argsort(-ledger["score"].to_numpy()[leaked], kind="stable")]  # the surest first
    reasons = ledger["reason"].take(leaked).to_pylist()
    pairs = [
        {"image": path[row], "benchmark": path[cause[row]], "reason": reason} for row, reason in zip(leaked, reasons)
    ]
    shown, touched = open_source(*paths_of(benchmark)), {pair["benchmark"] for pair in pairs}
    left = [row for row, name in enumerate(shown.column("path")) if name not in touched]
    found: dict[str, Any] = {
        "images": pool.count("uncurated"), "leaked": len(pairs),
        "benchmark": len(shown), "benchmark_leaked": len(shown) - len(left), "pairs": pairs,
    }  # fmt: skip
    of = {"benchmark": [str(place) for place in paths_of(benchmark)], "left": len(left)}
    name = f"{shown.contents()[:12]}-{len(left)}"
    if left and not is_done(out / "benchmark", "index", name, of):
        with publish(out / "benchmark", "index", name, of) as folder:
            Index(shown.take(left).rows()).save(folder / "images.parquet")
    if suite and shown.table["label"].null_count < len(shown):
        places = {"all": (benchmark, "scores")} | ({"without": (out / "benchmark", "scores-without")} if left else {})
        found["scores"] = {
            which: evaluate(suite, backbone, place, out / folder, baselines=False)
            for which, (place, folder) in places.items()
        }
    write_json(out / ON_DISK, found)
    return found


@dataclass(frozen=True)
class Leak:
    """What of a benchmark is in the images that were trained on, and scores with and without it."""

    backbone: str
    """What compares images, and is scored: a run, a backbone folder, released weights, a Hugging Face folder."""
    data: Images
    """The images that were trained on: folders, tars, paths inside tars, an index or a selection."""
    benchmark: Images
    """The images that scores are measured on."""
    out: str
    """A new folder."""
    copies: str | None = None
    """What finds copies, where not the backbone: another one, such as a run of copies_small, or a copy descriptor's
    TorchScript file (.pt)."""
    workers: int = 0
    """Processes; 0 is this one alone."""
    suite: str = "mine"
    """What is scored, if the benchmark has labels; none to leave that out."""
    json: bool = False
    """Print all of it as JSON."""
    config: Annotated[CurateConfig, arg(name="")] = LEAKS

    def run(self) -> None:
        suite = "" if self.suite == "none" else self.suite
        found = leak(
            self.backbone, self.data, self.benchmark, self.out, copies=self.copies, workers=self.workers, suite=suite,
            settings=to_dict(self.config),
        )  # fmt: skip
        if self.json:
            print(json.dumps(found, indent=1))
            return
        print(f"{found['leaked']:,} of {found['images']:,} images resemble one of the benchmark's")
        print(f"{found['benchmark_leaked']:,} of {found['benchmark']:,} images of the benchmark are resembled")
        for pair in found["pairs"][:10]:
            print(f"  {pair['image']} = {pair['benchmark']} ({pair['reason']})")
        scores = found.get("scores", {})
        without = {(s["protocol"], s["metric"]): s["value"] for s in scores.get("without", [])}
        for s in scores.get("all", []):
            other = without.get((s["protocol"], s["metric"]))
            rest = "" if other is None else f", without leaks {other:7.1%}"
            print(f"{s['protocol']:<10} {s['metric']:<10} {s['value']:7.1%}{rest}")
        print(Path(self.out) / ON_DISK)
        suggest(f"troodon pretrain small --data {quoted(self.out + '/selection')} --out runs/clean",
                f"troodon report {quoted(self.out)}")  # fmt: skip
