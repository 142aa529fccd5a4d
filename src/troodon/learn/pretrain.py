"""Pretraining: a network learns from the moving average of itself."""

import dataclasses
from pathlib import Path

from torch import Tensor

from troodon import dist
from troodon.config import UsageError, differences, to_dict
from troodon.images.index import Index
from troodon.learn import engine, loggers
from troodon.learn.config import PretrainConfig, fits
from troodon.learn.engine import Task
from troodon.learn.recorder import Probe
from troodon.model.backbone import Backbone
from troodon.views.order import check_weights


def pretrain(
    config: PretrainConfig,
    index: Index,
    out: Path,
    *,
    init: Backbone | None = None,
    heads: dict[str, Tensor] | None = None,
    probe: Probe | None = None,
) -> Path:
    """Train until `config.steps`, or go on where the run in `out` stopped; returns the backbone's folder.

    `init` and `heads` give first weights; `probe` reads how good the average is, as a k-NN accuracy.
    Raises UsageError for what cannot work, before anything is written; Interrupted after SIGINT or SIGTERM,
    when all is saved; NotFinite when `config.guard` has no way on; OSError when the end cannot be saved.
    """
    with dist.group():
        check(config, index, init, dist.world())
        engine.run([Task(config, out, init, heads, probe)], index)
    return out / "backbone"


def check(config: PretrainConfig, index: Index, init: Backbone | None, ranks: int) -> None:
    """UsageError for a config that cannot train on these images, on so many ranks."""
    if config.objective.compared:
        raise UsageError("objective.cls_weight and patch_weight compare with a teacher's features: see troodon distill")
    sound(config, index, init, ranks)


def sound(config: PretrainConfig, index: Index, init: Backbone | None, ranks: int) -> None:
    """UsageError for numbers, images and first weights that do not go together, whatever teaches."""
    fits(config, ranks)
    loggers.check(config.log_to)
    if not len(index):
        raise UsageError("no images to train on")
    check_weights(config.weights, index.parts or (len(index),))
    if init is not None:
        same_network(config, init)


def same_network(config: PretrainConfig, init: Backbone) -> None:
    """UsageError, with the differences, for first weights of another network."""
    ours, theirs = to_dict(dataclasses.replace(config.vit, drop_path=0.0)), to_dict(init.config)
    free = ("vit.drop_path", "vit.layer_scale", "vit.grid")  # positions are resized to another grid
    if wrong := [d for d in differences(theirs, ours, "vit.") if not d.startswith(free)]:
        raise UsageError(f"init {init.name}: another network ({'; '.join(wrong)}); set the same numbers")
