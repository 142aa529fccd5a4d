"""The verb `pretrain`, on this machine or as a Slurm job: a recipe, images and initial weights become a run."""

import functools
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, Suppress, arg

from troodon import recipes, slurm
from troodon.config import UsageError, differences, fingerprint, to_dict
from troodon.devices import ranks_to_start
from troodon.launch import began_at
from troodon.learn import outcome
from troodon.learn.config import PretrainConfig
from troodon.learn.outcome import METRICS
from troodon.lock import alone
from troodon.recipes import earlier, lengths
from troodon.run import MetricsFile, read_manifest, say
from troodon.slurm import SlurmConfig
from troodon.verbs import automatic
from troodon.verbs.common import (
    Data,
    Paths,
    as_backbone,
    as_list,
    check_devices,
    config_of_weights,
    is_first,
    launch_ranks,
    open_images,
    range_before,
    require_paths,
    resolve_config,
    suggest_next,
    write_config,
)
from troodon.verbs.plans import before_training, plan_here

if TYPE_CHECKING:
    from troodon.learn.recorder import Probe
    from troodon.model.backbone import Backbone
    from troodon.model.saved import SavedViT

PROBE_IMAGES = 1000  # labelled images, at most, of the quick k-NN of a training run


def pretrain(
    recipe: str | PretrainConfig,
    data: Data | None = None,
    out: str | Path | None = None,
    *,
    init: "str | Path | Backbone | None" = None,
    settings: dict | None = None,
    minutes: float | None = None,
    devices: str | int = "auto",
    dry_run: bool = False,
    images_per_second: float | None = None,
) -> Path | None:
    """Learn features from unlabelled images, or go on where the run in `out` stopped. Returns the backbone's folder.

    `settings` changes the recipe: {"steps": 1000, "schedules": {"lr": {"peak": 1e-3}}}. `init` gives initial weights.
    `minutes` is the time that the run takes, in place of a number of steps: see learn/clock.py.
    `devices` is the number of devices of this machine to train on, "auto" for all. Several are used by one process
    each, which opens `data` and `init` by their paths; UsageError, Interrupted or RuntimeError is then what ended the
    first process that failed.
    `dry_run` only prints the plan, also without `data` and `out`. A number of `devices` is then one of accelerators,
    which need not be in this machine, and the plan has the time if they process `images_per_second` together.
    """
    began, settings = began_at(), _with_minutes(settings, minutes)
    if recipe == automatic.NAME:
        length = {name: max(0, (settings or {}).get(name, 0)) for name in ("minutes", "steps")}  # others are refused
        choice = automatic.choose(data, out, devices=devices, init=init, **length)
        recipe = choice.config
        automatic.tell(choice.reasons)
    config = resolve_config(recipe, PretrainConfig(), pretrain_recipes(init), settings)
    check_devices(devices)
    if images_per_second is not None and not (dry_run and 0 < images_per_second < float("inf")):
        raise UsageError(f"images_per_second {images_per_second}: is above 0, and for a dry run")
    if dry_run:
        return _print_plan(config, data, init, devices, images_per_second)
    data, out = _require_data_and_out(data, out)
    with alone(Path(out)):
        config = as_begun(config, Path(out))
        folder = _pretrain(config, data, out, init, devices, began)
        if is_first():
            outcome.tell(Path(out), config)
            record_steps(Path(out), config)
        return folder


def _with_minutes(settings: dict | None, minutes: float | None) -> dict | None:
    """The settings with a time; UsageError if they have a number of steps too."""
    settings = settings if minutes is None else (settings or {}) | {"minutes": minutes}
    if settings and settings.get("minutes") and "steps" in settings:
        raise UsageError(f"steps {settings['steps']} and minutes {settings['minutes']}: give one of them")
    return settings


def record_steps(out: Path, config: PretrainConfig) -> None:
    """Once a run of so many minutes has ended, its config.yaml has the steps that came of them."""
    if config.minutes:
        steps = max((record["step"] for record in MetricsFile(out / METRICS).read() if "step" in record), default=0) + 1
        write_config(lengths.for_steps(config, steps), out / "config.yaml")


def _pretrain(
    config: PretrainConfig,
    data: Data,
    out: str | Path,
    init: "str | Path | Backbone | None",
    devices: str | int,
    began: float,
) -> Path:
    """Train, on ranks of this machine where there are several devices; returns the backbone's folder."""
    from troodon.images.cache import cached
    from troodon.learn import heads, loggers
    from troodon.learn import pretrain as training
    from troodon.views.attacks import random_attack

    ranks = ranks_to_start(devices)
    if ranks > 1:
        require_paths(data=data, init=init)
    start = None if init is None else first_backbone(config, as_backbone(init))
    index = open_images(data, config.range, range_before(Path(out), start))
    config = replace(config, range=index.range)
    loggers.check(config.log_to)
    training.check(config, index, start, max(ranks, int(os.environ.get("WORLD_SIZE", 1))))
    if ranks > 1:
        del index, start  # each rank has its own
        with tempfile.TemporaryDirectory(prefix="troodon-") as folder:
            launch_ranks(_command_words(config, data, out, init, Path(folder)), ranks, began)
        return Path(out) / "backbone"
    own = None
    if config.reuse == "whole":
        if not isinstance(init, str | Path) or (first := config_of_weights(init)).reuse != "whole":
            raise UsageError("reuse whole: takes the heads of a run, so --init must be one")
        own = heads.of_run(Path(init), first)
    probe = make_probe(index, config)
    return training.pretrain(
        config,
        cached(index, config.image_cache_gib),
        Path(out),
        init=start,
        heads=own,
        probe=probe,
        before=before_training(index),
        attack=random_attack,
        open_log=loggers.open_for,
        began=began,
    )


def first_backbone(config: PretrainConfig, backbone: "Backbone") -> "Backbone":
    """The weights that a training begins with, for images of as many channels as it has."""
    colours = config.photometric
    if backbone.channels == config.vit.channels or len(colours.mean) != config.vit.channels:
        return backbone
    from troodon.model.channels import with_channels

    if is_first():
        say(
            f"  init has {backbone.channels} channels: each of {config.vit.channels} begins with a share of all of them"
        )
    return with_channels(backbone, colours.mean, colours.std)


def _print_plan(
    config: PretrainConfig,
    data: Data | None,
    init: "str | Path | Backbone | None",
    devices: str | int,
    images_per_second: float | None,
) -> None:
    """Print what a run would take: on this machine, with its measured speed, or on any number of accelerators."""
    from troodon.images.sources import open_source
    from troodon.learn.config import fits
    from troodon.learn.plan import plan

    images = len(open_source(*as_list(data))) if data else None
    if init is not None:
        fits(config, 1 if devices == "auto" else int(devices))
        from troodon.learn.pretrain import same_network

        same_network(config, first_backbone(config, as_backbone(init)))
    if devices != "auto":  # without torch, which would take most of the time to load
        fits(config, int(devices))
        width = 4 if config.compute == "fp32" else 2
        return say(plan(config, images, "cuda", width, int(devices), images_per_second).render())

    ranks = ranks_to_start("auto")
    fits(config, ranks)
    return say(plan_here(config, images, ranks, images_per_second=images_per_second))


def as_begun(config: PretrainConfig, out: Path) -> PretrainConfig:
    """The config with which a run in `out` goes on, if there is one: see recipes/lengths.py and earlier.py."""
    manifest = read_manifest(out) or {"kind": None}
    recorded = manifest["settings"]["config"] if manifest["kind"] == "run" else None
    if recorded is not None and (found := earlier.as_it_was(config, recorded)):
        say(f"  {out}: an earlier version began this run with the recipe that is called {found[1]} now, and it stays")
        return found[0]
    begun = lengths.as_begun(config, recorded)
    if begun != config:
        changes = "; ".join(differences(to_dict(config), to_dict(begun)))
        say(f"  {out}: an earlier version began this run with other numbers of steps, which stay ({changes})")
    return begun


def pretrain_recipes(init: "str | Path | Backbone | None") -> Callable[[str], PretrainConfig]:
    """A function from a recipe's name to its config; `init` is for recipes that go on from weights."""
    return lambda name: recipes.pretrain(name, lambda: None if init is None else config_of_weights(init))


def submit(
    recipe: str | PretrainConfig,
    data: Data | None,
    out: str | Path | None,
    job: SlurmConfig,
    *,
    init: str | Path | None = None,
    settings: dict | None = None,
) -> str:
    """Queue what `pretrain` does as a Slurm job on `job.nodes` machines; returns the job's id.

    UsageError for a mistake, before anything is queued.
    """
    config = resolve_config(recipe, PretrainConfig(), pretrain_recipes(init), settings)
    data, out = _require_data_and_out(data, out)
    from troodon.images.sources import open_source
    from troodon.learn import loggers
    from troodon.learn import pretrain as training

    slurm.check(job)
    require_paths(data=data, init=init)
    ranks = job.nodes * job.gpus_per_node
    loggers.check(config.log_to)
    start = None if init is None else first_backbone(config, as_backbone(init))
    training.check(config, open_source(*as_list(data)), start, ranks)
    file = write_config(config, slurm.logs_folder(out) / f"{fingerprint(config)}.yaml")
    places = [str(path) for path in as_list(data)], str(out), None if init is None else str(init)
    return slurm.submit(functools.partial(_train, file, *places), "troodon pretrain", out, job)


def _train(settings: str, data: list[str], out: str, init: str | None) -> None:
    """What each rank of the job does, by the config in the file `settings`."""
    config = resolve_config(settings, PretrainConfig(), recipes.pretrain)
    folder = pretrain(config, data, out, init=init)
    if folder is not None:
        _print_result(folder, config, data, out)


def _print_result(backbone: Path, config: PretrainConfig, data: Sequence[str], out: str) -> None:
    """Print the backbone's folder, and suggest the next commands."""
    print(backbone)
    where = shlex.quote(out)
    measure = f"troodon evaluate mine --backbone {where} --data LABELLED --out {where}-scores"
    if config.crops.attack:  # it learned to find copies
        images = " ".join(map(shlex.quote, data))
        measure = f"troodon curate calibrate --backbone {where} --data {images}"
    suggest_next(measure, f"troodon report {where}")


def _require_data_and_out(data: Data | None, out: str | Path | None) -> tuple[Data, str | Path]:
    """Both; UsageError where one is missing, which only a dry run allows."""
    if data is not None and data != () and out is not None:
        return data, out
    missing = [f"--{name}" for name, value in (("data", data), ("out", out)) if value in (None, ())]
    raise UsageError(f"no {' and no '.join(missing)}; or give --dry-run to see what the run would take")


def _command_words(config: PretrainConfig, data: Data, out: str | Path, init: object, folder: Path) -> list[str]:
    """The command line of a pretraining, for other processes; writes its config into `folder`."""
    settings = write_config(config, folder / f"{fingerprint(config)}.yaml")
    start = [] if init is None else ["--init", str(init)]
    return ["pretrain", settings, "--data", *(str(path) for path in as_list(data)), "--out", str(out), *start]


def make_probe(index, config: PretrainConfig) -> "Probe | None":
    """A leave-one-out k-NN over some labelled images, to monitor a run; None where there are no labels."""
    import numpy as np
    import torch

    from troodon import dist
    from troodon.evaluate.features import Reader, extract
    from troodon.evaluate.knn import knn_accuracy
    from troodon.model.backbone import Backbone

    if index.table["label"].null_count == len(index):  # quick, also for very many images
        return None
    rows = np.flatnonzero(index.table["label"].is_valid().to_numpy())
    rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[:PROBE_IMAGES])
    classes, codes = np.unique(index.take(rows).column("label"), return_inverse=True)
    if not config.probe_every or not 2 <= len(classes) <= len(rows) // 2:
        return None
    subset = index.take(rows)

    def probe(saved: "SavedViT") -> float:
        features = extract(
            Backbone.of(saved).to(dist.device()), subset, blocks=1, reader=Reader(threads=config.threads)
        )
        return knn_accuracy(torch.from_numpy(features.final_ND), torch.from_numpy(codes[features.rows]))

    return probe


@dataclass(frozen=True)
class Pretrain:
    """Learn features from unlabelled images. The same command on the same folder goes on where it stopped."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    data: Paths = ()
    """Folders, tars, paths inside tars, an index or a selection. Not needed for a dry run."""
    out: str | None = None
    """The run's folder. Not needed for a dry run."""
    init: str | None = None
    """Initial weights, of the same network: a run, a backbone folder, weights in any file, or a name such as
    dinov2_vits14."""
    devices: str = "auto"
    """Devices of this machine to train on, or processes where it has none; auto is all devices.
    For a dry run, a number of accelerators, which need not be in this machine."""
    hours: float = 0.0
    """Hours that the run takes, in place of --minutes or --steps."""
    dry_run: bool = False
    """Print what the run would take, and stop."""
    images_per_second: float | None = None
    """For a dry run: images per second on all devices together, from which the time follows."""
    slurm: SlurmConfig = SlurmConfig()
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()
    reasons: Suppress[tuple[str, ...]] = ()  # of the recipe auto

    def run(self) -> None:
        devices, job = self.devices, self.slurm
        if not 0 <= self.hours < float("inf"):
            raise UsageError(f"hours {self.hours:g}: must be 0 or more")
        automatic.tell(self.reasons)
        config = replace(self.config, minutes=60 * self.hours or self.config.minutes)
        if job.nodes and not self.dry_run:
            print(submit(config, self.data, self.out, job, init=self.init))
            return
        if job.nodes:
            devices = job.nodes * job.gpus_per_node
        folder = pretrain(
            config, self.data, self.out, init=self.init, devices=devices, dry_run=self.dry_run,
            images_per_second=self.images_per_second,
        )  # fmt: skip
        if folder is not None and self.out is not None:
            _print_result(folder, config, self.data, self.out)
