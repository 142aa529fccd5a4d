"""A teacher that no longer learns, as distillation describes it and as the objective uses it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from troodon.learn.config import PretrainConfig
from troodon.learn.network import Network
from troodon.model.config import ViTConfig
from troodon.model.saved import SavedViT
from troodon.views.batch import Batch

# Shape suffixes: N global crops, P patches of a crop, D channels.


@dataclass(frozen=True)
class Teacher:
    """A trained network: its backbone, and of a run also its config and the heads it was trained with."""

    backbone: SavedViT
    run: PretrainConfig | None = None
    heads: dict[str, Tensor] | None = None
    place: str = ""  # its path, as it was given

    @property
    def name(self) -> str:
        return self.place or self.backbone.name

    @property
    def vit(self) -> ViTConfig:
        return self.backbone.config


class FrozenTeacher(Protocol):
    """A teacher at work: its network, and its tokens of a batch, which it computes once for all students."""

    network: Network
    vit: ViTConfig

    def cls(self, batch: Batch) -> Tensor:
        """(N, D): class tokens of the global crops, one view after another."""
        ...

    def patches(self, batch: Batch, patch: int) -> Tensor:
        """(N, P, D): patches of the global crops, on the grid of patches of this size."""
        ...


# From config, run folder, number of images, device and dtype of products to teachers at work, which end with the block.
Build = Callable[..., AbstractContextManager[Sequence[FrozenTeacher]]]


def no_teachers(*_: object) -> AbstractContextManager[Sequence[FrozenTeacher]]:
    """In pretraining the EMA teaches."""
    return nullcontext([])
