"""The loss on prototypes, streamed, against its plain form with all matrices: time and peak memory.

    python benchmarks/prototypes.py [--quick] [--images 64] [--prototypes 65536 131072] [--bf16] [--rounds 3]

Both sides take the bottleneck rows that B images give (class tokens of 2 global and 8 local crops, and the patches
that are masked on average), make targets by three rounds of Sinkhorn-Knopp and both losses, and run the backward pass
down to rows and prototypes. `rival` is learn/losses.py, which is the specification. Memory is counted above the inputs.

The plain form at B = 64 and K = 131,072 takes about 10 GB: `--plain-images N` gives it N of the images, and
multiplies its time; its memory is then that of the line through N and N / 2 images.
"""

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import device, finish, line, peak_memory, seconds
from troodon.learn import losses, prototypes
from troodon.learn.losses import ALONE
from troodon.model.head import Answer

VIEWS, LOCALS, PATCHES, MASKED = 2, 8, 256, 0.15  # of the released recipes: half of the crops, 30 % of each on average
TEACHER, STUDENT = 0.07, 0.1  # temperatures
DINO, IBOT = 384, 256  # channels of the bottlenecks


@dataclass
class Rows:
    """What the heads of student and teacher say of one step: for each term, rows and prototypes of both."""

    images: int
    student: dict[str, Answer]
    teacher: dict[str, Answer]

    @staticmethod
    def of(images: int, count: int, dtype: torch.dtype) -> "Rows":
        torch.manual_seed(0)
        masked = round(VIEWS * images * PATCHES * MASKED)
        sizes = {"dino": ((VIEWS + LOCALS) * images, VIEWS * images, DINO), "ibot": (masked, masked, IBOT)}

        def unit(rows: int, channels: int) -> Tensor:
            return F.normalize(torch.randn(rows, channels, device=device()), dim=-1).to(dtype)

        student, teacher = {}, {}
        for name, (seen, taught, channels) in sizes.items():
            student[name] = Answer(unit(seen, channels).requires_grad_(), unit(count, channels).requires_grad_())
            teacher[name] = Answer(unit(taught, channels), unit(count, channels))
        return Rows(images, student, teacher)

    def plain(self) -> Tensor:
        targets = {n: losses.sinkhorn(a.logits(), TEACHER, ALONE) for n, a in self.teacher.items()}
        logits_VBK = self.student["dino"].logits().unflatten(0, (-1, self.images))
        targets_GBK = targets["dino"].unflatten(0, (-1, self.images))
        dino_VGB = losses.cross_entropies(logits_VBK, targets_GBK, STUDENT)
        ibot_VGB = losses.cross_entropies(self.student["ibot"].logits()[None], targets["ibot"][None], STUDENT)
        return self.loss(dino_VGB, ibot_VGB)

    def streamed(self) -> Tensor:
        targets = {n: prototypes.sinkhorn(a, TEACHER, ALONE) for n, a in self.teacher.items()}
        found = []
        for name, (rows_MD, prototypes_KD) in self.student.items():
            rows_VBD = rows_MD.unflatten(0, (-1, self.images)) if name == "dino" else rows_MD[None]
            found.append(prototypes.cross_entropies(rows_VBD, prototypes_KD, targets[name], STUDENT))
        return self.loss(*found)

    def loss(self, dino_VGB: Tensor, ibot_VGB: Tensor) -> Tensor:
        """Backward as well; the gradients are dropped, as by a step that is over."""
        loss = losses.dino(dino_VGB, same_views=False) + ibot_VGB.mean()
        loss.backward()
        for answer in self.student.values():
            for tensor in answer:
                tensor.grad = None
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 images, 131,072 prototypes, one round")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--plain-images", type=int, default=0, help="images of the plain form; 0 is as many as ours")
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65_536, 131_072])
    parser.add_argument("--bf16", action="store_true", help="products in bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", choices=["plain"], default="plain")
    asked = parser.parse_args()
    if asked.quick:
        asked.images, asked.prototypes, asked.rounds = 10, [131_072], 1
    images, counts = asked.images, asked.prototypes
    fewer = min(images, asked.plain_images or images)
    dtype, lines = torch.bfloat16 if asked.bf16 else torch.float32, []
    for count in counts:
        ours, rival = Rows.of(images, count, dtype), Rows.of(fewer, count, dtype)
        difference = abs(rival.streamed() / rival.plain() - 1).item()
        settings = {
            "images": images, "prototypes": count, "dtype": str(dtype)[6:], "against": asked.against,
            "plain_images": fewer, "difference": difference,
        }  # fmt: skip
        peak, plain = peak_memory(ours.streamed), peak_memory(rival.plain)
        if fewer < images:
            half = peak_memory(Rows.of(fewer // 2, count, dtype).plain)
            plain += (plain - half) / (fewer - fewer // 2) * (images - fewer)
        lines.append(line("prototype_peak_memory", peak, plain, "bytes", **settings))
        took, plain = seconds([ours.streamed, rival.plain], asked.rounds)
        lines.append(line("prototype_time", took, plain * images / fewer, "s", **settings))
    finish(lines)


if __name__ == "__main__":
    main()
