"""What can be set about a training run. No torch here."""

from dataclasses import dataclass
from typing import Literal

from troodon.config import UsageError, within
from troodon.data.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.learn.schedules import Schedules
from troodon.model.config import HeadConfig, ViTConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """DINO + iBOT + KoLeo (https://arxiv.org/abs/2304.07193, section 4)."""

    targets: Literal["sinkhorn", "centring"] = "sinkhorn"
    """How the teacher's logits become targets."""
    heads: Literal["separate", "shared"] = "separate"
    """Whether the patch objective has a head of its own."""
    student_temperature: float = 0.1
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int = 0
    """Images among which the nearest neighbour is looked for; 0 is all of a rank's."""
    centre_momentum: float = 0.9
    """Share of the centre that stays at each step, with centring."""

    def __post_init__(self) -> None:
        within(self, "objective.", 1e-4, None, "student_temperature")
        within(self, "objective.", 0, None, "dino_weight", "ibot_weight", "koleo_weight", "koleo_group")
        within(self, "objective.", 0, 1, "centre_momentum")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the rules of its parameter groups."""

    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0
    """Largest norm of the gradient of each sub-network: backbone, head, head."""
    layer_decay: float = 1.0
    """Factor of the learning rate per block of distance from the output."""
    patch_embed: float = 0.2
    """Factor of the learning rate of the patch embedding."""

    def __post_init__(self) -> None:
        within(self, "optim.", 0, 1, "betas")
        within(self, "optim.", 0, None, "clip", "layer_decay", "patch_embed")


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run, whole."""

    vit: ViTConfig = ViTConfig()
    dino_head: HeadConfig = HeadConfig(prototypes=131072, bottleneck=384)
    ibot_head: HeadConfig = HeadConfig(prototypes=131072, bottleneck=256)
    """Not used when the heads are shared."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    schedules: Schedules = Schedules()
    crops: CropsConfig = CropsConfig()
    photometric: PhotometricConfig = PhotometricConfig()
    masks: MasksConfig = MasksConfig()
    steps: int = 125_000
    """Optimiser steps."""
    batch: int = 2048
    """Images per step, over all ranks."""
    seed: int = 0
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto is bf16 where the processor is faster with it."""
    threads: int = 0
    """Threads that read and crop images; 0 is one per processor, at most 16."""
    log_every: int = 10
    """Steps between records of metrics.jsonl."""
    probe_every: int = 1000
    """Steps between quick k-NN readings, where the images have labels; 0 is never."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end and on interruption."""
    keep: int = 2
    """Checkpoints kept, the newest."""

    def __post_init__(self) -> None:
        within(self, "", 1, None, "steps", "log_every", "checkpoint_every", "keep")
        within(self, "", 0, None, "threads", "probe_every", "seed")
        if self.batch < 2:
            raise UsageError(f"batch {self.batch}: a step compares images, so it needs at least 2")
