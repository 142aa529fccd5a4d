"""Recipes that go on from weights that are there: `start` is the config of the run given as --init.

Of a backbone alone only the network is known, and `start.reuse` is "backbone": it brings no heads.
"""

from dataclasses import replace

from troodon.config import pair
from troodon.learn.config import ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import HeadConfig
from troodon.views.config import Size

HIGH_RESOLUTION = 518  # pixels, as in the paper


def high_resolution(start: PretrainConfig, steps: int = 10_000) -> PretrainConfig:
    """The last phase of the paper: crops of 518 pixels, every schedule in 10,000 steps.

    Section 5 of https://arxiv.org/abs/2304.07193.

    Command: troodon pretrain high_resolution --init RUN --data SELECTION --out RUN-518
    Positions are resized once, to the grid of the large crops (the longer side's, if they are not square). From a run
    its heads go on learning; a backbone alone gets new ones, which learn by themselves first. The paper's learning
    rate was never published: a tenth of the first phase's is ours. For mixed resolutions set crops.mixed. Not yet run
    at full size.
    """
    vit, crops, s = start.vit, start.crops, start.schedules
    larger, share = HIGH_RESOLUTION / min(pair(crops.global_px)), steps / start.steps

    def enlarged(size: int | Size) -> int | Size:
        def one(px: int) -> int:
            return max(1, round(px * larger / vit.patch)) * vit.patch

        return one(size) if isinstance(size, int) else (one(size[0]), one(size[1]))

    def compressed(schedule: Schedule, factor: float = 1.0) -> Schedule:
        return replace(schedule, peak=schedule.peak * factor, warmup=round(schedule.warmup * share))

    wide = enlarged(crops.global_px)
    return replace(
        start,
        vit=replace(vit, grid=max(pair(wide)) // vit.patch),
        crops=replace(crops, global_px=wide, local_px=enlarged(crops.local_px), mixed=()),
        schedules=Schedules(
            lr=compressed(s.lr, 0.1),
            weight_decay=compressed(s.weight_decay),
            ema_momentum=compressed(s.ema_momentum),
            teacher_temperature=compressed(s.teacher_temperature),
            last_layer_frozen=round(s.last_layer_frozen * share),
            backbone_frozen=0 if start.reuse == "whole" else steps // 10,
            anchor=s.anchor,
        ),
        steps=steps,
    )


def heads(start: PretrainConfig, steps: int = 5000) -> PretrainConfig:
    """Heads for a backbone that has none, by the same objective, while it stays as it is: then it can teach.

    Command: troodon pretrain heads --init dinov2_vitl14_pretrain.pth --data photos/ --out HEADS, and then
    troodon distill RECIPE --teacher HEADS ... Not yet run at full size.
    """
    learning = adapt(start, steps)
    rate = Schedule(peak=1e-3, end=1e-6, warmup=steps // 10)
    return replace(
        learning,
        vit=replace(start.vit, drop_path=0.0),
        schedules=replace(learning.schedules, lr=rate, backbone_frozen=steps),
        objective=replace(learning.objective, terms=learning.objective.without("koleo")),
    )


def adapt(start: PretrainConfig, steps: int = 5000) -> PretrainConfig:
    """Go on from released or own weights on new images: a low rate, lower still for earlier blocks.

    Command: troodon pretrain adapt --init dinov2_vits14_pretrain.pth --data photos/ --out RUN
    New heads learn first, on the frozen backbone. Where the images have labels, the quick k-NN is read before the first
    step, and the run says so if features get worse. One GPU; not yet run at full size.
    """
    head = HeadConfig(prototypes=8192)
    return PretrainConfig(
        vit=replace(start.vit, drop_path=0.1),
        dino_head=head,
        ibot_head=head,
        objective=ObjectiveConfig(koleo_group=32),
        optim=OptimConfig(layer_decay=0.75),
        schedules=Schedules(
            lr=Schedule(peak=5e-5, end=1e-6, warmup=steps // 5),
            weight_decay=Schedule(peak=0.04, end=0.04),
            ema_momentum=Schedule(peak=0.996, end=1.0),
            teacher_temperature=Schedule(start=0.02, peak=0.04, end=0.04, warmup=steps // 5),
            last_layer_frozen=0,
            backbone_frozen=steps // 20,
        ),
        crops=start.crops,
        photometric=start.photometric,
        steps=steps,
        batch=64,
        probe_every=500,
    )
