"""What a step costs, counted from the code of networks, losses and optimiser: products, and bytes of memory.

A number has four bytes in fp32, and `width` bytes where products are computed. Of memory these are the tensors of one
rank; what allocators and libraries hold besides is not in it. No torch here.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from troodon.learn.chunks import CACHED, chunk_size
from troodon.learn.config import PretrainConfig
from troodon.learn.objective import ANCHOR, CLS_TARGETS, VISIBLE_TARGETS
from troodon.model.config import HeadConfig, ViTConfig, flops

FP32 = 4
SHORT = 512  # tokens up to which a CPU keeps attention's whole matrix in bf16: that of model/packing.py

Grid = tuple[int, int]  # rows and columns of patches


def backbone_parameters(vit: ViTConfig) -> int:
    embedding = vit.dim * (vit.channels * vit.patch**2 + 1) + vit.dim * (3 + vit.grid**2 + vit.registers)
    return embedding + vit.depth * block_parameters(vit) + 2 * vit.dim


def block_parameters(vit: ViTConfig) -> int:
    inner, outer = vit.mlp_hidden * (2 if vit.mlp == "swiglu" else 1), vit.mlp_hidden
    products = vit.dim * (3 * vit.dim + vit.dim + inner + outer) + 3 * vit.dim + vit.dim + inner + vit.dim
    return products + 2 * 2 * vit.dim + 2 * vit.dim  # two norms, two layer scales


def inner(vit: ViTConfig) -> int:
    """Channels that the first layer of the MLP gives."""
    return vit.mlp_hidden * (2 if vit.mlp == "swiglu" else 1)


def head_parameters(head: HeadConfig, dim: int) -> int:
    return sum((a + 1) * b for a, b in pairwise(widths(head, dim))) + head.prototypes * (head.bottleneck + 1)


def widths(head: HeadConfig, dim: int) -> list[int]:
    return [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]


@dataclass(frozen=True)
class Use:
    """A head, and the rows that one part of a step sends through it: the student's, and the teacher's."""

    head: HeadConfig
    rows: float
    taught: float


@dataclass(frozen=True)
class Cost:
    """Of a step of which global and local crops have these grids, on `ranks` devices of a kind ("cpu" or "cuda").

    A part of a step is what goes through the networks at once: a rank's images over `parallel.accumulate`.
    """

    config: PretrainConfig
    wide: Grid
    narrow: Grid
    device: str
    width: int
    ranks: int
    teachers: tuple[ViTConfig, ...] = ()  # that do not learn; without any the average teaches

    @property
    def parts(self) -> int:
        return self.config.parallel.accumulate

    @property
    def images(self) -> int:
        """Of one part."""
        return max(1, self.config.batch // (self.ranks * self.parts))

    @property
    def groups(self) -> list[tuple[int, Grid]]:
        """Crops of one part, and their grid."""
        return [(2 * self.images, self.wide), (self.config.crops.locals * self.images, self.narrow)]

    def grid_of(self, teacher: ViTConfig) -> Grid:
        """A teacher's patches of a global crop."""
        patch = self.config.vit.patch
        return self.wide[0] * patch // teacher.patch, self.wide[1] * patch // teacher.patch

    def length(self, grid: Grid) -> int:
        return 1 + self.config.vit.registers + grid[0] * grid[1]

    def kept(self, crops: int) -> int:
        """Crops that go through a branch, as stochastic depth draws them (model/packing.py)."""
        drop = self.config.vit.drop_path
        return max(int(crops * (1.0 - drop)), min(crops, 1)) if drop else crops

    @cached_property
    def tokens(self) -> int:
        return sum(crops * self.length(grid) for crops, grid in self.groups)

    @cached_property
    def kept_tokens(self) -> int:
        return sum(self.kept(crops) * self.length(grid) for crops, grid in self.groups)

    @cached_property
    def masked(self) -> float:
        """Patches of one part that are compared by prototypes: the masked ones, on average; or all of them."""
        masks, needs = self.config.masks, self.config.objective.needs
        if self.teachers or VISIBLE_TARGETS in needs:
            return 2 * self.images * self.wide[0] * self.wide[1]
        return int(2 * self.images * masks.share) * sum(masks.ratio) / 2 * self.wide[0] * self.wide[1]

    @cached_property
    def uses(self) -> dict[str, Use]:
        """Of heads, by what they take."""
        c, needs = self.config, self.config.objective.needs
        shared = c.objective.heads == "shared"
        dino = Use(c.dino_head, (2 + c.crops.locals) * self.images, 2 * self.images)
        ibot = Use(c.dino_head if shared else c.ibot_head, self.masked, self.masked)
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
        """Of the student, by part. A head that no term needs is not made."""
        c = self.config
        shared = c.objective.heads == "shared" and c.objective.prototypes
        heads = {"head": c.dino_head} if shared else {n: u.head for n, u in self.uses.items()}
        names = {"head": "head", "cls": "head of classes", "patches": "head of patches"}
        made = {names[name]: head_parameters(head, c.vit.dim) for name, head in heads.items()}
        if c.objective.features:
            made["maps"] = len(c.objective.features) * sum((c.vit.dim + 1) * t.dim for t in self.teachers)
        return {"backbone": backbone_parameters(c.vit)} | made

    # Products

    def flops(self) -> dict[str, float]:
        """Of a whole step, over all ranks. A backward pass is twice a forward pass."""
        vit, n = self.config.vit, self.ranks * self.parts
        student = embedding = 0.0
        for crops, grid in self.groups:
            student += crops * flops(vit, grid, self.kept(crops) / max(crops, 1))
            embedding += crops * flops(vit, grid, 0.0)
        heads, again = 0.0, {"full": student - embedding}.get(self.config.parallel.recompute, 0.0)
        teaching = 4 if self.config.objective.targets == "sinkhorn" else 2  # products of the teacher, after the first
        for use in self.uses.values():
            head, last = use.head, 2 * use.head.bottleneck * use.head.prototypes
            products = 2 * sum(a * b for a, b in pairwise(widths(head, vit.dim))) + last
            heads += products * (3 * use.rows + use.taught)
            again += 0.0 if self.kept_logits(use.rows, head) else last * use.rows
            again += 0.0 if self.kept_logits(self.parts * use.taught, head) else teaching * last * use.taught
        asked = [(t, self.grid_of(t)) for t in self.teachers]
        asked += [(vit, self.wide)] if self.config.objective.prototypes and not self.teachers else []
        asked += [(vit, self.wide)] if ANCHOR in self.config.objective.needs else []
        teacher = self.groups[0][0] * sum(flops(network, grid) for network, grid in asked)
        found = {"student": 3 * student, "recomputed": again, "teacher": teacher, "heads": heads}
        return {name: n * count for name, count in found.items() if count}

    # Memory of a rank

    def kept_logits(self, rows: float, head: HeadConfig) -> float:
        return self.width * rows * head.prototypes if rows * head.prototypes <= CACHED else 0.0

    def chunk(self, rows: float, head: HeadConfig) -> float:
        """One of the matrices that are made for a chunk of prototypes."""
        return FP32 * rows * min(head.prototypes, chunk_size(self.device))

    def state(self) -> dict[str, int]:
        """After a step: parameters in fp32, and what has their shape."""
        own = FP32 * sum(self.parameters.values()) // self.ranks
        found = {"weights": own, "gradients": own, "moments": 2 * own, "average": own}
        anchor = FP32 * self.parameters["backbone"] // self.ranks
        found |= {"anchor": anchor} if ANCHOR in self.config.objective.needs else {}
        width = FP32 if self.ranks > 1 else self.width
        taught = sum(width * backbone_parameters(t) for t in self.teachers) // self.ranks
        return found | ({"teacher": taught} if taught else {})

    def block(self) -> tuple[float, float, float]:
        """What the student's blocks keep for the backward pass: its input, results of products and attention, and
        the rest, per block.
        """
        vit, w = self.config.vit, self.width
        dim, hidden, gated = vit.dim, vit.mlp_hidden, vit.mlp == "swiglu"
        whole = fused = 0  # numbers of attention's matrices; tokens of which they are not kept
        for crops, grid in self.groups:
            if self.device == "cpu" and w == 2 and self.length(grid) <= SHORT:
                whole += vit.heads * self.kept(crops) * self.length(grid) ** 2
            else:
                fused += self.kept(crops) * self.length(grid)
        # qkv, proj and the second layer of the MLP (inputs of layer scale), the first layer; attention, its log-sums
        products = self.kept_tokens * w * (5 * dim + (2 if gated else 1) * hidden)
        products += fused * (w * dim + FP32 * vit.heads) + whole * w
        # inputs and statistics of two norms, and what they give; where stochastic depth adds
        rest = self.kept_tokens * (2 * (FP32 * dim + 8) + 2 * w * dim)
        rest += self.kept_tokens * 2 * 8 if vit.drop_path else 0
        varlen = self.device == "cuda" and w == 2
        rest += 0 if varlen else self.kept_tokens * w * dim  # attention of several groups, copied into one
        return FP32 * self.tokens * dim, products, rest

    def student(self) -> dict[str, float]:
        """While the student learns, at the peak: in the losses, or as the backward pass enters the blocks."""
        c, vit, w = self.config, self.config.vit, self.width
        entering, products, rest = self.block()
        kept, again = {
            "none": (products + rest, 0.0),
            "selective": (entering + products, rest),
            "full": (entering, products + rest),
        }[c.parallel.recompute]
        pixels = vit.channels * vit.patch**2 * sum(crops * grid[0] * grid[1] for crops, grid in self.groups)
        lasting = {
            "blocks": vit.depth * kept,
            "images": pixels * (FP32 * self.parts + w),
            "targets": self.targets(),
            **self.gathered(),
        }
        copied = w if w == 2 and self.ranks == 1 else 0  # by autocast, for the backward pass; shards are gathered so
        if copied:
            blocks = vit.depth if c.parallel.recompute == "none" else 1
            lasting["weights in bf16"] = copied * blocks * block_parameters(vit)
        heads = float(copied * self.of_heads())
        heads += sum(w * head.prototypes * head.bottleneck for head in self.heads)
        logits = one = normalising = 0.0
        for use in self.uses.values():
            k, b = use.head.prototypes, use.head.bottleneck
            heads += use.rows * w * (2 * sum(widths(use.head, vit.dim)) - vit.dim)
            logits += self.kept_logits(use.rows, use.head)
            one = max(one, 3 * self.chunk(use.rows, use.head) + k * b * w)  # and the gradient of prototypes
            normalising = max(normalising, 2 * k * b * FP32)  # the gradient on its way through weight normalisation
        last = self.tokens * 2 * FP32 * vit.dim
        cosines = (
            3 * FP32 * (2 * c.batch) ** 2 if c.objective.weight("contrast") else 0
        )  # of all pairs, and what follows
        learning = {"last norm": last, "heads": heads, "logits": max(logits + one, normalising), "contrast": cosines}
        entered = {
            "gradients of heads": FP32 * self.of_heads() / self.ranks if self.parts == 1 else 0.0,  # else there already
            "one block": again + self.tokens * FP32 * vit.dim + self.kept_tokens * w * inner(vit),
        }
        return lasting | max(learning, entered, key=lambda found: sum(found.values()))

    def of_heads(self) -> int:
        return sum(self.parameters.values()) - self.parameters["backbone"]

    def targets(self) -> float:
        """Of what the teacher said of all parts: its prototypes, and logits where they are kept; and the anchor."""
        found = self.of_teacher()
        if ANCHOR in self.config.objective.needs:
            found += self.parts * FP32 * self.groups[0][0] * self.length(self.wide) * self.config.vit.dim
        return found

    def of_teacher(self) -> float:
        learnt = sum(self.width * head.prototypes * head.bottleneck for head in self.heads)
        return learnt + sum(self.kept_logits(self.parts * use.taught, use.head) for use in self.uses.values())

    def gathered(self) -> dict[str, float]:
        """Of sharded weights, what is whole at a time: a block and the next one, or a head, with its gradient."""
        if self.ranks == 1:
            return {}
        vit = self.config.vit
        heads = [head_parameters(use.head, vit.dim) for use in self.uses.values()]
        return {"gathered": max([3 * self.width * block_parameters(vit), *((self.width + FP32) * n for n in heads)])}

    def teacher(self) -> dict[str, float]:
        """While the teacher answers, at the peak: its prototypes, logits that are kept, a chunk of the others."""
        vit, w = max((*self.teachers, self.config.vit), key=backbone_parameters), self.width
        learnt = sum(w * head.prototypes * head.bottleneck for head in self.heads)
        tokens = self.groups[0][0] * (1 + vit.registers + math.prod(self.grid_of(vit)))
        seeing = {"prototypes": learnt, "one block": tokens * (3 * FP32 * vit.dim + 2 * w * inner(vit))}
        uses = self.uses.values()
        one = max((3 * self.chunk(self.parts * use.taught, use.head) for use in uses), default=0.0)
        directions = max((2 * FP32 * use.head.prototypes * use.head.bottleneck for use in uses), default=0.0)
        asking = {"logits, prototypes": self.of_teacher(), "chunks": max(one, directions)}
        return self.gathered() | max(asking, seeing, key=lambda found: sum(found.values()))
