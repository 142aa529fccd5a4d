"""DINOv2, and distillation into a smaller model: one method, two choices of teacher.

The student sees masked global crops and small local crops, and predicts what the teacher says of the whole global
crops. In pretraining the teacher is the EMA of the student (section 4 of https://arxiv.org/abs/2304.07193). In
distillation it is a larger, frozen network, and the student sees no masks (section 5). What the two are compared by is
a list of terms (objective.py, terms.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from troodon.dist import send
from troodon.learn import prototypes
from troodon.learn.features import moments, standardised
from troodon.learn.losses import ALONE, Ranks
from troodon.learn.network import Network
from troodon.learn.objective import ANCHOR, CLS_TARGETS, VISIBLE_TARGETS, ObjectiveConfig
from troodon.learn.schedules import ScheduledValues
from troodon.learn.teacher import FrozenTeacher
from troodon.learn.terms import FUNCTIONS, Comparison, PatchSelection, StudentOutput, Targets, gathered
from troodon.model.head import HeadOutput
from troodon.model.vit import ViT
from troodon.views.batch import Batch

# Shape suffixes: G global and V local views, B images, K prototypes, D channels, P patches,
#                 N = G * B global crops or all crops, M rows: class tokens, or patches that are compared.


class Method:
    """What the loop trains: `student` learns, `ema` follows it and is what is kept."""

    comparison = Comparison

    def __init__(
        self,
        config: ObjectiveConfig,
        student: Network,
        ema: Network,
        *,
        teachers: Sequence[FrozenTeacher] = (),
        anchor: ViT | None = None,
        ranks: Ranks = ALONE,
        compute: torch.dtype = torch.float32,
    ):
        self.config, self.ranks, self.compute = config, ranks, compute
        self.patch = student.backbone.config.patch
        self.student, self.ema = student.train(), ema.requires_grad_(False).eval()
        self.teachers, self.teacher = teachers, teachers[0].network if teachers else ema
        self.anchor = None if anchor is None else anchor.requires_grad_(False).eval()
        self.centres = self._first_centres()
        self._next_centres: dict[str, Tensor] = {}

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Weighted terms; their sum is what is minimised. Networks run in `compute`, losses in fp32."""
        patches = self._patch_selection(batch) if self.config.patch_targets else None
        comparison = self.comparison(self._student_output(batch, patches), targets, patches, self.config, self.ranks)
        terms = {}
        for name, weight in self.config.terms:
            terms |= {part: weight * value for part, value in FUNCTIONS[name](comparison).items()}
        return terms

    def _student_output(self, batch: Batch, patches: PatchSelection | None) -> StudentOutput:
        """The student sees global crops, masked unless a frozen teacher teaches, and local crops."""
        crops = [batch.globals_GBCHW.flatten(0, 1)] + [batch.locals_VBCHW.flatten(0, 1)] * (len(batch.locals_VBCHW) > 0)
        masks = [None if self.teachers else send(batch.masks_NP, crops[0].device), None]
        with self.autocast():
            of_globals, *of_locals = self.student.backbone(crops, masks[: len(crops)], batch.share, self.config.patches)
            tokens, mapped = {}, {}
            if CLS_TARGETS in self.config.needs:
                tokens["cls"] = torch.cat([of_globals.cls_BD, *(x.cls_BD for x in of_locals)])
            if patches is not None:
                tokens["patches"] = patches.select(of_globals.patches_BPD)
            heads = self.student.heads(tokens, self.compute)
            if self.config.features:
                mapped = self.student.maps(cls=of_globals.cls_BD, patches=of_globals.patches_BPD)
            cls_GBD, projected_GBD = of_globals.cls_BD.unflatten(0, batch.globals_GBCHW.shape[:2]), None
            if self.config.projector:
                all_GBD = gathered(cls_GBD, self.ranks)
                projected_GBD = self.student.projector(all_GBD.flatten(0, 1)).unflatten(0, all_GBD.shape[:2])
        return StudentOutput(cls_GBD, of_globals.patches_BPD, heads, mapped, projected_GBD)

    def _patch_selection(self, batch: Batch) -> PatchSelection:
        """Masked patches; all of them if visible ones are compared too, or if the student sees no masks."""
        device = batch.globals_GBCHW.device
        if self.teachers:
            crops, (height, width) = batch.globals_GBCHW.shape[:2].numel(), batch.globals_GBCHW.shape[-2:]
            patches = height // self.patch * (width // self.patch)
            weight_M = torch.full((crops * patches,), 1.0 / patches, device=device)
            return PatchSelection(None, weight_M, weight_M)
        if VISIBLE_TARGETS in self.config.needs:
            weights = (send(_shares(mask_NP), device) for mask_NP in (batch.masks_NP, ~batch.masks_NP))
            return PatchSelection(None, *weights)
        index_M, weight_M = batch.masked_patches()
        return PatchSelection(index_M, weight_M, torch.zeros_like(weight_M))

    @torch.no_grad()
    def targets(self, parts: list[Batch], scheduled: ScheduledValues) -> list[Targets]:
        """What the teacher, which sees no masks, says of the global crops of the parts of one step.

        Sinkhorn-Knopp and centring take all parts together: they look at every image of the step, however it is cut.
        """
        needs = self.config.needs
        if scheduled.new_anchor and self.anchor is not None:
            for anchor, ema in zip(self.anchor.parameters(), self.ema.backbone.parameters(), strict=True):
                anchor.copy_(ema)
        outputs, anchored = [], []
        for part in parts:
            with self.autocast():
                outputs.append(self._teacher_heads(part))
                if ANCHOR in needs and scheduled.anchored and self.anchor is not None:
                    anchored.append(self.anchor([part.globals_GBCHW.flatten(0, 1)])[0].patches_BPD)
        targets = self._prototype_targets(outputs, scheduled) if outputs[0] else {}
        features = self._features(parts) if self.config.features else []
        none: list[None] = [None] * len(parts)
        by_part = zip(
            targets.get("cls", none), targets.get("patches", none), anchored or none, features or none, strict=True
        )
        return [Targets(*of_part) for of_part in by_part]

    def _teacher_heads(self, batch: Batch) -> dict[str, HeadOutput]:
        """Outputs of the teacher's heads for class tokens of global crops, and for the patches that are compared."""
        if not self.config.prototypes:
            return {}
        if self.teachers:
            cls_ND, patches_NPD = self.teachers[0].cls(batch), self.teachers[0].patches(batch, self.patch)
        else:
            (tokens,) = self.teacher.backbone([batch.globals_GBCHW.flatten(0, 1)])
            cls_ND, patches_NPD = tokens.cls_BD, tokens.patches_BPD
        inputs = {"cls": cls_ND} if CLS_TARGETS in self.config.needs else {}
        if self.config.patch_targets:
            inputs["patches"] = self._patch_selection(batch).select(patches_NPD)
        return self.teacher.heads(inputs, self.compute)

    def _prototype_targets(
        self, outputs: list[dict[str, HeadOutput]], scheduled: ScheduledValues
    ) -> dict[str, list[prototypes.PrototypeTargets]]:
        """Targets of each part by kind, from the outputs of the teacher's heads for each part."""
        kinds, temperature = [*outputs[0]], scheduled.teacher_temperature
        whole = [
            HeadOutput(torch.cat([part[kind].bottleneck_MD for part in outputs]), outputs[-1][kind].prototypes_KD)
            for kind in kinds
        ]
        if self.config.targets == "sinkhorn":
            targets = prototypes.sinkhorn(whole, temperature, self.ranks)
        else:
            # The mean over all rows of the step moves the centre, once the step is known to be good. (The release
            # takes the mean of the means of ranks: the same, but for masked patches, whose number differs.)
            for kind, mean_K in zip(kinds, prototypes.means(whole, self.ranks), strict=True):
                name = CENTRES[kind]
                self._next_centres[name] = self.centres[name].lerp(mean_K, 1.0 - self.config.centre_momentum)
            targets = [prototypes.centred(output, temperature, self.centres[CENTRES[kind]])
                       for kind, output in zip(kinds, whole, strict=True)]  # fmt: skip
        return {kind: of_kind.split([len(part[kind].bottleneck_MD) for part in outputs])
                for kind, of_kind in zip(kinds, targets, strict=True)}  # fmt: skip

    def _features(self, parts: list[Batch]) -> list[dict[str, list[Tensor]]]:
        """Features of each part by each frozen teacher, standardised by the moments of all steps up to this one."""
        features: list[dict[str, list[Tensor]]] = [{kind: [] for kind in self.config.features} for _ in parts]
        for number, teacher in enumerate(self.teachers):
            for kind in self.config.features:
                with self.autocast():
                    tokens = [teacher.cls(b) if kind == "cls" else teacher.patches(b, self.patch) for b in parts]
                name, rows_MD = f"{kind}.{number}", torch.cat([x.flatten(0, -2) for x in tokens])
                self._next_centres[name] = moments(rows_MD, self.centres[name], self.ranks)
                for part, x in zip(features, tokens, strict=True):
                    part[kind].append(standardised(x, self._next_centres[name]))
        return features

    def _first_centres(self) -> dict[str, Tensor]:
        """State besides weights, which checkpoints hold: centres (K,), moments of frozen teachers (3, D)."""
        config, device = self.config, next(self.student.parameters()).device
        heads = {"cls": lambda: self.teacher.dino_head} if CLS_TARGETS in config.needs else {}
        heads |= {"patches": lambda: self.teacher.patch_head} if config.patch_targets else {}
        centres = {
            CENTRES[kind]: torch.zeros(len(head().last_layer.weight_g), device=device)
            for kind, head in heads.items()
            if config.targets == "centring"
        }
        for kind in config.features:
            for number, teacher in enumerate(self.teachers):
                centres[f"{kind}.{number}"] = torch.zeros(3, teacher.vit.dim, dtype=torch.float64, device=device)
        return centres

    def autocast(self) -> torch.autocast:
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)

    @torch.no_grad()
    def after_step(self, scheduled: ScheduledValues) -> None:
        """Update the EMA and the centres. Under FSDP each rank updates its own shards."""
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 1.0 - scheduled.ema_momentum)
        for of_ema, of_student in zip(self.ema.buffers(), self.student.buffers(), strict=True):  # running statistics
            of_ema.copy_(of_student)
        self.centres |= self._next_centres


CENTRES = {"cls": "dino", "patches": "ibot"}  # names of the centres in checkpoints


def _shares(mask_NP: Tensor) -> Tensor:
    """(N * P,): one over the patches of a crop that are in the mask, 0 for the others."""
    return (mask_NP / mask_NP.sum(1, keepdim=True).clamp(min=1)).flatten().float()
