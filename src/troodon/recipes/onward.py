"""Recipes that go on from weights that are there: `start` is the config of the run given as --init.

Of a backbone alone only the network is known, and `start.reuse` is "backbone": it brings no heads.
"""

from dataclasses import replace

from troodon.config import pair
from troodon.learn.config import AdaptConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import HeadConfig
from troodon.recipes.lengths import for_steps
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
    vit, crops, compressed = start.vit, start.crops, for_steps(start, 10_000)
    s = compressed.schedules
    larger = HIGH_RESOLUTION / min(pair(crops.global_px))

    def enlarged(size: int | Size) -> int | Size:
        def one(px: int) -> int:
            return max(1, round(px * larger / vit.patch)) * vit.patch

        return one(size) if isinstance(size, int) else (one(size[0]), one(size[1]))

    wide = enlarged(crops.global_px)
    config = replace(
        compressed,
        vit=replace(vit, grid=max(pair(wide)) // vit.patch),
        crops=replace(crops, global_px=wide, local_px=enlarged(crops.local_px), mixed=()),
        schedules=replace(
            s,
            lr=replace(s.lr, peak=s.lr.peak * 0.1),
            backbone_frozen=0 if start.reuse == "whole" else 1000,
            anchor=start.schedules.anchor,
        ),
        adapt=AdaptConfig(),
    )
    return for_steps(config, steps)


def heads(start: PretrainConfig, steps: int = 5000) -> PretrainConfig:
    """Heads for a backbone that has none, by the same objective, while it stays as it is: then it can teach.

    Command: troodon pretrain heads --init dinov2_vitl14_pretrain.pth --data photos/ --out HEADS, and then
    troodon distill RECIPE --teacher HEADS ... Not yet run at full size.
    """
    learning = adapt(start)
    config = replace(
        learning,
        vit=replace(start.vit, drop_path=0.0),
        schedules=replace(
            learning.schedules, lr=Schedule(peak=1e-3, end=1e-6, warmup=500), backbone_frozen=learning.steps
        ),
        objective=replace(learning.objective, terms=learning.objective.without("kde")),
        adapt=AdaptConfig(),
        probe_every=500,
    )
    return for_steps(config, steps)


def adapt(start: PretrainConfig, steps: int = 5000) -> PretrainConfig:
    """Go on from released or own weights on new images: a low rate, lower still for earlier blocks.

    Command: troodon pretrain adapt --init dinov2_vits14_pretrain.pth --data photos/ --out RUN
    New heads learn first, on the frozen backbone. Where the images have labels, the quick k-NN is read before the first
    step and twenty times on the way: the best weights are kept, and the run stops if features stay worse. Low-rank
    adapters: --adapt.rank 8. One GPU; not yet run at full size (docs/adapt.md).
    """
    head = HeadConfig(prototypes=8192)
    config = PretrainConfig(
        vit=replace(start.vit, drop_path=0.1),
        dino_head=head,
        ibot_head=head,
        objective=ObjectiveConfig(terms=(("dino", 1.0), ("ibot", 1.0), ("kde", 0.05)), koleo_group=32),
        optim=OptimConfig(layer_decay=0.75),
        schedules=Schedules(
            lr=Schedule(peak=2e-4, end=1e-6, warmup=1000),
            weight_decay=Schedule(peak=0.04, end=0.04),
            ema_momentum=Schedule(peak=0.994, end=1.0),
            teacher_temperature=Schedule(start=0.02, peak=0.04, end=0.04, warmup=1000),
            last_layer_frozen=0,
            backbone_frozen=500,
        ),
        crops=replace(start.crops, globals=2),
        photometric=start.photometric,
        steps=5000,
        batch=128,
        adapt=AdaptConfig(patience=5),
        probe_every=250,
    )
    return for_steps(config, steps)
