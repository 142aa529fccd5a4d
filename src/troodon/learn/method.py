"""DINOv2, and distillation into a smaller model: one objective, two choices of teacher.

The student looks at masked global crops and at small local crops, and must say of them what the
teacher says of the whole global crops. In pretraining the teacher is the moving average of the
student (https://arxiv.org/abs/2304.07193, section 4); in distillation it is a larger, frozen model
and the student sees no mask (section 5). Everything else is the same, so it is written once.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from troodon.learn import losses, prototypes
from troodon.learn.config import ObjectiveConfig
from troodon.learn.losses import ALONE, Ranks
from troodon.learn.schedules import Knobs
from troodon.learn.teacher import Frozen, Maps, moments, standardised
from troodon.model.config import HeadConfig, ViTConfig
from troodon.model.head import Answer, Head
from troodon.model.vit import ViT
from troodon.views.batch import Batch

# Shape suffixes: G global and V local views, B images, K prototypes, D channels, P patches,
#                 N = G * B global crops or all crops, M masked patches of the whole batch.


NO_MAPS: Mapping[str, Sequence[int]] = MappingProxyType({})


class Branch(nn.Module):
    """A backbone with its heads: one for class tokens, one for patches, or one for both; and with maps to the features
    of teachers, which have so many channels (see Maps)."""

    def __init__(
        self,
        vit: ViTConfig,
        dino_head: HeadConfig | None,
        ibot_head: HeadConfig | None,
        maps: Mapping[str, Sequence[int]] = NO_MAPS,
    ):
        super().__init__()
        self.backbone = ViT(vit)
        if dino_head is not None:
            self.dino_head = Head(vit.dim, dino_head)
        if ibot_head is not None:
            self.ibot_head = Head(vit.dim, ibot_head)
        if maps:
            self.maps = Maps(vit.dim, maps)

    @property
    def patch_head(self) -> Head:
        return self.ibot_head if "ibot_head" in self._modules else self.dino_head

    def answers(self, asked: dict[str, Tensor], compute: torch.dtype) -> dict[str, Answer]:
        """What the heads say to the rows (M, D) that "dino" and "ibot" ask about; a head of both is asked once."""
        if len(asked) > 1 and self.patch_head is self.dino_head:
            rows_MD, prototypes_KD = self.dino_head(torch.cat([*asked.values()])).to(compute)
            parts = rows_MD.split([len(rows) for rows in asked.values()])
            return {name: Answer(part_MD, prototypes_KD) for name, part_MD in zip(asked, parts, strict=True)}
        heads = {"dino": lambda: self.dino_head, "ibot": lambda: self.patch_head}
        return {name: heads[name]()(rows_MD).to(compute) for name, rows_MD in asked.items()}

    def initialize(self) -> None:
        for part in self.children():
            part.initialize()


class Targets(NamedTuple):
    """What the networks that do not learn say of a batch; None where no loss asks."""

    cls: prototypes.Scaled | None  # of G * B class tokens, view after view
    patches: prototypes.Scaled | None  # of M masked patches
    anchor_NPD: Tensor | None
    features: dict[str, list[Tensor]] | None  # of each teacher: "cls" (N, D), "patches" (N, P, D)


class Method:
    """What the loop trains: `student` learns, `average` follows it and is what is kept."""

    def __init__(
        self,
        config: ObjectiveConfig,
        student: Branch,
        average: Branch,
        *,
        teachers: Sequence[Frozen] = (),
        anchor: ViT | None = None,
        ranks: Ranks = ALONE,
        compute: torch.dtype = torch.float32,
    ):
        self.config, self.ranks, self.compute = config, ranks, compute
        self.patch = student.backbone.config.patch
        self.student, self.average = student.train(), average.requires_grad_(False).eval()
        self.teachers, self.teacher = teachers, teachers[0].network if teachers else average
        self.anchor = None if anchor is None else anchor.requires_grad_(False).eval()
        device = next(student.parameters()).device
        heads = {"dino": self.teacher.dino_head} if config.dino_weight else {}
        heads |= {"ibot": self.teacher.patch_head} if config.ibot_weight else {}
        # What is learnt besides weights, and saved with every checkpoint: centres (K,), moments of teachers (3, D).
        self.centres = {
            name: torch.zeros(len(head.last_layer.weight_g), device=device)
            for name, head in heads.items()
            if config.targets == "centring"
        }
        for kind in config.compared:
            for number, frozen in enumerate(teachers):
                self.centres[f"{kind}.{number}"] = torch.zeros(3, frozen.vit.dim, dtype=torch.float64, device=device)
        self._next_centres: dict[str, Tensor] = {}

    def losses(self, batch: Batch, targets: Targets, knobs: Knobs) -> dict[str, Tensor]:
        """Weighted terms; their sum is what is minimised. Networks run in `compute`, losses in fp32."""
        c, (views, images), locals_ = self.config, batch.globals_GBCHW.shape[:2], len(batch.locals_VBCHW)
        crops = [batch.globals_GBCHW.flatten(0, 1)] + [batch.locals_VBCHW.flatten(0, 1)] * (locals_ > 0)
        masks = [None if self.teachers else batch.masks_NP.to(crops[0].device, non_blocking=True), None]
        terms, asked = {}, {}
        with self.autocast():
            wide, *narrow = self.student.backbone(crops, masks[: len(crops)])
            patches_MD, weight_M = self._asked(wide.patches_BPD, batch)
            if targets.cls is not None:
                asked["dino"] = torch.cat([wide.cls_BD, *(x.cls_BD for x in narrow)])
            if targets.patches is not None:
                asked["ibot"] = patches_MD
            answers = self.student.answers(asked, self.compute)

        if targets.cls is not None:
            pairs_VGB = self._cross_entropies(answers["dino"], images, targets.cls)
            # Every (student view, teacher view) pair of an image weighs the same.
            global_pairs, local_pairs = views * (views - 1), views * locals_
            share = global_pairs / (global_pairs + local_pairs)
            terms["dino_global"] = c.dino_weight * share * losses.dino(pairs_VGB[:views], same_views=True)
            if locals_:
                terms["dino_local"] = c.dino_weight * (1 - share) * losses.dino(pairs_VGB[views:], same_views=False)
        if targets.patches is not None:
            pairs_M = self._cross_entropies(answers["ibot"], len(patches_MD), targets.patches)[0, 0]
            terms["ibot"] = c.ibot_weight * losses.ibot(pairs_M, weight_M, views * images)
        cls_GBD = wide.cls_BD.unflatten(0, (views, images))
        if c.koleo_weight:
            terms["koleo"] = c.koleo_weight * self._spread(cls_GBD)
        if c.contrast_weight:
            everyones_GBD = self.ranks.gather(cls_GBD.transpose(0, 1)).transpose(0, 1)
            terms["contrast"] = c.contrast_weight * losses.contrast(everyones_GBD, c.contrast_temperature)
        if targets.anchor_NPD is not None:
            terms["gram"] = c.gram_weight * losses.gram(wide.patches_BPD, targets.anchor_NPD)
        if targets.features is not None:
            with self.autocast():
                mapped = self.student.maps(cls=wide.cls_BD, patches=wide.patches_BPD)
            of_patches = {"smooth_l1": losses.smooth_l1, "cosine": losses.cosine_distance}[c.patch_loss]
            how = {"cls": (c.cls_weight, losses.cosine_distance), "patches": (c.patch_weight, of_patches)}
            for kind, wanted in targets.features.items():
                weight, distance = how[kind]
                pairs = zip(mapped[kind], wanted, strict=True)
                terms[kind] = weight * torch.stack([distance(*pair) for pair in pairs]).mean()
        return terms

    def _asked(self, patches_NPD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(M, D) patches that the patch objective asks of, and (M,) how much each weighs: those that are masked, or
        where no student sees a mask all of them (section 5 of the paper)."""
        rows_MD = patches_NPD.flatten(0, 1)
        if self.teachers:
            return rows_MD, rows_MD.new_full((len(rows_MD),), 1.0 / patches_NPD.shape[1], dtype=torch.float32)
        masked_M, weight_M = batch.masked()
        return rows_MD.index_select(0, masked_M), weight_M

    def _answers(self, batch: Batch) -> dict[str, Answer]:
        """What the teacher's heads say of the global crops: of class tokens, and of the patches that are asked of."""
        if not self.config.by_prototypes:
            return {}
        if self.teachers:
            cls_ND, patches_NPD = self.teachers[0].cls(batch), self.teachers[0].patches(batch, self.patch)
        else:
            (seen,) = self.teacher.backbone([batch.globals_GBCHW.flatten(0, 1)])
            cls_ND, patches_NPD = seen.cls_BD, seen.patches_BPD
        asked = {"dino": cls_ND} if self.config.dino_weight else {}
        if self.config.ibot_weight:
            asked["ibot"], _ = self._asked(patches_NPD, batch)
        return self.teacher.answers(asked, self.compute)

    def _cross_entropies(self, answer: Answer, images: int, targets: prototypes.Scaled) -> Tensor:
        """(V, G, B) of the student's answer for V views, one after another, of so many images or patches."""
        rows_MD, prototypes_KD = answer
        rows_VBD = rows_MD.view(-1, images, rows_MD.shape[-1]) if images else rows_MD[None]
        return prototypes.cross_entropies(rows_VBD, prototypes_KD, targets, self.config.student_temperature)

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
        rows: dict[str, list[Tensor]] = {}
        learnt, anchored = {}, []
        for part in parts:
            crops_NCHW = part.globals_GBCHW.flatten(0, 1)
            with self.autocast():
                for name, (rows_MD, prototypes_KD) in self._answers(part).items():
                    rows.setdefault(name, []).append(rows_MD)
                    learnt[name] = prototypes_KD
                if knobs.anchored and self.anchor is not None:
                    anchored.append(self.anchor([crops_NCHW])[0].patches_BPD)
        found = {name: self._targets(name, rows[name], learnt[name], knobs) for name in rows}
        features = self._features(parts) if c.compared else []
        none: list[None] = [None] * len(parts)
        by_part = zip(found.get("dino", none), found.get("ibot", none), anchored or none, features or none, strict=True)
        return [Targets(*of_part) for of_part in by_part]

    def _features(self, parts: list[Batch]) -> list[dict[str, list[Tensor]]]:
        """What every teacher sees in each part, standardised by all that it has seen up to this step."""
        features: list[dict[str, list[Tensor]]] = [{kind: [] for kind in self.config.compared} for _ in parts]
        for number, frozen in enumerate(self.teachers):
            for kind in self.config.compared:
                with self.autocast():
                    seen = [frozen.cls(b) if kind == "cls" else frozen.patches(b, self.patch) for b in parts]
                name, rows_MD = f"{kind}.{number}", torch.cat([x.flatten(0, -2) for x in seen])
                self._next_centres[name] = moments(rows_MD, self.centres[name], self.ranks)
                for part, x in zip(features, seen, strict=True):
                    part[kind].append(standardised(x, self._next_centres[name]))
        return features

    def _targets(self, name: str, rows: list[Tensor], prototypes_KD: Tensor, knobs: Knobs) -> list[prototypes.Scaled]:
        """Targets from what the teacher's head answers to the rows of each part."""
        answer, temperature = Answer(torch.cat(rows), prototypes_KD), knobs.teacher_temperature
        if self.config.targets == "sinkhorn":
            targets = prototypes.sinkhorn(answer, temperature, self.ranks)
        else:
            # The mean over all rows of the step moves the centre, once the step is known to be good. (The release takes
            # the mean over ranks of theirs: the same, but for masked patches, of which ranks hold different numbers.)
            mean_K = prototypes.mean(answer, self.ranks)
            self._next_centres[name] = self.centres[name].lerp(mean_K, 1.0 - self.config.centre_momentum)
            targets = prototypes.centred(answer, temperature, self.centres[name])
        return targets.split([len(part) for part in rows])

    def autocast(self) -> torch.autocast:
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)

    @torch.no_grad()
    def after_step(self, knobs: Knobs) -> None:
        """Move the average towards the student, and the centres; under FSDP each rank moves its own shards."""
        kept, learned = list(self.average.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(kept, learned, 1.0 - knobs.momentum)
        self.centres |= self._next_centres
