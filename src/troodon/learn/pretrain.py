"""Pretraining: a network learns from the EMA of itself."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from troodon import dist
from troodon.config import UsageError, differences, to_dict
from troodon.learn import engine
from troodon.learn.config import PretrainConfig, fits
from troodon.learn.engine import Task
from troodon.learn.recorder import OpenLog, Probe
from troodon.model.saved import SavedViT
from troodon.views.crops import Attack
from troodon.views.image_source import ImageSource
from troodon.views.order import check_weights


def pretrain(
    config: PretrainConfig,
    index: ImageSource,
    out: Path,
    *,
    init: SavedViT | None = None,
    heads: dict[str, Tensor] | None = None,
    probe: Probe | None = None,
    before: Callable[[PretrainConfig, Path], None] | None = None,
    attack: Attack | None = None,
    open_log: OpenLog | None = None,
    began: float | None = None,
) -> Path:
    """Train `config.steps`, or for `config.minutes` from `began` on, or go on where the run in `out` stopped; returns
    the backbone's folder.

    `init` and `heads` give first weights. `probe` measures the EMA, as a k-NN accuracy. `before` is called with the
    config and `out` before the training starts, on rank zero. `attack` attacks pictures, if `config.crops` asks for it.
    `open_log` opens the places of `config.log_to` (loggers.py).
    Raises UsageError for what cannot work, before anything is written; Interrupted after SIGINT or SIGTERM, once all is
    saved; NotFinite if `config.guard` knows no way on; OSError if the end cannot be saved.
    """
    with dist.process_group():
        check(config, index, init, dist.world_size())
        engine.run([Task(config, out, init, heads, probe, before, attack, open_log, began)], index)
    return out / "backbone"


def check(config: PretrainConfig, index: ImageSource, init: SavedViT | None, ranks: int) -> None:
    """UsageError for a config that cannot train on these images, on so many ranks."""
    if config.objective.features:
        raise UsageError("objective.terms cls_features and patch_features need a teacher: see troodon distill")
    check_common(config, index, init, ranks)


def check_common(config: PretrainConfig, index: ImageSource, init: SavedViT | None, ranks: int) -> None:
    """UsageError for settings, images and first weights that do not fit, in pretraining and in distillation."""
    fits(config, ranks)
    if not len(index):
        raise UsageError("no images to train on")
    check_weights(config.weights, index.source_lengths or (len(index),))
    if init is not None:
        same_network(config, init)
    elif config.adapt.rank:
        raise UsageError(f"adapt.rank {config.adapt.rank}: there are no weights to adapt; give them as --init")


def same_network(config: PretrainConfig, init: SavedViT) -> None:
    """UsageError, with the differences, for first weights of another network."""
    ours, theirs = to_dict(dataclasses.replace(config.vit, drop_path=0.0)), to_dict(init.config)
    free = ("vit.drop_path", "vit.layer_scale", "vit.grid")  # positions are resized to another grid
    if wrong := [d for d in differences(theirs, ours, "vit.") if not d.startswith(free)]:
        raise UsageError(f"init {init.name}: another network ({'; '.join(wrong)}); set the same numbers")
