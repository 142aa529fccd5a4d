"""DINOv2, and distillation into a smaller model: one objective, two choices of teacher.

The student looks at masked global crops and at small local crops, and must say of them what the
teacher says of the whole global crops. In pretraining the teacher is the moving average of the
student (https://arxiv.org/abs/2304.07193, section 4); in distillation it is a larger, frozen model
and the student sees no mask (section 5). Everything else is the same, so it is written once.
"""

from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from troodon.data.batch import Batch
from troodon.learn import losses
from troodon.learn.config import ObjectiveConfig
from troodon.learn.losses import ALONE, Ranks
from troodon.learn.schedules import Knobs
from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.head import Head
from troodon.model.vit import ViT

# Shape suffixes: G global and V local views, B images, K prototypes, D channels, P patches,
#                 N = G * B global crops or all crops, M masked patches of the whole batch.


class Branch(nn.Module):
    """A backbone with its heads: one for class tokens, one for patches, or one for both."""

    def __init__(self, vit: ViTConfig, dino_head: HeadConfig | None, ibot_head: HeadConfig | None):
        super().__init__()
        self.backbone = ViT(vit)
        if dino_head is not None:
            self.dino_head = Head(vit.dim, dino_head)
        if ibot_head is not None:
            self.ibot_head = Head(vit.dim, ibot_head)

    @property
    def patch_head(self) -> Head:
        return self.ibot_head if "ibot_head" in self._modules else self.dino_head

    def initialize(self) -> None:
        for part in self.children():
            part.initialize()


class Targets(NamedTuple):
    """What the networks that do not learn say of a batch; None where no loss asks."""

    cls_GBK: Tensor | None
    patches_MK: Tensor | None
    anchor_NPD: Tensor | None


class Method:
    """What the loop trains: `student` learns, `average` follows it and is what is kept."""

    def __init__(
        self,
        config: ObjectiveConfig,
        student: Branch,
        average: Branch,
        *,
        teacher: Branch | None = None,
        anchor: ViT | None = None,
        ranks: Ranks = ALONE,
        compute: torch.dtype = torch.float32,
    ):
        self.config, self.ranks, self.compute = config, ranks, compute
        self.student, self.average = student.train(), average.requires_grad_(False).eval()
        self.teacher = average if teacher is None else teacher.requires_grad_(False).eval()
        self.anchor = None if anchor is None else anchor.requires_grad_(False).eval()
        self.student_sees_masks = teacher is None
        device = next(student.parameters()).device
        heads = {"dino": self.teacher.dino_head} if config.dino_weight else {}
        heads |= {"ibot": self.teacher.patch_head} if config.ibot_weight else {}
        self.centres = {  # (K,) each; what centring has learnt, saved with every checkpoint
            name: torch.zeros(len(head.last_layer.weight_g), device=device)
            for name, head in heads.items()
            if config.targets == "centring"
        }
        self._next_centres: dict[str, Tensor] = {}

    def losses(self, batch: Batch, targets: Targets, knobs: Knobs) -> dict[str, Tensor]:
        """Weighted terms; their sum is what is minimised. Networks run in `compute`, losses in fp32."""
        c, (views, images), locals_ = self.config, batch.globals_GBCHW.shape[:2], len(batch.locals_VBCHW)
        crops = [batch.globals_GBCHW.flatten(0, 1)] + [batch.locals_VBCHW.flatten(0, 1)] * (locals_ > 0)
        masks = [batch.masks_NP if self.student_sees_masks else None, None]
        t, terms = c.student_temperature, {}
        with self.autocast():
            wide, *narrow = self.student.backbone(crops, masks[: len(crops)])

        if targets.cls_GBK is not None:
            with self.autocast():
                logits_NK = self.student.dino_head(torch.cat([wide.cls_BD, *(x.cls_BD for x in narrow)]))
            global_GBK, local_VBK = logits_NK.unflatten(0, (-1, images)).split([views, locals_])
            # Every (student view, teacher view) pair of an image weighs the same.
            global_pairs, local_pairs = views * (views - 1), views * locals_
            share = global_pairs / (global_pairs + local_pairs)
            dino_global = losses.dino(global_GBK, targets.cls_GBK, t, same_views=True)
            terms["dino_global"] = c.dino_weight * share * dino_global
            if locals_:
                dino_local = losses.dino(local_VBK, targets.cls_GBK, t, same_views=False)
                terms["dino_local"] = c.dino_weight * (1 - share) * dino_local
        if targets.patches_MK is not None:
            masked_M, weight_M = batch.masked()
            with self.autocast():
                student_MK = self.student.patch_head(wide.patches_BPD.flatten(0, 1)[masked_M])
            ibot = losses.ibot(student_MK, targets.patches_MK, weight_M, views * images, t)
            terms["ibot"] = c.ibot_weight * ibot
        if c.koleo_weight:
            terms["koleo"] = c.koleo_weight * self._spread(wide.cls_BD.unflatten(0, (views, images)))
        if targets.anchor_NPD is not None:
            terms["gram"] = c.gram_weight * losses.gram(wide.patches_BPD, targets.anchor_NPD)
        return terms

    def _spread(self, cls_GBD: Tensor) -> Tensor:
        """KoLeo of each view, within groups of images that are neighbours in the step, whatever ranks hold them."""
        group = self.config.koleo_group
        if not group or cls_GBD.shape[1] % group:
            cls_GBD = self.ranks.gather(cls_GBD.transpose(0, 1)).transpose(0, 1)
        groups = cls_GBD.unflatten(1, (-1, group or cls_GBD.shape[1])).transpose(0, 1)
        return torch.stack([losses.koleo(x_BD) for views in groups for x_BD in views]).sum() / len(groups)

    @torch.no_grad()
    def targets(self, parts: list[Batch], knobs: Knobs) -> list[Targets]:
        """What the teacher, which sees no mask, says of the global crops of the parts of one step.

        Of all parts together: Sinkhorn and centring look at every image of the step, however it is cut.
        """
        c = self.config
        if knobs.anchor and self.anchor is not None:
            for kept, learned in zip(self.anchor.parameters(), self.average.backbone.parameters(), strict=True):
                kept.copy_(learned)
        cls, patches, anchored = [], [], []
        for part in parts:
            crops_NCHW = part.globals_GBCHW.flatten(0, 1)
            with self.autocast():
                (seen,) = self.teacher.backbone([crops_NCHW])
                if c.dino_weight:
                    cls.append(self.teacher.dino_head(seen.cls_BD))
                if c.ibot_weight:
                    patches.append(self.teacher.patch_head(seen.patches_BPD.flatten(0, 1)[part.masked()[0]]))
                if knobs.anchored and self.anchor is not None:
                    anchored.append(self.anchor([crops_NCHW])[0].patches_BPD)
        shape = parts[0].globals_GBCHW.shape[:2]
        cls = [x.unflatten(0, shape) for x in self._targets("dino", cls, knobs.teacher_temperature)]
        patches = self._targets("ibot", patches, knobs.teacher_temperature)
        return [Targets(*of_part) for of_part in zip_longest(cls, patches, anchored)]

    def _targets(self, name: str, logits: list[Tensor], temperature: float) -> list[Tensor]:
        """Targets from the teacher's logits (M, K) of each part."""
        if not logits:
            return []
        logits_MK, rows = torch.cat(logits).float(), [len(x) for x in logits]
        if self.config.targets == "sinkhorn":
            return [*losses.sinkhorn(logits_MK, temperature, self.ranks).split(rows)]
        # The mean over all rows of the step moves the centre, once the step is known to be good. (The release takes the
        # mean over ranks of theirs: the same, but for masked patches, of which ranks hold different numbers.)
        count = torch.tensor(float(len(logits_MK)), device=logits_MK.device)
        mean_K = self.ranks.total(logits_MK.sum(0)) / self.ranks.total(count).clamp(min=1.0)
        self._next_centres[name] = self.centres[name].lerp(mean_K, 1.0 - self.config.centre_momentum)
        return [*losses.centred(logits_MK, temperature, self.centres[name]).split(rows)]

    def autocast(self) -> torch.autocast:
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)

    @torch.no_grad()
    def after_step(self, knobs: Knobs) -> None:
        """Move the average towards the student, and the centres; under FSDP each rank moves its own shards."""
        kept, learned = list(self.average.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(kept, learned, 1.0 - knobs.momentum)
        self.centres |= self._next_centres
