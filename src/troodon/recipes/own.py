"""Recipes for one's own images and small machines.

`small` and `demo` learn by contrast of many small views of each image, which was best on thousands of images and
minutes of a processor; docs/small-data.md has the evidence, and what was tried beside it. `small_dino` and `demo_dino`
have the objective of the paper. Where these differ most from it; docs/log.md has the runs, of one seed each:

    teacher temperature   0.005, where the paper has 0.04 to 0.07. Few prototypes and little data make soft targets
                          nearly uniform, and the head collapses to a constant: a flat loss, and features of chance.
                          Sinkhorn-Knopp in the log domain bears targets that sharp.
    koleo                 weight 0.03, where the paper has 0.1. None is worse still.
    layer_scale           1, where the paper has 1e-5: a shallow network needs no gentle start. Not varied by itself.
"""

from dataclasses import replace

from troodon.learn.config import ObjectiveConfig, OptimConfig, PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import HeadConfig, ViTConfig
from troodon.recipes.lengths import for_steps
from troodon.views.config import ALL_ATTACK_KINDS, CropsConfig, MasksConfig, PhotometricConfig

# Colours that say what is shown are changed little, and so are shades, where images are of one kind
# (docs/small-data.md).
WEAK_COLOURS = PhotometricConfig(
    blur=(0.5, 0.1, 0.25), blur_sigma=(0.1, 1.0), saturation=0.1, hue=0.02, grey=0.05, solarise=0.0
)
SAME_SHADES = replace(WEAK_COLOURS, brightness=0.15, contrast=0.15)
STRONG_COLOURS = replace(WEAK_COLOURS, saturation=0.6, hue=0.5, grey=0.5)
SMALL_CROPS = ((16, 0.4), (24, 0.4), (32, 0.2))  # sides, in pixels, each with its share of the run


def demo(steps: int = 1000) -> PretrainConfig:
    """A ViT of 0.3 M parameters on the embedded world, in two minutes on two processor cores.

    Command: troodon demo, which takes six minutes with all that is around it. Colour says nothing in that world, so it
    is varied as far as it goes. Mean and range of three seeds, each another world: k-NN 74 % (72 to 75), linear 78 %
    (77 to 79); chance 8 %, raw pixels 29 % and 20 % at best. On a Xeon without bf16 products.
    """
    vit = ViTConfig(
        dim=96, depth=2, heads=2, patch=8, grid=4, layer_scale=1.0, mlp_width=192, stem="convolutional", stem_width=128
    )
    config = contrast_of_views(vit, SMALL_CROPS, photometric=STRONG_COLOURS, inference_px=64, views=4)
    return for_steps(config, steps)


def small(steps: int = 4000) -> PretrainConfig:
    """A ViT of 1 M parameters for thousands of images of any size.

    Command: troodon pretrain small --data photos/ --out RUN; 20 minutes of one core. `troodon pretrain auto` chooses
    among such recipes, by the images and the time there is. With --minutes 5, by one Xeon core without bf16 products,
    on Tiny-50, three seeds: k-NN 31.0 % (30.7 to 31.4), linear 38.4 % (38.2 to 38.7); `small_dino` 16.7 % and 20.9 %.
    """
    vit = ViTConfig(
        dim=192, depth=2, heads=3, patch=8, grid=4, layer_scale=1.0, mlp_width=384, stem="convolutional", stem_width=256
    )
    return for_steps(contrast_of_views(vit, SMALL_CROPS, inference_px=64), steps)


def demo_dino(steps: int = 800) -> PretrainConfig:
    """A ViT of 0.4 M parameters on the embedded world, by DINO + iBOT, in four minutes on two processor cores."""
    config = PretrainConfig(
        vit=ViTConfig(dim=96, depth=3, heads=2, patch=8, grid=4, layer_scale=1.0),
        crops=CropsConfig(global_px=32, global_scale=(0.25, 1.0), local_px=16, locals=2),
        photometric=PhotometricConfig(blur=(0.5, 0.1, 0.25), blur_sigma=(0.1, 1.0), saturation=0.6, hue=0.5, grey=0.5),
        **_on_small_data(800),
    )
    return for_steps(config, steps)


def small_dino(steps: int = 3000) -> PretrainConfig:
    """A ViT of 0.8 M parameters, by DINO + iBOT; half its steps took one core 20 minutes. Earlier versions call it
    `small`."""
    config = PretrainConfig(
        vit=ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=6, layer_scale=1.0),
        crops=CropsConfig(global_px=48, global_scale=(0.25, 1.0), local_px=24, locals=2),
        photometric=PhotometricConfig(blur=(0.5, 0.1, 0.25), blur_sigma=(0.1, 1.0)),
        **_on_small_data(3000),
    )
    return for_steps(config, steps)


def copies_small(steps: int = 1000) -> PretrainConfig:
    """A copy descriptor of 0.8 M parameters for some ten thousand images, in 6 minutes on two processor cores.

    Command: troodon pretrain copies_small --data photos/ --out COPIES, and then troodon curate ... --copies COPIES.
    Each image is seen twice, attacked as pictures are on the web, cropped and recoloured, at 32 pixels: contrast, with
    KoLeo to keep different images apart (https://arxiv.org/abs/2202.10261). It learns nothing of what images mean.
    All 29 kinds of attacks are drawn. With the first 24 alone (--crops.attack-kinds without a value, as in earlier
    versions), after these steps on 11,500 images: average precision 0.953 on attacked photographs, where a DINO
    backbone of as many minutes has 0.754; with pixels beside them, as curation has it, 0.991 and 0.985, and pixels
    alone 0.978 (docs/log.md). After 2,600 steps 0.983, and 0.995 with pixels. With all 29, on the same copies, 0.947
    and 0.991, one seed: as good within noise (after 230 steps 0.882, 24 kinds 0.870); on the five others 0.448.
    Where mirrored pictures are no copies to you: --crops.flip 0, --crops.attack-kinds without flip, vertical_flip and
    mix, and then --no-pixels when curating.
    """
    config = PretrainConfig(
        vit=ViTConfig(dim=128, depth=4, heads=2, patch=8, grid=4, layer_scale=1.0),
        crops=CropsConfig(global_px=32, global_scale=(0.5, 1.0), locals=0, attack=0.8, attack_kinds=ALL_ATTACK_KINDS),
        photometric=PhotometricConfig(jitter=0.5, grey=0.2, blur=(0.2, 0.2, 0.0), blur_sigma=(0.1, 1.5), solarise=0.0),
        masks=MasksConfig(share=0.0),
        objective=ObjectiveConfig(terms=(("koleo", 1.0), ("contrast", 1.0))),
        optim=OptimConfig(patch_embed=1.0),
        schedules=Schedules(
            lr=Schedule(peak=2e-3, end=1e-6, warmup=100),
            weight_decay=Schedule(peak=0.04, end=0.04),
            ema_momentum=Schedule(peak=0.9, end=0.99),
        ),
        steps=1000,
        batch=128,
        probe_every=0,
        checkpoint_every=200,
    )
    return for_steps(config, steps)


def contrast_of_views(
    vit: ViTConfig,
    crops: tuple[tuple[int, float], ...],
    *,
    batch: int = 64,
    photometric: PhotometricConfig = WEAK_COLOURS,
    inference_px: int = 0,
    views: int = 6,
) -> PretrainConfig:
    """Contrast of many views of each image, small ones first, with KoLeo.

    `crops` are the sides of crops, in pixels, each with its share of the run.
    """
    return PretrainConfig(
        vit=vit,
        crops=CropsConfig(
            global_px=crops[-1][0], global_scale=(0.25, 1.0), local_px=vit.patch, locals=0, globals=views,
            mixed=tuple((px, vit.patch, share) for px, share in crops), mixed_by="progress",
        ),
        photometric=photometric,
        masks=MasksConfig(share=0.0),
        objective=ObjectiveConfig(
            terms=(("koleo", 0.1), ("contrast", 1.0)), contrast_temperature=0.2, projector=(512, 512, 128)
        ),
        optim=OptimConfig(patch_embed=1.0, clip_over="whole"),
        schedules=Schedules(
            lr=Schedule(peak=1.5e-3, end=1.5e-6, warmup=400),
            weight_decay=Schedule(peak=0.05, end=0.05),
            ema_momentum=Schedule(peak=0.9, end=0.99),
            last_layer_frozen=0,
        ),
        steps=4000,
        batch=batch,
        probe_every=200,
        checkpoint_every=200,
        inference_px=inference_px,
    )  # fmt: skip


def _on_small_data(steps: int) -> dict:
    head = HeadConfig(prototypes=1024, hidden=256, bottleneck=64)
    return {
        "dino_head": head,
        "ibot_head": head,
        "objective": ObjectiveConfig(terms=(("dino", 1.0), ("ibot", 0.3), ("koleo", 0.03))),
        "schedules": Schedules(
            lr=Schedule(peak=1e-3, end=1e-6, warmup=steps // 10),
            weight_decay=Schedule(peak=0.04, end=0.1),
            ema_momentum=Schedule(peak=0.9, end=1.0),
            teacher_temperature=Schedule(peak=0.005, end=0.005, shape="constant"),
            last_layer_frozen=0,
        ),
        "steps": steps,
        "batch": 64,
        "probe_every": 200,
        "checkpoint_every": 200,
    }
