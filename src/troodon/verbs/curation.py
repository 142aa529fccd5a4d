"""The verbs `curate` (which of many images are worth training on) and `calibrate` (thresholds for near-duplicates)."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.config import Range, UsageError
from troodon.curate.config import CurateConfig, SpaceKind, Tokens
from troodon.devices import check_device, choose_device
from troodon.slurm import NO_ARRAY, ArrayConfig, open_backend
from troodon.verbs.common import (
    Data,
    Device,
    Paths,
    as_backbone,
    common_range,
    open_images,
    resolve_config,
    suggest_next,
)

if TYPE_CHECKING:
    from troodon.images.decisions import Decision
    from troodon.model.backbone import Backbone

TORCHSCRIPT = (".pt", ".torchscript")


def curate(
    recipe: str | CurateConfig,
    curated: Data | None,
    uncurated: Data,
    backbone: "str | Path | Backbone",
    out: str | Path,
    *,
    benchmark: Data | None = None,
    copies: "str | Path | Backbone | None" = None,
    backend: str = "local",
    workers: int = 0,
    settings: dict | None = None,
    range: Range | None = None,
    device: str = "auto",
    decisions: str | Path | None = None,
    slurm: ArrayConfig = NO_ARRAY,
) -> Path:
    """Select from the uncurated images, without copies, those that resemble the curated ones; returns the selection.

    No image is copied. Images that resemble one of `benchmark` are excluded. `copies` finds copies instead of the
    backbone: another one, or a copy descriptor as a TorchScript file. `backend` is "local", with `workers` processes
    (0: only this one), "ray", a Ray cluster's address, or "slurm", where each stage is an array of `workers` jobs with
    the settings `slurm`. Without curated images (None), the recipe must gather without them. `range` gives the values
    of images of more than 8 bits that become black and white, in place of the backbone's own. `device` is where
    networks and comparisons compute: "auto" (a GPU, if there is one), "cuda", "cuda:1", "mps" or "cpu"; with "auto" or
    "cuda", several processes of a machine take its GPUs in turn. `decisions` is a file that `explore` wrote: what a
    person decided holds.
    """
    from troodon.curate.pipeline import NO_IMAGES
    from troodon.curate.pipeline import curate as run_curation

    config = resolve_config(recipe, CurateConfig(), recipes.curate, settings)
    made = open_decisions(decisions)
    runner = open_backend(backend, workers, slurm)
    check_shared(device, backend)
    network = placed(backbone, device, range)
    encoder = None if copies is None else placed(copies, device)
    range = common_range(range, network, encoder)
    wanted, excluded = (open_images(data, range) if data else NO_IMAGES for data in (curated, benchmark))
    pool = open_images(uncurated, range).without_labels()
    try:
        return run_curation(
            config, wanted, pool, network, Path(out), benchmark=excluded, copies=encoder, backend=runner,
            decisions=made,
        )  # fmt: skip
    finally:
        runner.close()


def calibrate(
    backbone: "str | Path | Backbone",
    data: Data,
    *,
    space: SpaceKind = "whitened",
    tokens: Tokens = "cls",
    pixels: bool = True,
    images: int = 250,
    false_merges: float = CurateConfig.false_merges,
    strength: float = 0.5,
    seed: int = 0,
    range: Range | None = None,
    device: str = "auto",
) -> dict:
    """Measure how near copies of these images lie by this backbone, and how near other images (curate/calibrate.py).

    With `pixels`, 8 x 8 pixels are compared as well, as `curate` does. Returns the threshold, the share of attacked
    copies found by kind of attack, and a table of both for other rates of false merges. Nothing is written. `device`:
    see `curate`.
    """
    from troodon.curate.encoder import CopyEncoder
    from troodon.curate.thresholds import calibrate_index

    if not 0 < strength <= 1:
        raise UsageError(f"strength {strength}: it lies in (0, 1]; 0.25 is mild, 1 is strong")
    config = CurateConfig(
        duplicate_space=space, tokens=tokens, calibration_images=images, false_merges=false_merges, seed=seed
    )  # fmt: skip
    network = placed(backbone, device)
    encoder = CopyEncoder.create(network, tokens, pixels)
    return calibrate_index(config, open_images(data, common_range(range, network)), encoder, strength).as_dict()


def placed(backbone: Any, device: str, range: Range | None = None) -> Any:
    """A backbone or copy descriptor that computes on the device, in every process on one of its own.

    With "auto" one that is loaded already stays where it is. UsageError if the device is not there.
    """
    check_device(device)
    target = choose_device(device)
    network = open_copy_encoder(backbone, range)
    from troodon.curate.encoder import Placed

    if not hasattr(network, "to"):
        return Placed(network, device)
    if device == "auto" and not isinstance(backbone, str | Path):
        return Placed(network, str(network.device))
    return Placed(network if network.device == target else network.to(target), device)


def open_decisions(file: str | Path | None) -> "dict[str, Decision]":
    """The decisions in a file, by path. UsageError if it is missing, or a line of it is none."""
    from troodon.images.decisions import read_decisions

    if file is not None and not Path(file).is_file():
        raise UsageError(f"decisions {file}: no such file; `troodon explore` writes one")
    return read_decisions(Path(file)) if file is not None else {}


def check_shared(device: str, backend: str) -> None:
    """UsageError for one of several devices where a cluster says which one a process may use."""
    check_device(device)
    if backend != "local" and device.startswith("cuda:"):
        cluster = "Slurm" if backend == "slurm" else "Ray"
        raise UsageError(f"device {device}: {cluster} gives each process a device of its own; set cuda or auto")


def open_copy_encoder(backbone: Any, range: Range | None = None) -> Any:
    """A backbone, or a copy descriptor in a TorchScript file."""
    if isinstance(backbone, str | Path) and Path(backbone).suffix in TORCHSCRIPT and Path(backbone).is_file():
        from troodon.curate.descriptor import CopyDescriptor

        return CopyDescriptor.load(Path(backbone))
    return as_backbone(backbone, range)


def stage_lines(summary: dict) -> list[str]:
    """What each stage of a selection has dropped."""
    return [
        f"{stage['name']:<10} {stage['in']:>9,} in {stage['dropped']:>9,} dropped {stage['out']:>9,} out"
        for stage in summary["stages"]
    ]


@dataclass(frozen=True)
class Curate:
    """From a pool of images, without copies, those that resemble a curated set. Copies and deletes nothing."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    uncurated: Paths
    """The pool to choose from: folders, tars, paths inside tars."""
    backbone: str
    """The backbone that compares images: a run, a backbone folder, weights in any file, or a name such as
    dinov2_vits14."""
    out: str
    """A new folder: the selection, which `pretrain --data` takes."""
    curated: Paths = ()
    """Images that are wanted; for several datasets, images are gathered for one after another. Without them, see
    --gather."""
    benchmark: Paths = ()
    """Images that training must not see, nor anything like them."""
    copies: str | None = None
    """Finds copies instead of the backbone: another one, such as a run of copies_small, or a copy descriptor's
    TorchScript file (.pt)."""
    backend: Annotated[str, arg(aliases=("--engine",))] = "local"
    """Where workers run: local, ray (this machine, or its cluster), a cluster's address, ray://HOST:PORT, or slurm."""
    workers: int = 0
    """Processes of the backend local, 0 for this one only; jobs of the backend slurm. They do not change the result."""
    slurm: ArrayConfig = ArrayConfig()
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu. Lists
    of vectors and k-means stay on processors."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    decisions: str | None = None
    """A file of decisions to keep, leave out or tag images, which `troodon explore` writes; they hold in any case."""
    config: Annotated[CurateConfig, arg(name="")] = CurateConfig()

    def run(self) -> None:
        out = curate(
            self.config, self.curated, self.uncurated, self.backbone, self.out,
            benchmark=self.benchmark, copies=self.copies, backend=self.backend, workers=self.workers,
            range=self.range, device=self.device, decisions=self.decisions, slurm=self.slurm,
        )  # fmt: skip
        summary = json.loads((out / "summary.json").read_text())
        for line in stage_lines(summary):
            print(line)
        print(out)
        where = shlex.quote(self.out)
        training = [f"troodon pretrain small --data {where} --out runs/first"] if summary["kept"] else []
        suggest_next(*training, f"troodon report {where}")


@dataclass(frozen=True)
class Calibrate:
    """Thresholds for near-duplicates: how near attacked copies of your images lie, and how near other images."""

    backbone: str
    """What is calibrated: a run, a backbone folder, released weights, or a copy descriptor's TorchScript file (.pt)."""
    data: Paths
    """Images such as those to be curated: folders, tars, paths inside tars."""
    space: SpaceKind = "whitened"
    """How embeddings are compared."""
    tokens: Tokens = "cls"
    """cls: class tokens; cls+mean: these and mean patch tokens."""
    pixels: bool = True
    """Compare 8 x 8 pixels as well, as curation does."""
    images: int = 250
    """Images to attack."""
    false_merges: float = CurateConfig.false_merges
    """The mean number of other images that one image may wrongly be taken for a copy of."""
    strength: float = 0.5
    """Strength of the attacks, up to 1."""
    seed: int = 0
    """Seed of all random draws."""
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    json: bool = False
    """Print all of it as JSON."""

    def run(self) -> None:
        result = calibrate(
            self.backbone, self.data, space=self.space, tokens=self.tokens, pixels=self.pixels, images=self.images,
            false_merges=self.false_merges, strength=self.strength, seed=self.seed,
            range=self.range, device=self.device,
        )  # fmt: skip
        if self.json:
            print(json.dumps(result, indent=1))
            return
        print(f"threshold {result['threshold']:.4f}, with {result['false_merges']:g} false merges an image")
        print(f"{'false merges':>13} {'threshold':>10} {'copies found':>13}")
        for row in result["table"]:
            print(f"{row['false_merges']:>13g} {row['threshold']:>10.4f} {row['recall']:>13.1%}")
        print(f"{result['copies']:,} copies of {result['images']:,} images, found by attack:")
        for name, share in sorted(result["recall"].items(), key=lambda item: -item[1]):
            print(f"  {name:<12} {share:7.1%}")
