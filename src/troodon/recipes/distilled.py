"""Recipes of students: what they are, and how they learn from a teacher that no longer does (section 5 of
https://arxiv.org/abs/2304.07193). They see no masks and have no stochastic depth.

The student's heads are new, and end in as many prototypes as the teacher's; another number is an error that names the
right one.
"""

from dataclasses import replace

from troodon.learn.config import ObjectiveConfig, PretrainConfig
from troodon.learn.schedules import Schedule
from troodon.model.config import BASE, LARGE, SMALL, ViTConfig
from troodon.recipes import own, released
from troodon.recipes.lengths import for_steps
from troodon.views.config import MasksConfig


def distill_vits14(steps: int = 625_000) -> PretrainConfig:
    """ViT-S/14 from a run of vitg14 or vitl14, in 625,000 steps of 2048 images.

    Command: troodon distill distill_vits14 --teacher RUN --data SELECTION --out STUDENT. The paper's numbers where it
    states them: the rate, steps, images; the rest is vitl14's. Not yet run at full size.
    """
    return _paper(SMALL, steps)


def distill_vitb14(steps: int = 625_000) -> PretrainConfig:
    """ViT-B/14, as distill_vits14."""
    return _paper(BASE, steps)


def distill_vitl14(steps: int = 625_000) -> PretrainConfig:
    """ViT-L/14, as distill_vits14, from a run of vitg14."""
    return _paper(replace(LARGE, mlp="gelu"), steps)


def distill_features(steps: int = 100_000) -> PretrainConfig:
    """ViT-S/14 by a teacher's features as they are: for weights without heads, and for several teachers at once.

    Command: troodon distill distill_features --teacher dinov2_vitl14_pretrain.pth --data photos/ --out STUDENT.
    Class tokens by their cosine, patches by smooth L1, both after a linear map. Not yet run at full size.
    """
    start = distill_vits14(steps)
    features = ObjectiveConfig(terms=(("cls_features", 1.0), ("patch_features", 1.0)))
    return replace(
        start,
        objective=features,
        crops=replace(start.crops, locals=0),
        schedules=replace(start.schedules, last_layer_frozen=0),
        batch=512,
    )


def distill_small(steps: int = 2000) -> PretrainConfig:
    """A student of 0.3 M parameters, by the features of a teacher that `small` or `auto` has trained."""
    return for_steps(_by_features(own.small()), steps)


def distill_demo(steps: int = 1000) -> PretrainConfig:
    """A student of 0.07 M parameters for the network of the demo, by its features, in two minutes on two cores.

    Command: troodon demo. Mean and range of three seeds: k-NN 71 % (69 to 74), linear 76 % (75 to 76), where its
    teacher has 74 % and 78 %.
    """
    return for_steps(_by_features(own.demo()), steps)


def distill_small_dino(steps: int = 3000) -> PretrainConfig:
    """A student of 0.2 M parameters, by the heads of a teacher that `small_dino` has trained."""
    return _half(own.small_dino(steps))


def distill_demo_dino(steps: int = 800) -> PretrainConfig:
    """A student of 0.1 M parameters, by the heads of a teacher that `demo_dino` has trained."""
    return _half(own.demo_dino(steps))


def _by_features(teacher: PretrainConfig) -> PretrainConfig:
    """Such a student sees two crops of an image, of the side of the teacher's last ones: every step costs a teacher."""
    crops = replace(teacher.crops, globals=2, mixed=(), mixed_by="chance")
    features = ObjectiveConfig(terms=(("cls_features", 1.0), ("patch_features", 1.0)))
    return replace(_half(teacher), crops=crops, objective=features)


def _half(teacher: PretrainConfig) -> PretrainConfig:
    """A quarter of the teacher's parameters: half of its channels."""
    v = teacher.vit
    stem, mlp = (width and width // 2 for width in (v.stem_width, v.mlp_width))
    vit = replace(v, dim=v.dim // 2, stem_width=stem, mlp_width=mlp, drop_path=0.0)
    return replace(teacher, vit=vit, masks=MasksConfig(share=0.0))


def _paper(size: ViTConfig, steps: int) -> PretrainConfig:
    start = released.vitl14(steps)
    vit = replace(start.vit, dim=size.dim, depth=size.depth, heads=size.heads, mlp=size.mlp, drop_path=0.0)
    rate = Schedule(peak=1e-3, end=1e-6, warmup=start.schedules.lr.warmup)
    return replace(
        start, vit=vit, masks=MasksConfig(share=0.0), schedules=replace(start.schedules, lr=rate), batch=2048
    )
