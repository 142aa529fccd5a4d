"""The plan of a training, as text for people."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from troodon.run import say

if TYPE_CHECKING:
    from troodon.learn.config import PretrainConfig
    from troodon.model.config import ViTConfig


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


def announce(images: int, teachers: Sequence["ViTConfig"] = ()) -> "Callable[[PretrainConfig], None]":
    """A function that prints the plan of a training that starts on this group of ranks."""
    from troodon import dist

    return lambda config: say(plan_here(config, images, dist.world_size(), teachers))
