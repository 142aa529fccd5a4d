"""The terms of the objective (section 4 of https://arxiv.org/abs/2304.07193), one function each.

A term gets what the student and the targets say of a batch, and returns what is to be minimised, () in fp32, under the
names it is recorded by. Its weight and what it needs stand in objective.py. A new term is a function here, its name in
TERMS there, and a test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from troodon.learn import losses, prototypes
from troodon.learn.losses import Ranks
from troodon.learn.objective import ObjectiveConfig
from troodon.model.head import HeadOutput

# Shape suffixes: G global and V student views (global and local), B images, D channels, P patches,
#                 N = G * B global crops, M patches that are compared, of the whole batch.


@dataclass(frozen=True)
class PatchSelection:
    """Which patches of the global crops are compared by prototypes, and the weights of their cross-entropies."""

    index_M: Tensor | None  # in (N * P); None for all
    masked_M: Tensor  # one over the masked patches of the crop, 0 for a visible one
    visible_M: Tensor  # one over the visible patches of the crop, 0 for a masked one

    def select(self, patches_NPD: Tensor) -> Tensor:
        """(M, D): the patches that are compared."""
        rows_MD = patches_NPD.flatten(0, 1)
        return rows_MD if self.index_M is None else rows_MD.index_select(0, self.index_M)


@dataclass(frozen=True)
class StudentOutput:
    """What the student says of a batch: features of global crops, and outputs of its heads if a term needs them."""

    cls_GBD: Tensor
    patches_NPD: Tensor
    heads: dict[str, HeadOutput]  # "cls": V * B class tokens, view after view; "patches": M patches
    mapped: dict[str, list[Tensor]]  # for each frozen teacher: "cls" (N, D), "patches" (N, P, D)
    projected_GBD: Tensor | None = None  # class tokens of all ranks, through the projector if there is one


@dataclass(frozen=True)
class Targets:
    """What the networks that do not learn say of a batch; None where no term needs it."""

    cls: prototypes.PrototypeTargets | None  # of G * B class tokens, view after view
    patches: prototypes.PrototypeTargets | None  # of M patches
    anchor_NPD: Tensor | None
    features: dict[str, list[Tensor]] | None  # of each frozen teacher: "cls" (N, D), "patches" (N, P, D)


@dataclass(frozen=True)
class Comparison:
    """What a term looks at. What several terms share is computed once."""

    student: StudentOutput
    targets: Targets
    patches: PatchSelection | None
    config: ObjectiveConfig
    ranks: Ranks

    @property
    def images(self) -> int:
        return self.student.cls_GBD.shape[1]

    @property
    def crops(self) -> int:
        """Global crops."""
        return self.student.cls_GBD.shape[:2].numel()

    @cached_property
    def cls_VGB(self) -> Tensor:
        """Cross-entropies of the class token of every student view with every teacher view of its image."""
        assert self.targets.cls is not None, "a term that compares class tokens needs their targets"
        return self.cross_entropies("cls", self.images, self.targets.cls)

    @cached_property
    def patches_M(self) -> Tensor:
        """Cross-entropies of the patches that are compared."""
        assert self.targets.patches is not None, "a term that compares patches needs their targets"
        return self.cross_entropies("patches", len(self.student.heads["patches"][0]), self.targets.patches)[0, 0]

    def cross_entropies(self, kind: str, count: int, targets: prototypes.PrototypeTargets) -> Tensor:
        bottleneck_MD, prototypes_KD = self.student.heads[kind]
        rows_VBD = bottleneck_MD.view(-1, count, bottleneck_MD.shape[-1]) if count else bottleneck_MD[None]
        return prototypes.cross_entropies(rows_VBD, prototypes_KD, targets, self.config.student_temperature)

    def gathered_cls(self) -> Tensor:
        """(G, B, D) with the images of all ranks."""
        return gathered(self.student.cls_GBD, self.ranks)


def gathered(cls_GBD: Tensor, ranks: Ranks) -> Tensor:
    """(G, B, D) with the images of all ranks."""
    return ranks.gather(cls_GBD.transpose(0, 1)).transpose(0, 1)


Term = Callable[[Comparison], dict[str, Tensor]]


def dino(c: Comparison) -> dict[str, Tensor]:
    """Image-level: class tokens of all views agree with the teacher's of the global views. Each (student view, teacher
    view) pair of an image has the same weight, and a view does not predict itself."""
    pairs_VGB, views = c.cls_VGB, c.student.cls_GBD.shape[0]
    local_views = len(pairs_VGB) - views
    global_pairs, local_pairs = views * (views - 1), views * local_views
    share = global_pairs / (global_pairs + local_pairs)
    terms = {"dino_global": share * losses.dino(pairs_VGB[:views], same_views=True)}
    if local_views:
        terms["dino_local"] = (1 - share) * losses.dino(pairs_VGB[views:], same_views=False)
    return terms


def ibot(c: Comparison) -> dict[str, Tensor]:
    """Patch-level: masked patches agree with the teacher's, which sees them. A student without masks, in distillation,
    is compared on all patches (section 5)."""
    assert c.patches is not None
    return {"ibot": losses.ibot(c.patches_M, c.patches.masked_M, c.crops)}


def ibot_visible(c: Comparison) -> dict[str, Tensor]:
    """The same of visible patches; with `ibot`, iBOT++ (https://arxiv.org/abs/2604.12012)."""
    assert c.patches is not None
    return {"ibot_visible": losses.ibot(c.patches_M, c.patches.visible_M, c.crops)}


def koleo(c: Comparison) -> dict[str, Tensor]:
    """Class tokens of each view spread evenly, away from their nearest neighbours."""
    return {"koleo": _spread(c, losses.koleo)}


def kde(c: Comparison) -> dict[str, Tensor]:
    """The same, away from where images are dense (https://arxiv.org/abs/2408.00738)."""
    return {"kde": _spread(c, losses.kde)}


def _spread(c: Comparison, of_view: Callable[[Tensor], Tensor]) -> Tensor:
    """Within groups of images that are neighbours in the step, whatever ranks hold them."""
    group, cls_GBD = c.config.koleo_group, c.student.cls_GBD
    if not group or cls_GBD.shape[1] % group:
        cls_GBD = c.gathered_cls()
    groups = cls_GBD.unflatten(1, (-1, group or cls_GBD.shape[1])).transpose(0, 1)
    return torch.stack([of_view(x_BD) for views in groups for x_BD in views]).sum() / len(groups)


def contrast(c: Comparison) -> dict[str, Tensor]:
    """Each global view finds the others of its image among those of the step (https://arxiv.org/abs/2202.10261)."""
    views_GBD = c.gathered_cls() if c.student.projected_GBD is None else c.student.projected_GBD
    return {"contrast": losses.contrast(views_GBD, c.config.contrast_temperature)}


def gram(c: Comparison) -> dict[str, Tensor]:
    """Gram anchoring: patches keep the similarities they had in an earlier EMA; 0 until the anchor is taken."""
    anchor_NPD = c.targets.anchor_NPD
    if anchor_NPD is None:
        return {"gram": c.student.cls_GBD.new_zeros((), dtype=torch.float32)}
    return {"gram": losses.gram(c.student.patches_NPD, anchor_NPD)}


def cls_features(c: Comparison) -> dict[str, Tensor]:
    """Distillation without heads: a linear map of the class token points where each frozen teacher's does."""
    return {"cls": _feature_loss(c, "cls", losses.cosine_distance)}


def patch_features(c: Comparison) -> dict[str, Tensor]:
    """Distillation without heads: linear maps of patches match each frozen teacher's."""
    distance = {"smooth_l1": losses.smooth_l1, "cosine": losses.cosine_distance}[c.config.patch_loss]
    return {"patches": _feature_loss(c, "patches", distance)}


def _feature_loss(c: Comparison, kind: str, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    assert c.targets.features is not None
    pairs = zip(c.student.mapped[kind], c.targets.features[kind], strict=True)
    return torch.stack([distance(*pair) for pair in pairs]).mean()


FUNCTIONS: dict[str, Term] = {
    f.__name__: f for f in (dino, ibot, ibot_visible, koleo, kde, contrast, gram, cls_features, patch_features)
}
