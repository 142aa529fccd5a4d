"""What can be set about a training run. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from troodon.config import Range, UsageError, check_range, pair, within
from troodon.learn.objective import ObjectiveConfig
from troodon.learn.schedules import Schedules
from troodon.model.config import HeadConfig, ViTConfig, depth_group
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the rules of its parameter groups."""

    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0
    """Largest norm of the gradient."""
    clip_over: Literal["part", "whole"] = "part"
    """Whether that is the norm of each part by itself (backbone, head, head), or of all of them together."""
    layer_decay: float = 1.0
    """Factor of the learning rate per block of distance from the output."""
    patch_embed: float = 0.2
    """Factor of the learning rate of the patch embedding."""

    def __post_init__(self) -> None:
        within(self, "optim.", 0, 1, "betas")
        within(self, "optim.", 0, None, "clip", "layer_decay", "patch_embed")


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is laid over memory and devices: it changes what a step costs, not what it computes."""

    accumulate: int = 1
    """Parts into which a rank's images are cut, to go through the networks one after another and save memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing; all but products and attention; whole blocks."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile every block, and what is done to colours (torch.compile); auto is on a GPU, if Triton and a C compiler
    are there, and if blocks have one shape: with vit.drop_path, where whole groups of images go through them."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the backbone's gradients are summed over ranks; those of heads always in fp32."""

    RENAMED: ClassVar[Mapping[str, str]] = {"compile": "compile", "no_compile": "compile"}  # it was a flag

    @staticmethod
    def renewed(options: dict[str, list[str]]) -> dict[str, list[str]]:
        """The option `compile` for the flag of earlier versions."""
        return {"compile": ["never" if "no_compile" in options else "always"]}

    def __post_init__(self) -> None:
        within(self, "parallel.", 1, None, "accumulate")


@dataclass(frozen=True)
class GuardConfig:
    """What happens when a loss or a gradient is not finite. Nothing is changed by such a step in any case."""

    policy: Literal["rollback", "skip", "stop"] = "rollback"
    """Go on from the last checkpoint with the images that follow; leave the step out; or stop."""
    limit: int = 3
    """Times in a run; then it stops."""

    def __post_init__(self) -> None:
        within(self, "guard.", 0, None, "limit")


@dataclass(frozen=True)
class AdaptConfig:
    """How a run that goes on from trained weights keeps what they know."""

    rank: int = 0
    """Rank of low-rank adapters (https://arxiv.org/abs/2106.09685), which alone learn; 0: all weights learn."""
    patience: int = 0
    """Quick k-NN readings in a row, all clearly below the best one, after which the run stops; its backbone is then the
    best one, if the images have labels. 0: it never stops, and its backbone is the last one."""

    def __post_init__(self) -> None:
        within(self, "adapt.", 0, None, "rank", "patience")


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
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    adapt: AdaptConfig = AdaptConfig()
    reuse: Literal["backbone", "whole"] = "backbone"
    """What is taken of the run given as --init: its backbone, or its heads as well."""
    steps: int = 125_000
    """Optimiser steps. With minutes: those that schedules are written for."""
    minutes: float = 0.0
    """Minutes that the run takes from command to end, in place of a number of steps: it measures its steps, and goes
    through its schedules in those that fit in. 0: `steps` decides."""
    batch: int = 2048
    """Images per step, over all ranks."""
    seed: int = 0
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto is bf16 where the processor is faster with it."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by their type if left out."""
    weights: tuple[float, ...] = ()
    """How often each source of --data is shown, relative to the others; by its number of images if left out."""
    threads: int = 0
    """Threads that read and crop images; 0 is one per processor, at most 16."""
    processes: int | None = None
    """Processes that read and crop images in their place; 0 is none. If left out, on a GPU as many as threads, where
    shared memory (/dev/shm) holds the batches."""
    image_cache_gib: float | None = None
    """GiB of memory, over all ranks of a machine, for decoded images, kept if all of them fit; 0 keeps none. If left
    out, a quarter of what is free."""
    log_every: int = 10
    """Steps between records of metrics.jsonl."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where records go besides metrics.jsonl."""
    health_every: int = 100
    """Steps between readings of the run's health; 0 is never."""
    probe_every: int = 1000
    """Steps between quick k-NN readings, where the images have labels; 0 is never."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end and on interruption."""
    keep: int = 2
    """Checkpoints kept, the newest."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for ever; 0 is none."""
    max_broken: float = 0.5
    """Share of the images tried that may be unreadable; above it, the run saves and stops."""

    inference_px: int = 0
    """Side to which the trained backbone resizes images, without a margin; 0: the side of global crops, from images an
    eighth larger. Networks that learn from small crops see more in larger images (docs/small-data.md)."""

    LATER = ("adapt", "image_cache_gib", "inference_px", "minutes")

    def __post_init__(self) -> None:
        within(self, "", 1, None, "steps", "log_every", "checkpoint_every", "keep")
        within(self, "", 0, None, "threads", "processes", "health_every", "probe_every", "keep_every", "seed")
        within(self, "", 0, None, "minutes", "inference_px")
        within(self, "", 0, 2**20, "image_cache_gib")
        within(self, "", 0, 1, "max_broken")
        check_range(self.range)
        if not self.minutes < float("inf"):
            raise UsageError(f"minutes {self.minutes}: a run ends; give a number of minutes, or steps")
        if self.batch < 2:
            raise UsageError(f"batch {self.batch}: a step compares images, so it needs at least 2")


def constant_shapes(config: PretrainConfig, ranks: int) -> bool:
    """Whether blocks have the same shapes at every step: with stochastic depth, where whole groups of images do."""
    images = config.batch // ranks // config.parallel.accumulate
    return not config.vit.drop_path or images % depth_group(config.batch) == 0


def fits(config: PretrainConfig, ranks: int) -> None:
    """UsageError for numbers that do not go together: crops and patches, channels, a step and what it is cut into."""
    patch, channels = config.vit.patch, config.vit.channels
    sizes = [
        ("crops.global_px", pair(config.crops.global_px))
    ]  # evaluation sees this one also of a run with mixed sizes
    sizes += [("inference_px", pair(config.inference_px))] if config.inference_px else []
    for wide, narrow, _ in config.crops.sizes():
        sizes += [("crops.mixed", wide), ("crops.mixed", narrow)] if config.crops.mixed else []
        sizes += [("crops.local_px", narrow)] if config.crops.locals and not config.crops.mixed else []
    for name, size in sizes:
        if (near := tuple(max(patch, round(px / patch) * patch) for px in size)) != size:
            px, nearest = (" ".join(map(str, s if size[0] != size[1] else s[:1])) for s in (size, near))
            raise UsageError(f"{name} {px} does not divide into patches of {patch}; the nearest is {nearest}")
    if (known := len(config.photometric.mean)) != channels:
        fix = f"set photometric.mean and photometric.std to {channels} numbers each"
        raise UsageError(f"photometric.mean has {known} numbers for {channels} channels: {fix}")

    if config.crops.attack and channels not in (1, 3):
        reason = f"attacks are for pictures in grey or colour, not for images of {channels} channels; set it to 0"
        raise UsageError(f"crops.attack {config.crops.attack:g}: {reason}")

    batch, parts, group = config.batch, config.parallel.accumulate, config.objective.koleo_group
    if batch % (ranks * parts):
        near = max(1, round(batch / (ranks * parts))) * ranks * parts
        fewer = [n for n in range(1, ranks) if batch % (n * parts) == 0]
        where = f"{ranks} devices" + (f" of parallel.accumulate {parts} parts" if parts > 1 else "")
        other = f", or devices {fewer[-1]}" if fewer else ""
        raise UsageError(f"batch {batch} does not divide over {where}: set batch {near}{other}")
    if config.objective.weight("contrast") and parts > 1:
        fix = "set it to 1, and a smaller batch or more devices"
        raise UsageError(
            f"parallel.accumulate {parts}: contrast in objective.terms compares all images of a step: {fix}"
        )
    if not (config.objective.weight("koleo") or config.objective.weight("kde")):
        return
    if batch % max(group, 1):
        raise UsageError(f"objective.koleo_group {group} does not divide the batch of {batch} images")
    part = batch // ranks // parts
    if parts > 1 and (not group or part % group):
        raise UsageError(
            f"objective.koleo_group {group} looks for neighbours beyond the {part} images that parallel.accumulate "
            f"{parts} leaves in memory at once; the nearest that can be exact is {part}"
        )
