"""What people see of a training before it starts: its plan as text, and a picture of its crops."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from troodon.recipes.lengths import longer_than_run
from troodon.run import say

if TYPE_CHECKING:
    from troodon.images.index import Index
    from troodon.learn.config import PretrainConfig
    from troodon.model.config import ViTConfig
    from troodon.views.loader import Loader


def plan_here(
    config: "PretrainConfig",
    images: int | None,
    ranks: int,
    teachers: Sequence["ViTConfig"] = (),
    images_per_second: float | None = None,
) -> str:
    """What a training would take on `ranks` devices like this machine's, whose speed is measured."""
    from troodon import dist
    from troodon.learn.plan import plan, timed

    device = dist.device()
    compute = dist.compute_dtype(config.compute, device)
    planned = plan(config, images, device.type, compute.itemsize, ranks, images_per_second, teachers)
    return (planned if images_per_second else timed(planned, device, compute)).render()


def loader_of(config: "PretrainConfig", index: "Index") -> "Loader":
    """The batches of a training, for a look at them."""
    from troodon.views.attacks import random_attack
    from troodon.views.loader import Loader

    return Loader(
        index, config.crops, config.photometric, config.masks, config.vit.patch, config.batch, config.seed,
        channels=config.vit.channels, weights=config.weights, attack=random_attack,
    )  # fmt: skip


def before_training(index: "Index", teachers: Sequence["ViTConfig"] = ()) -> "Callable[[PretrainConfig, Path], None]":
    """A function that prints the plan of a training on this group of ranks, and draws its first crops into its run."""
    from troodon import dist
    from troodon.learn.plan import shapes_change
    from troodon.views import sheet

    def before(config: "PretrainConfig", run: Path) -> None:
        if uneven := shapes_change(config, dist.world_size()):
            say(f"warning: {uneven}")
        say(plan_here(config, len(index), dist.world_size(), teachers))
        if longer := longer_than_run(config):
            say(f"  longer than the run of {config.steps:,} steps: {', '.join(longer)}")
        if not (picture := run / "pictures" / "crops.png").exists():
            sheet.draw_crops(loader_of(config, index), picture)

    return before
