"""Recipes for one's own images and small machines."""

from troodon.curate.config import CurateConfig
from troodon.data.config import CropsConfig, PhotometricConfig
from troodon.data.world import WorldConfig
from troodon.learn.config import ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import HeadConfig, ViTConfig

EMBEDDED_WORLD = WorldConfig(texture_fidelity=0.95, habitat_fidelity=0.9, scale=(0.5, 0.9))


def demo() -> PretrainConfig:
    """A ViT of 1.8 M parameters on the embedded world, in minutes on two processor cores."""
    return tiny(steps=300, batch=64)


def small() -> PretrainConfig:
    """A ViT of 2.7 M parameters for some thousand images of about 64 pixels, in an hour on two processor cores."""
    return tiny(steps=2000, batch=64)


def tiny(*, steps: int, batch: int) -> PretrainConfig:
    head = HeadConfig(prototypes=1024, hidden=512, bottleneck=64)
    return PretrainConfig(
        vit=ViTConfig(dim=192, depth=6, heads=3, patch=8, grid=6, layer_scale=0.1),
        dino_head=head,
        ibot_head=head,
        objective=ObjectiveConfig(),
        optim=OptimConfig(),
        schedules=Schedules(
            lr=Schedule(peak=1e-3, end=1e-6, warmup=steps // 10),
            weight_decay=Schedule(peak=0.04, end=0.1),
            momentum=Schedule(peak=0.99, end=1.0),
            teacher_temperature=Schedule(start=0.04, peak=0.06, end=0.06, warmup=steps // 5),
            last_layer_frozen=steps // 50,
        ),
        crops=CropsConfig(global_px=48, local_px=24, locals=4),
        photometric=PhotometricConfig(blur=(0.5, 0.1, 0.25), blur_sigma=(0.1, 1.0)),
        steps=steps,
        batch=batch,
        probe_every=100,
        checkpoint_every=200,
    )


def curate_demo() -> CurateConfig:
    """Curation of the embedded world with a small backbone trained on its own pool."""
    return CurateConfig(tokens="cls+mean")


def curate_small() -> CurateConfig:
    """For ten thousand to a million images: exact search, the threshold calibrated on the images themselves."""
    return CurateConfig()
