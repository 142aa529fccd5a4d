"""The cost of a step, counted from the code of networks, losses and optimiser: FLOPs of products, bytes of memory.

A number has four bytes in fp32, and `width` bytes in products. Memory is that of the tensors of one rank, without what
allocators and libraries hold. No torch here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from troodon.learn.chunks import CACHED, prototypes_at_a_time
from troodon.learn.config import PretrainConfig
from troodon.learn.objective import ANCHOR, CLS_TARGETS, VISIBLE_TARGETS
from troodon.model.config import HeadConfig, ViTConfig, depth_group, depth_kept
from troodon.model.counts import flops, stem_activations, stem_parameters

FP32 = 4
WHOLE = 2**32  # bytes of a frozen backbone up to which each rank holds all of it, so that nothing is gathered
SHORT = 512  # tokens up to which a CPU keeps attention's whole matrix in bf16: that of model/packing.py

Grid = tuple[int, int]  # rows and columns of patches


def backbone_parameters(vit: ViTConfig) -> int:
    positions = 1 + vit.grid**2 if vit.positions == "learned" else 0
    embedding = vit.dim * (2 + positions + vit.registers)
    return stem_parameters(vit) + embedding + vit.depth * block_parameters(vit) + 2 * vit.dim


def stays_whole(vit: ViTConfig, width: int) -> bool:
    """Whether each rank holds the whole of a frozen backbone whose numbers have so many bytes."""
    return width * backbone_parameters(vit) <= WHOLE


def block_parameters(vit: ViTConfig) -> int:
    inner, outer = vit.mlp_hidden * (2 if vit.mlp == "swiglu" else 1), vit.mlp_hidden
    products = vit.dim * (3 * vit.dim + vit.dim + inner + outer) + 3 * vit.dim + vit.dim + inner + vit.dim
    return products + 2 * 2 * vit.dim + 2 * vit.dim  # two norms, two layer scales


def adapter_parameters(vit: ViTConfig, rank: int) -> int:
    """Both factors of the four linear layers of each block: qkv, proj, and those of the MLP."""
    return vit.depth * rank * ((1 + 3) * vit.dim + 2 * vit.dim + vit.dim + inner(vit) + vit.mlp_hidden + vit.dim)


def inner(vit: ViTConfig) -> int:
    """Output channels of the first layer of the MLP."""
    return vit.mlp_hidden * (2 if vit.mlp == "swiglu" else 1)


def head_parameters(head: HeadConfig, dim: int) -> int:
    return sum((a + 1) * b for a, b in pairwise(widths(head, dim))) + head.prototypes * (head.bottleneck + 1)


def widths(head: HeadConfig, dim: int) -> list[int]:
    return [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]


@dataclass(frozen=True)
class HeadUse:
    """A head, and the rows that one part of a step sends through it."""

    head: HeadConfig
    student_rows: float
    teacher_rows: float


@dataclass(frozen=True)
class Cost:
    """The cost of a step whose global and local crops have these grids, on `ranks` devices ("cpu" or "cuda").

    A part of a step goes through the networks at once: a rank's images divided by `parallel.accumulate`.
    """

    config: PretrainConfig
    global_grid: Grid
    local_grid: Grid
    device: str
    width: int
    ranks: int
    teachers: tuple[ViTConfig, ...] = ()  # frozen ones; without any the EMA teaches

    @property
    def parts(self) -> int:
        return self.config.parallel.accumulate

    @property
    def images(self) -> int:
        """Images of one part."""
        return max(1, self.config.batch // (self.ranks * self.parts))

    @property
    def views(self) -> int:
        """Global crops of an image."""
        return self.config.crops.globals

    @property
    def groups(self) -> list[tuple[int, Grid]]:
        """Number and grid of the global and of the local crops of one part."""
        return [(self.views * self.images, self.global_grid), (self.config.crops.locals * self.images, self.local_grid)]

    def grid_of(self, teacher: ViTConfig) -> Grid:
        """The grid of a teacher's patches of a global crop."""
        patch = self.config.vit.patch
        return self.global_grid[0] * patch // teacher.patch, self.global_grid[1] * patch // teacher.patch

    def length(self, grid: Grid) -> int:
        """Tokens of a crop."""
        return 1 + self.config.vit.registers + grid[0] * grid[1]

    def kept(self, crops: int) -> int:
        """Crops that go through a residual branch under stochastic depth (model/packing.py), on average."""
        drop, group = self.config.vit.drop_path, depth_group(self.config.batch)
        return round(depth_kept(crops // self.images * group, drop) * self.images / group) if drop else crops

    @cached_property
    def tokens(self) -> int:
        return sum(crops * self.length(grid) for crops, grid in self.groups)

    @cached_property
    def kept_tokens(self) -> int:
        return sum(self.kept(crops) * self.length(grid) for crops, grid in self.groups)

    @cached_property
    def spared(self) -> int:
        """Tokens of one part that the last block of the student keeps from its MLP, as no term compares patches."""
        if self.config.objective.patches or self.config.vit.drop_path:
            return 0
        return sum(crops * grid[0] * grid[1] for crops, grid in self.groups)

    @cached_property
    def compared_patches(self) -> float:
        """Patches of one part that are compared by prototypes: the masked ones, on average; or all of them."""
        masks, needs = self.config.masks, self.config.objective.needs
        if self.teachers or VISIBLE_TARGETS in needs:
            return self.views * self.images * self.global_grid[0] * self.global_grid[1]
        masked = int(self.views * self.images * masks.share) * sum(masks.ratio) / 2
        return masked * self.global_grid[0] * self.global_grid[1]

    @cached_property
    def uses(self) -> dict[str, HeadUse]:
        """The use of each head, by its input: "cls" or "patches"."""
        c, needs = self.config, self.config.objective.needs
        shared = c.objective.heads == "shared"
        views = self.views
        dino = HeadUse(c.dino_head, (views + c.crops.locals) * self.images, views * self.images)
        ibot = HeadUse(c.dino_head if shared else c.ibot_head, self.compared_patches, self.compared_patches)
        return ({"cls": dino} if CLS_TARGETS in needs else {}) | (
            {"patches": ibot} if c.objective.patch_targets else {}
        )

    @cached_property
    def heads(self) -> list[HeadConfig]:
        """The heads that are used: one for both, or one for each."""
        heads = [use.head for use in self.uses.values()]
        return heads[:1] if self.config.objective.heads == "shared" else heads

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of the student, by part. A head that no term needs is not made."""
        c = self.config
        shared = c.objective.heads == "shared" and c.objective.prototypes
        heads = {"head": c.dino_head} if shared else {n: u.head for n, u in self.uses.items()}
        names = {"head": "head", "cls": "head of classes", "patches": "head of patches"}
        made = {names[name]: head_parameters(head, c.vit.dim) for name, head in heads.items()}
        made |= {"adapters": adapter_parameters(c.vit, c.adapt.rank)} if c.adapt.rank else {}
        if c.objective.projector:
            layers = list(pairwise((c.vit.dim, *c.objective.projector)))  # hidden ones have a norm, the last a bias
            made["projector"] = sum((a + 2) * b for a, b in layers) - layers[-1][1]
        if c.objective.features:
            made["maps"] = len(c.objective.features) * sum((c.vit.dim + 1) * t.dim for t in self.teachers)
        return {"backbone": backbone_parameters(c.vit)} | made

    # Products

    def flops(self) -> dict[str, float]:
        """FLOPs of a whole step over all ranks, by part. A backward pass costs twice a forward pass."""
        vit, n = self.config.vit, self.ranks * self.parts
        student = embedding = 0.0
        for crops, grid in self.groups:
            student += crops * flops(vit, grid, self.kept(crops) / max(crops, 1))
            embedding += crops * flops(vit, grid, 0.0)
        student -= 2 * self.spared * vit.dim * (inner(vit) + vit.mlp_hidden)
        heads, again = 0.0, {"full": student - embedding}.get(self.config.parallel.recompute, 0.0)
        repeated = 4 if self.config.objective.targets == "sinkhorn" else 1  # products of the teacher, after the first
        for use in self.uses.values():
            head, last = use.head, 2 * use.head.bottleneck * use.head.prototypes
            products = 2 * sum(a * b for a, b in pairwise(widths(head, vit.dim))) + last
            heads += products * (3 * use.student_rows + use.teacher_rows)
            again += 0.0 if self.kept_logits(use.student_rows, head) else last * use.student_rows
            again += (
                0.0 if self.kept_logits(self.parts * use.teacher_rows, head) else repeated * last * use.teacher_rows
            )
        networks = [(t, self.grid_of(t)) for t in self.teachers]
        networks += [(vit, self.global_grid)] if self.config.objective.prototypes and not self.teachers else []
        networks += [(vit, self.global_grid)] if ANCHOR in self.config.objective.needs else []
        teacher = self.groups[0][0] * sum(flops(network, grid) for network, grid in networks)
        parts = {"student": 3 * student, "recomputed": again, "teacher": teacher, "heads": heads}
        return {name: n * count for name, count in parts.items() if count}

    # Memory of a rank

    def kept_logits(self, rows: float, head: HeadConfig) -> float:
        """Bytes of the logits, if they are kept and not computed again."""
        width = FP32 if self.device == "cuda" else self.width  # as the product gives them
        return width * rows * head.prototypes if rows * head.prototypes <= CACHED else 0.0

    def chunk(self, rows: float, head: HeadConfig) -> float:
        """Bytes of one matrix of a chunk of prototypes."""
        return FP32 * rows * min(head.prototypes, prototypes_at_a_time(rows, self.device))

    def state(self) -> dict[str, int]:
        """Memory after a step: parameters in fp32, and tensors of their shape."""
        own = FP32 * sum(self.parameters.values()) // self.ranks
        frozen_own = FP32 * self.parameters["backbone"] // self.ranks if self.config.adapt.rank else 0
        learned = own - frozen_own
        state = {"weights": own, "gradients": learned, "moments": 2 * learned, "EMA": own}
        anchor = FP32 * self.parameters["backbone"] // self.ranks
        state |= {"anchor": anchor} if ANCHOR in self.config.objective.needs else {}
        frozen = sum(
            self.width * backbone_parameters(t)
            if self.ranks == 1 or stays_whole(t, self.width)
            else FP32 * backbone_parameters(t) // self.ranks
            for t in self.teachers
        )
        return state | ({"teacher": frozen} if frozen else {})

    def block(self) -> tuple[float, float, float]:
        """Memory that a block of the student keeps for the backward pass: its input, results of products and attention,
        and the rest.
        """
        vit, w = self.config.vit, self.width
        dim, hidden, gated = vit.dim, vit.mlp_hidden, vit.mlp == "swiglu"
        whole = fused = 0  # numbers in whole attention matrices; tokens whose attention is fused
        for crops, grid in self.groups:
            if self.device == "cpu" and w == 2 and self.length(grid) <= SHORT:
                whole += vit.heads * self.kept(crops) * self.length(grid) ** 2
            else:
                fused += self.kept(crops) * self.length(grid)
        # qkv, the first layer of the MLP, and where it is recomputed all products; attention, its log-sums
        last = 2 if self.config.parallel.recompute == "selective" else 0
        products = self.kept_tokens * w * ((3 + last) * dim + (2 if gated else 1) * hidden)
        products += fused * (w * dim + FP32 * vit.heads) + whole * w
        # inputs and outputs of two norms, statistics on a CPU; positions that stochastic depth keeps
        on_gpu = self.device == "cuda"
        rest = 2 * (self.tokens * FP32 * dim if on_gpu else self.kept_tokens * (FP32 * dim + 8))
        rest += self.kept_tokens * 2 * w * dim
        rest += self.kept_tokens * 2 * 8 if vit.drop_path else 0
        copied = not (on_gpu and w == 2) and (whole or len([n for n, _ in self.groups if n]) > 1)
        rest += self.kept_tokens * w * dim if copied else 0  # attention, copied into the layout of the pack
        return FP32 * self.tokens * dim, products, rest

    def student(self) -> dict[str, float]:
        """Memory while the student learns, at the peak: in the losses, or when the backward pass enters the blocks."""
        c, vit, w = self.config, self.config.vit, self.width
        entering, products, rest = self.block()
        kept, again = {
            "none": (products + rest, 0.0),
            "selective": (entering + products, rest),
            "full": (entering, products + rest),
        }[c.parallel.recompute]
        of_mlp = w * inner(vit) + (w + FP32) * vit.dim + 8  # with its norm
        spared = 0 if c.parallel.recompute == "full" else self.spared * of_mlp
        patches = sum(crops * grid[0] * grid[1] for crops, grid in self.groups)
        pixels = vit.channels * vit.patch**2 * patches
        lasting = {
            "blocks": vit.depth * kept - spared,
            "images": pixels * (FP32 * self.parts + w) + patches * w * stem_activations(vit),
            "targets": self.targets(),
            **self.gathered(),
        }
        copied = w if w == 2 and self.ranks == 1 else 0  # autocast keeps copies for backward; shards are gathered so
        if copied:
            blocks = vit.depth if c.parallel.recompute == "none" else 1
            last = vit.dim * (vit.dim + vit.mlp_hidden)  # weights of the ends of branches, which are made again
            lasting["weights in bf16"] = copied * blocks * (block_parameters(vit) - last)
        heads = float(copied * self.head_parameters())
        heads += sum(w * head.prototypes * head.bottleneck for head in self.heads)
        logits = chunks = normalising = 0.0
        for use in self.uses.values():
            k, b = use.head.prototypes, use.head.bottleneck
            heads += use.student_rows * w * (2 * sum(widths(use.head, vit.dim)) - vit.dim)
            logits += self.kept_logits(use.student_rows, use.head)
            chunks = max(
                chunks, 3 * self.chunk(use.student_rows, use.head) + k * b * w
            )  # with the gradient of prototypes
            normalising = max(normalising, 2 * k * b * FP32)  # the gradient in weight normalisation
        last = (self.tokens - self.spared) * 2 * FP32 * vit.dim
        pairs = (self.views * c.batch) ** 2 if c.objective.weight("contrast") else 0  # of views
        cosines = 3 * FP32 * pairs  # these, their softmax, and its gradient
        # The last block goes backward first. If it was spared, the one before it may need more, when this one is gone.
        backward = (self.kept_tokens - self.spared) * self.block_backward()
        backward = max(backward, self.kept_tokens * self.block_backward() - (kept - spared) * (vit.depth > 1))
        in_losses = {
            "last norm": last,
            "heads": heads,
            "logits": max(logits + chunks, normalising),
            "contrast": cosines,
        }
        in_blocks = {
            "gradients of heads": FP32 * self.head_parameters() / self.ranks
            if self.parts == 1
            else 0.0,  # else they exist already
            "one block": again + self.tokens * FP32 * vit.dim + backward,
        }
        return lasting | max(in_losses, in_blocks, key=total)

    def block_backward(self) -> int:
        """Bytes of a token while a block goes backward: activation of the MLP, computed again, and both its gradients;
        in low precision also two copies in fp32."""
        copies = 2 * FP32 * self.config.vit.dim if self.width == 2 else 0
        return 3 * self.width * inner(self.config.vit) + copies

    def head_parameters(self) -> int:
        return sum(self.parameters.values()) - self.parameters["backbone"] - self.parameters.get("adapters", 0)

    def targets(self) -> float:
        """Memory of the targets of all parts: the teacher's prototypes, logits if they are kept, and the anchor."""
        size = self.teacher_output()
        if ANCHOR in self.config.objective.needs:
            size += self.parts * FP32 * self.groups[0][0] * self.length(self.global_grid) * self.config.vit.dim
        return size

    def teacher_output(self) -> float:
        prototypes = sum(self.width * head.prototypes * head.bottleneck for head in self.heads)
        return prototypes + sum(self.kept_logits(self.parts * use.teacher_rows, use.head) for use in self.uses.values())

    def gathered(self) -> dict[str, float]:
        """Memory of gathered weights: a block and the next one, or a head, with its gradient."""
        if self.ranks == 1:
            return {}
        vit = self.config.vit
        heads = [head_parameters(use.head, vit.dim) for use in self.uses.values()]
        return {"gathered": max([3 * self.width * block_parameters(vit), *((self.width + FP32) * n for n in heads)])}

    def teacher(self) -> dict[str, float]:
        """Memory while the teacher runs, at the peak: its prototypes, logits that are kept, a chunk of the others."""
        vit, w = max((*self.teachers, self.config.vit), key=backbone_parameters), self.width
        prototypes = sum(w * head.prototypes * head.bottleneck for head in self.heads)
        tokens = self.groups[0][0] * (1 + vit.registers + math.prod(self.grid_of(vit)))
        in_backbone = {"prototypes": prototypes, "one block": tokens * (3 * FP32 * vit.dim + 2 * w * inner(vit))}
        uses = self.uses.values()
        chunks = max((3 * self.chunk(self.parts * use.teacher_rows, use.head) for use in uses), default=0.0)
        directions = max((2 * FP32 * use.head.prototypes * use.head.bottleneck for use in uses), default=0.0)
        in_heads = {"logits, prototypes": self.teacher_output(), "chunks": max(chunks, directions)}
        return self.gathered() | max(in_heads, in_backbone, key=total)


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())
