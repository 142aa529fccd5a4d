"""The verb `pretrain`, on this machine or as a job: a recipe, images and first weights become a run."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.config import UsageError, fingerprint, from_yaml, to_yaml
from troodon.learn.config import PretrainConfig
from troodon.run import write_bytes
from troodon.slurm import SlurmConfig
from troodon.verbs.common import Data, Images, configured, load, opened, paths_of, quoted, suggest

if TYPE_CHECKING:
    from troodon.learn.recorder import Probe
    from troodon.model.backbone import Backbone

PROBED = 1000  # labelled images, at most, that the quick k-NN of a training run looks at


def pretrain(
    recipe: str | PretrainConfig,
    data: Data | None = None,
    out: str | Path | None = None,
    *,
    init: "str | Path | Backbone | None" = None,
    settings: dict | None = None,
    devices: str | int = "auto",
    dry_run: bool = False,
    images_per_second: float | None = None,
) -> Path | None:
    """Learn features from unlabelled images; goes on where the run in `out` stopped. Returns the backbone's folder.

    `settings` changes the recipe: {"steps": 1000, "schedules": {"lr": {"peak": 1e-3}}}.
    `devices` is how many of this machine's to train on, "auto" for all; on several, a process each, which read `data`
    and `init` by their paths. There, learn.engine.Interrupted, UsageError or RuntimeError is what ended the first.
    `dry_run` only tells the plan, also without `data` and `out`; as a number, `devices` then are accelerators that need
    not be here, and the time is told if these see `images_per_second` together.
    """
    config = configured(recipe, PretrainConfig(), beginning(init), settings)
    check_devices(devices)
    if images_per_second is not None and not (dry_run and 0 < images_per_second < float("inf")):
        raise UsageError(f"images_per_second {images_per_second}: is above 0, and for a dry run")
    if dry_run:
        return _tell_plan(config, data, init, devices, images_per_second)
    data, out = _given(data, out)
    from troodon import dist
    from troodon.images.sources import open_source
    from troodon.learn import checkpoint
    from troodon.learn import pretrain as training

    ranks = dist.to_start(devices)
    if ranks > 1:
        by_path(data=data, init=init)
    index = open_source(*paths_of(data))
    start = None if init is None else opened(init)
    training.check(config, index, start, max(ranks, int(os.environ.get("WORLD_SIZE", 1))))
    if ranks > 1:
        del index, start  # each rank has its own
        with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
            on_several(_words(config, data, out, init, Path(folder)), ranks)
        return Path(out) / "backbone"
    heads = None
    if config.reuse == "whole":
        if not isinstance(init, str | Path) or (first := start_of(init)).reuse != "whole":
            raise UsageError("reuse whole: takes the heads of a run, so --init must be one")
        heads = checkpoint.heads(Path(init), first)
    return training.pretrain(config, index, Path(out), init=start, heads=heads, probe=quick_knn(index, config))


def on_several(words: list[str], ranks: int) -> None:
    """Do a command as so many processes of this machine, one for each device; raises what ended the first of them."""
    from troodon import launch
    from troodon.learn.engine import Interrupted

    ended = launch.launch(words, ranks)
    if ended.code:
        kinds = {launch.MISTAKE: UsageError, launch.STOPPED: Interrupted}
        error = kinds.get(ended.code, launch.RankLost)(ended.said)
        error.add_note(ended.trace)
        raise error


def check_devices(devices: str | int) -> None:
    if devices != "auto" and not (str(devices).isdecimal() and int(devices)):
        raise UsageError(f"devices {str(devices)!r}: a number or auto")


def _tell_plan(
    config: PretrainConfig,
    data: Data | None,
    init: "str | Path | Backbone | None",
    devices: str | int,
    images_per_second: float | None,
) -> None:
    """Say what a run would take: on this machine, its speed measured; or on any number of accelerators."""
    from troodon.images.sources import open_source
    from troodon.learn.config import fits
    from troodon.learn.plan import plan, timed
    from troodon.run import say

    images = len(open_source(*paths_of(data))) if data else None
    if init is not None:
        from troodon.learn.pretrain import same_network

        same_network(config, opened(init))
    if devices != "auto":  # without torch, which takes longer to load than all of this
        fits(config, int(devices))
        width = 4 if config.compute == "fp32" else 2
        return say(plan(config, images, "cuda", width, int(devices), images_per_second).render())
    from troodon import dist

    device, ranks = dist.device(), dist.to_start("auto")
    fits(config, ranks)
    compute = dist.compute_dtype(config.compute, device)
    planned = plan(config, images, device.type, compute.itemsize, ranks, images_per_second)
    return say((planned if images_per_second else timed(planned, device, compute)).render())


def beginning(init: "str | Path | Backbone | None") -> Callable[[str], PretrainConfig]:
    """The recipes of pretraining by name, those included that go on from `init`."""
    return lambda name: recipes.pretrain(name, lambda: None if init is None else start_of(init))


def start_of(init: "str | Path | Backbone") -> PretrainConfig:
    """The config of a run, with reuse "whole"; of other weights only the network is known, and reuse is "backbone"."""
    if not isinstance(init, str | Path):
        return PretrainConfig(vit=init.config)
    if (recorded := Path(init) / "config.yaml").is_file():
        return replace(from_yaml(PretrainConfig(), recorded), reuse="whole")
    return PretrainConfig(vit=load(init).config)


def submit(
    recipe: str | PretrainConfig,
    data: Data | None,
    out: str | Path | None,
    slurm: SlurmConfig,
    *,
    init: str | Path | None = None,
    settings: dict | None = None,
) -> str:
    """Have Slurm do what `pretrain` does, on `slurm.nodes` machines; returns the job's id. Mistakes are told first."""
    config = configured(recipe, PretrainConfig(), beginning(init), settings)
    data, out = _given(data, out)
    from troodon.images.sources import open_source
    from troodon.learn import pretrain as training
    from troodon.slurm import check, logs, submit

    check(slurm)
    by_path(data=data, init=init)
    ranks = slurm.nodes * slurm.gpus_per_node
    training.check(config, open_source(*paths_of(data)), None if init is None else opened(init), ranks)
    return submit(_words(config, data, out, init, logs(out)), out, slurm)


def _given(data: Data | None, out: str | Path | None) -> tuple[Data, str | Path]:
    """Both, or UsageError: only a dry run does without."""
    if data is not None and data != () and out is not None:
        return data, out
    missing = [f"--{name}" for name, value in (("data", data), ("out", out)) if value in (None, ())]
    raise UsageError(f"no {' and no '.join(missing)}; or give --dry-run to see what the run would take")


def by_path(**named: Data) -> None:
    """UsageError for what other processes could not open."""
    for name, values in named.items():
        for value in paths_of(values):
            if not isinstance(value, str | Path | None):
                kind = type(value).__name__
                raise UsageError(f"{name}: several processes need its path, not a {kind}; save it, and give the folder")


def _words(config: PretrainConfig, data: Data, out: str | Path, init: object, folder: Path) -> list[str]:
    """The command line of a pretraining, for other processes; writes its settings, as they are now, into `folder`."""
    settings = written(config, folder / f"{fingerprint(config)}.yaml")
    start = [] if init is None else ["--init", str(init)]
    return ["pretrain", settings, "--data", *(str(path) for path in paths_of(data)), "--out", str(out), *start]


def written(config: object, path: Path) -> str:
    """Where the settings lie now, as a recipe."""
    write_bytes(path, to_yaml(config).encode())
    return str(path)


def quick_knn(index, config: PretrainConfig) -> "Probe | None":
    """A leave-one-out k-NN over some labelled images, to watch a run by; None where there are no labels."""
    import numpy as np
    import torch

    from troodon.evaluate.features import Reader, extract
    from troodon.evaluate.knn import quick

    if index.table["label"].null_count == len(index):  # of very many images, known without a look at them
        return None
    rows = np.flatnonzero(index.table["label"].is_valid().to_numpy())
    rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[:PROBED])
    classes, codes = np.unique(index.take(rows).column("label"), return_inverse=True)
    if not config.probe_every or not 2 <= len(classes) <= len(rows) // 2:
        return None
    held = index.take(rows)

    def probe(backbone: "Backbone") -> float:
        features = extract(backbone, held, blocks=1, reader=Reader(threads=config.threads))
        return quick(torch.from_numpy(features.final_ND), torch.from_numpy(codes[features.rows]))

    return probe


@dataclass(frozen=True)
class Pretrain:
    """Learn features from unlabelled images. The same command on the same folder goes on where it stopped."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    data: Images = ()
    """Folders, tars, paths inside tars, an index or a selection. A dry run does without."""
    out: str | None = None
    """The run's folder. A dry run does without."""
    init: str | None = None
    """First weights: a run, a backbone folder or released weights of the same network."""
    devices: str = "auto"
    """Devices of this machine to train on, or processes where it has none; auto is all devices.
    For a dry run, a number is one of accelerators, which need not be here."""
    dry_run: bool = False
    """Tell what the run would take, and stop."""
    images_per_second: float | None = None
    """For a dry run: what all devices together see, to tell the time by."""
    slurm: SlurmConfig = SlurmConfig()
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()

    def run(self) -> None:
        devices, slurm = self.devices, self.slurm
        if slurm.nodes and not self.dry_run:
            print(submit(self.config, self.data, self.out, slurm, init=self.init))
            return
        if slurm.nodes:
            devices = slurm.nodes * slurm.gpus_per_node
        folder = pretrain(
            self.config, self.data, self.out, init=self.init, devices=devices, dry_run=self.dry_run,
            images_per_second=self.images_per_second,
        )  # fmt: skip
        if folder is not None and self.out is not None:
            print(folder)
            of, where = self.config.objective, quoted(self.out)
            measure = f"troodon evaluate mine --backbone {where} --data LABELLED --out {where}-scores"
            if of.contrast_weight and not of.by_prototypes:  # it only learned to find copies
                images = " ".join(map(quoted, self.data))
                measure = f"troodon curate calibrate --backbone {where} --data {images}"
            suggest(measure, f"troodon report {where}")
