"""The recipes of the DINOv2 release, number for number (https://arxiv.org/abs/2304.07193, appendix B), and their
smaller sisters, which the release did not train by themselves.

KoLeo looks for neighbours among as many images as a GPU of the release held: 64, and 32.
"""

from dataclasses import replace

from troodon.learn.config import ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import BASE, GIANT, LARGE, SMALL, HeadConfig, ViTConfig
from troodon.recipes.lengths import for_steps
from troodon.views.config import CropsConfig


def vitl16_short(steps: int = 125_000) -> PretrainConfig:
    """ViT-L/16 on ImageNet-1k in 125,000 steps of 2048 images.

    Command: troodon pretrain vitl16_short --data imagenet/train --out RUN --slurm.nodes 4
    Machines and time stated by the release: 32 A100, about a day. Its k-NN 81.6 %, linear 82.9 %.
    """
    head = HeadConfig(prototypes=65_536, bottleneck=256)
    config = PretrainConfig(
        vit=_network(LARGE, patch=16, drop_path=0.3),
        dino_head=head,
        ibot_head=head,
        objective=ObjectiveConfig(targets="centring", heads="shared", koleo_group=64),
        optim=OptimConfig(layer_decay=0.9),
        schedules=_schedules(lr=5.657e-3, warmup=12_500, decay=0.4, momentum=0.992),
        crops=CropsConfig(local_px=96),
        steps=125_000,
        batch=2048,
    )
    return for_steps(config, steps)


def vitl14(steps: int = 625_000) -> PretrainConfig:
    """ViT-L/14 on ImageNet-22k in 625,000 steps of 3072 images.

    Command: troodon pretrain vitl14 --data imagenet22k --out RUN --slurm.nodes 12
    Machines stated by the release: 96 A100. Its k-NN 82.0 %, linear 84.5 %.
    """
    config = PretrainConfig(
        vit=_network(replace(LARGE, mlp="swiglu"), patch=14, drop_path=0.4),
        objective=ObjectiveConfig(koleo_group=32),
        schedules=_schedules(lr=3.464e-4, warmup=100_000, decay=0.2, momentum=0.994),
        steps=625_000,
        batch=3072,
    )
    return for_steps(config, steps)


def vitg14(steps: int = 625_000) -> PretrainConfig:
    """ViT-g/14 (1.1 billion parameters) in 625,000 steps of 3072 images; in the paper on LVD-142M.

    Command: troodon pretrain vitg14 --data SELECTION --out RUN --slurm.nodes 12
    Stated by the release, on LVD-142M: k-NN 83.5 %, linear 86.5 %.
    """
    return replace(vitl14(steps), vit=_network(GIANT, patch=14, drop_path=0.4))


def vits14(steps: int = 125_000) -> PretrainConfig:
    """ViT-S/14 (22 million parameters) on ImageNet-1k by the short schedule; the release distils its own from ViT-g.

    Command: troodon pretrain vits14 --data imagenet/train --out RUN, on 8 GPUs or more. Not yet run.
    """
    return _short(SMALL, steps, drop_path=0.1)


def vitb14(steps: int = 125_000) -> PretrainConfig:
    """ViT-B/14 (86 million parameters) on ImageNet-1k by the short schedule; the release distils its own from ViT-g.

    Command: troodon pretrain vitb14 --data imagenet/train --out RUN, on 16 GPUs or more. Not yet run.
    """
    return _short(BASE, steps, drop_path=0.2)


def vits14_reg(steps: int = 125_000) -> PretrainConfig:
    """vits14 with 4 registers."""
    return _with_registers(vits14(steps))


def vitb14_reg(steps: int = 125_000) -> PretrainConfig:
    """vitb14 with 4 registers."""
    return _with_registers(vitb14(steps))


def vitl14_reg(steps: int = 625_000) -> PretrainConfig:
    """vitl14 with 4 registers (https://arxiv.org/abs/2309.16588), and positions resized exactly, as released so."""
    return _with_registers(vitl14(steps))


def vitg14_reg(steps: int = 625_000) -> PretrainConfig:
    """vitg14 with 4 registers."""
    return _with_registers(vitg14(steps))


def _short(size: ViTConfig, steps: int, *, drop_path: float) -> PretrainConfig:
    return replace(vitl16_short(steps), vit=_network(size, patch=14, drop_path=drop_path), crops=CropsConfig())


def _with_registers(config: PretrainConfig) -> PretrainConfig:
    return replace(config, vit=replace(config.vit, registers=4, position_offset=0.0, position_antialias=True))


def _network(size: ViTConfig, *, patch: int, drop_path: float) -> ViTConfig:
    """Positions learned at the global crop's grid, and resized for local crops as the release did."""
    return replace(
        size, patch=patch, grid=224 // patch, drop_path=drop_path, position_offset=0.1, position_antialias=False
    )


def _schedules(*, lr: float, warmup: int, decay: float, momentum: float) -> Schedules:
    return Schedules(
        lr=Schedule(peak=lr, end=1e-6, warmup=warmup),
        weight_decay=Schedule(peak=0.04, end=decay),
        ema_momentum=Schedule(peak=momentum, end=1.0),
        teacher_temperature=Schedule(start=0.04, peak=0.07, end=0.07, warmup=37_500),
        last_layer_frozen=1_250,
    )
