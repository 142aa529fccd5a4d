"""The three recipes of the DINOv2 release, number for number (https://arxiv.org/abs/2304.07193, appendix B)."""

from dataclasses import replace

from troodon.data.config import CropsConfig
from troodon.learn.config import ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import GIANT, LARGE, HeadConfig, ViTConfig


def vitl16_short() -> PretrainConfig:
    """ViT-L/16 on ImageNet-1k in 125,000 steps of 2048 images.

    Command: torchrun --nproc-per-node 8 --nnodes 4 -m troodon.cli pretrain vitl16_short --data imagenet/train --out RUN
    Machines and time stated by the release: 32 A100, about a day. Its k-NN 81.6 %, linear 82.9 %.
    """
    head = HeadConfig(prototypes=65_536, bottleneck=256)
    return PretrainConfig(
        vit=_network(LARGE, patch=16, drop_path=0.3),
        dino_head=head,
        ibot_head=head,
        objective=ObjectiveConfig(targets="centring", heads="shared"),
        optim=OptimConfig(layer_decay=0.9),
        schedules=_schedules(lr=5.657e-3, warmup=12_500, decay=0.4, momentum=0.992),
        crops=CropsConfig(local_px=96),
        steps=125_000,
        batch=2048,
    )


def vitl14() -> PretrainConfig:
    """ViT-L/14 on ImageNet-22k in 625,000 steps of 3072 images.

    Command: torchrun --nproc-per-node 8 --nnodes 12 -m troodon.cli pretrain vitl14 --data imagenet22k --out RUN
    Machines stated by the release: 96 A100. Its k-NN 82.0 %, linear 84.5 %.
    """
    return PretrainConfig(
        vit=_network(replace(LARGE, mlp="swiglu"), patch=14, drop_path=0.4),
        schedules=_schedules(lr=3.464e-4, warmup=100_000, decay=0.2, momentum=0.994),
        steps=625_000,
        batch=3072,
    )


def vitg14() -> PretrainConfig:
    """ViT-g/14 (1.1 billion parameters) in 625,000 steps of 3072 images; in the paper on LVD-142M.

    Command: torchrun --nproc-per-node 8 --nnodes 12 -m troodon.cli pretrain vitg14 --data SELECTION --out RUN
    Stated by the release, on LVD-142M: k-NN 83.5 %, linear 86.5 %.
    """
    return replace(vitl14(), vit=_network(GIANT, patch=14, drop_path=0.4))


def _network(size: ViTConfig, *, patch: int, drop_path: float) -> ViTConfig:
    """Positions learned at the global crop's grid, and resized for local crops as the release did."""
    return replace(
        size, patch=patch, grid=224 // patch, drop_path=drop_path, position_offset=0.1, position_antialias=False
    )


def _schedules(*, lr: float, warmup: int, decay: float, momentum: float) -> Schedules:
    return Schedules(
        lr=Schedule(peak=lr, end=1e-6, warmup=warmup),
        weight_decay=Schedule(peak=0.04, end=decay),
        momentum=Schedule(peak=momentum, end=1.0),
        teacher_temperature=Schedule(start=0.04, peak=0.07, end=0.07, warmup=37_500),
        last_layer_frozen=1_250,
    )
