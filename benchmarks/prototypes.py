"""The loss on prototypes, streamed, against its plain form with full matrices: time and peak memory.

    python benchmarks/prototypes.py [--quick] [--images 64] [--prototypes 65536 131072] [--bf16] [--rounds 3] [--record]

Both sides take the bottleneck rows of B images (class tokens of 2 global and 8 local crops, and as many patches as are
masked on average), compute targets by three rounds of Sinkhorn-Knopp and both losses, and run the backward pass to rows
and prototypes. `rival` is learn/losses.py, which is the specification. Memory is counted above the inputs.

The plain form at B = 64 and K = 131,072 takes about 10 GB: with `--plain-images N` it processes N of the images. Its
time is then multiplied, and its memory extrapolated by the line through N and N / 2 images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import argument_parser, device, finish, median_seconds, peak_memory, result
from troodon.learn import losses, prototypes
from troodon.learn.losses import ALONE
from troodon.model.head import HeadOutput

VIEWS, LOCALS, PATCHES, MASKED = 2, 8, 256, 0.15  # of the released recipes: half of the crops, 30 % of each on average
TEACHER, STUDENT = 0.07, 0.1  # temperatures
DINO, IBOT = 384, 256  # channels of the bottlenecks


@dataclass
class Rows:
    """The head outputs of student and teacher in one step: for each term, rows and prototypes."""

    images: int
    student: dict[str, HeadOutput]
    teacher: dict[str, HeadOutput]

    @staticmethod
    def random(images: int, count: int, dtype: torch.dtype) -> "Rows":
        torch.manual_seed(0)
        masked = round(VIEWS * images * PATCHES * MASKED)
        sizes = {"dino": ((VIEWS + LOCALS) * images, VIEWS * images, DINO), "ibot": (masked, masked, IBOT)}

        def unit(rows: int, channels: int) -> Tensor:
            return F.normalize(torch.randn(rows, channels, device=device()), dim=-1).to(dtype)

        student, teacher = {}, {}
        for name, (student_rows, teacher_rows, channels) in sizes.items():
            inputs = unit(student_rows, channels), unit(count, channels)
            student[name] = HeadOutput(*(x.requires_grad_() for x in inputs))
            teacher[name] = HeadOutput(unit(teacher_rows, channels), unit(count, channels))
        return Rows(images, student, teacher)

    def plain(self) -> Tensor:
        targets = {name: losses.sinkhorn(output.logits(), TEACHER, ALONE) for name, output in self.teacher.items()}
        logits_VBK = self.student["dino"].logits().unflatten(0, (-1, self.images))
        targets_GBK = targets["dino"].unflatten(0, (-1, self.images))
        dino_VGB = losses.cross_entropies(logits_VBK, targets_GBK, STUDENT)
        ibot_VGB = losses.cross_entropies(self.student["ibot"].logits()[None], targets["ibot"][None], STUDENT)
        return self.loss(dino_VGB, ibot_VGB)

    def streamed(self) -> Tensor:
        targets = dict(zip(self.teacher, prototypes.sinkhorn([*self.teacher.values()], TEACHER, ALONE), strict=True))
        cross_entropies = []
        for name, (rows_MD, prototypes_KD) in self.student.items():
            rows_VBD = rows_MD.unflatten(0, (-1, self.images)) if name == "dino" else rows_MD[None]
            cross_entropies.append(prototypes.cross_entropies(rows_VBD, prototypes_KD, targets[name], STUDENT))
        return self.loss(*cross_entropies)

    def loss(self, dino_VGB: Tensor, ibot_VGB: Tensor) -> Tensor:
        """The loss, after a backward pass; the gradients are freed, as at the end of a step."""
        loss = losses.dino(dino_VGB, same_views=False) + ibot_VGB.mean()
        loss.backward()
        for head_output in self.student.values():
            for tensor in head_output:
                tensor.grad = None
        return loss.detach()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="10 images, 131,072 prototypes, one round")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--plain-images", type=int, default=0, help="images of the plain form; 0: as many as ours")
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65_536, 131_072])
    parser.add_argument("--bf16", action="store_true", help="products in bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", choices=["plain"], default="plain")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.prototypes, arguments.rounds = 10, [131_072], 1
    images, counts = arguments.images, arguments.prototypes
    fewer = min(images, arguments.plain_images or images)
    dtype, results = torch.bfloat16 if arguments.bf16 else torch.float32, []
    for count in counts:
        ours, rival = Rows.random(images, count, dtype), Rows.random(fewer, count, dtype)
        difference = abs(rival.streamed() / rival.plain() - 1).item()
        settings = {
            "images": images, "prototypes": count, "dtype": str(dtype)[6:], "against": arguments.against,
            "plain_images": fewer, "difference": difference,
        }  # fmt: skip
        peak, plain_peak = peak_memory(ours.streamed), peak_memory(rival.plain)
        if fewer < images:
            half_peak = peak_memory(Rows.random(fewer // 2, count, dtype).plain)
            plain_peak += (plain_peak - half_peak) / (fewer - fewer // 2) * (images - fewer)
        results.append(result("prototype_peak_memory", peak, plain_peak, "bytes", **settings))
        seconds, plain_seconds = median_seconds([ours.streamed, rival.plain], arguments.rounds)
        plain_seconds *= images / fewer
        results.append(result("prototype_time", seconds, plain_seconds, "s", **settings))
    finish(results, arguments)


if __name__ == "__main__":
    main()
