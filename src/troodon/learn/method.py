"""DINOv2, and distillation into a smaller model: one objective, two choices of teacher.

The student looks at masked global crops and at small local crops, and must say of them what the
teacher says of the whole global crops. In pretraining the teacher is the moving average of the
student (https://arxiv.org/abs/2304.07193, section 4); in distillation it is a larger, frozen model
and the student sees no mask (section 5). Everything else is the same, so it is written once.
"""

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
    """A backbone with its heads: one for class tokens, and one for patches unless they share."""

    def __init__(self, vit: ViTConfig, dino_head: HeadConfig, ibot_head: HeadConfig | None):
        super().__init__()
        self.backbone = ViT(vit)
        self.dino_head = Head(vit.dim, dino_head)
        if ibot_head is not None:
            self.ibot_head = Head(vit.dim, ibot_head)

    @property
    def patch_head(self) -> Head:
        return self.ibot_head if "ibot_head" in self._modules else self.dino_head

    def initialize(self) -> None:
        for part in self.children():
            part.initialize()


class Method:
    """What the loop trains: `student` learns, `average` follows it and is what is kept."""

    def __init__(
        self,
        config: ObjectiveConfig,
        student: Branch,
        average: Branch,
        *,
        teacher: Branch | None = None,
        ranks: Ranks = ALONE,
        compute: torch.dtype = torch.float32,
    ):
        self.config, self.ranks, self.compute = config, ranks, compute
        self.student, self.average = student.train(), average.requires_grad_(False).eval()
        self.teacher = average if teacher is None else teacher.requires_grad_(False).eval()
        self.student_sees_masks = teacher is None
        device = next(student.parameters()).device
        heads = {"dino": self.teacher.dino_head, "ibot": self.teacher.patch_head}
        self.centres = {  # (K,) each; what centring has learnt, saved with every checkpoint
            name: torch.zeros(len(head.last_layer.weight_g), device=device)
            for name, head in heads.items()
            if config.targets == "centring"
        }
        self._next_centres: dict[str, Tensor] = {}

    def losses(self, batch: Batch, knobs: Knobs) -> dict[str, Tensor]:
        """Weighted terms; their sum is what is minimised. Networks run in `compute`, losses in fp32."""
        c, (views, images), locals_ = self.config, batch.globals_GBCHW.shape[:2], len(batch.locals_VBCHW)
        masked_M, weight_M = batch.masked()
        target_GBK, target_MK = self.targets(batch, masked_M, knobs.teacher_temperature)

        crops = [batch.globals_GBCHW.flatten(0, 1)] + [batch.locals_VBCHW.flatten(0, 1)] * (locals_ > 0)
        masks = [batch.masks_NP if self.student_sees_masks else None, None]
        with self.autocast():
            wide, *narrow = self.student.backbone(crops, masks[: len(crops)])
            logits_NK = self.student.dino_head(torch.cat([wide.cls_BD, *(x.cls_BD for x in narrow)]))
            student_MK = self.student.patch_head(wide.patches_BPD.flatten(0, 1)[masked_M])
        global_GBK, local_VBK = logits_NK.unflatten(0, (-1, images)).split([views, locals_])

        # Every (student view, teacher view) pair of an image weighs the same.
        global_pairs, local_pairs = views * (views - 1), views * locals_
        share = global_pairs / (global_pairs + local_pairs)
        t = c.student_temperature
        groups = wide.cls_BD.unflatten(0, (views, -1, c.koleo_group or images)).transpose(0, 1)
        spread = torch.stack([losses.koleo(x_BD) for group in groups for x_BD in group]).sum() / len(groups)
        terms = {"dino_global": c.dino_weight * share * losses.dino(global_GBK, target_GBK, t, same_views=True)}
        if locals_:
            dino_local = losses.dino(local_VBK, target_GBK, t, same_views=False)
            terms["dino_local"] = c.dino_weight * (1 - share) * dino_local
        terms["ibot"] = c.ibot_weight * losses.ibot(student_MK, target_MK, weight_M, views * images, t)
        terms["koleo"] = c.koleo_weight * spread
        return terms

    @torch.no_grad()
    def targets(self, batch: Batch, masked_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """What the teacher, which sees no mask, says of the global crops: (G, B, K) and (M, K)."""
        with self.autocast():
            (seen,) = self.teacher.backbone([batch.globals_GBCHW.flatten(0, 1)])
            cls_NK = self.teacher.dino_head(seen.cls_BD)
            patch_MK = self.teacher.patch_head(seen.patches_BPD.flatten(0, 1)[masked_M])
        cls_NK, patch_MK = self._targets("dino", cls_NK, temperature), self._targets("ibot", patch_MK, temperature)
        return cls_NK.unflatten(0, batch.globals_GBCHW.shape[:2]), patch_MK

    def _targets(self, name: str, logits_MK: Tensor, temperature: float) -> Tensor:
        if self.config.targets == "sinkhorn":
            return losses.sinkhorn(logits_MK, temperature, self.ranks)
        # The mean over the rows of a rank, then over ranks, moves the centre once the step is known to be good.
        mean_K = self.ranks.total(logits_MK.float().mean(0)) / self.ranks.total(torch.ones((), device=logits_MK.device))
        self._next_centres[name] = self.centres[name].lerp(mean_K, 1.0 - self.config.centre_momentum)
        return losses.centred(logits_MK, temperature, self.centres[name])

    def autocast(self) -> torch.autocast:
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)

    @torch.no_grad()
    def after_step(self, knobs: Knobs) -> None:
        """Move the average towards the student, and the centres; under FSDP each rank moves its own shards."""
        kept, learned = list(self.average.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(kept, learned, 1.0 - knobs.momentum)
        self.centres |= self._next_centres
