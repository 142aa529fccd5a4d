"""Memory of tensors at the peak of a step, by how much of it is computed again, beside what a plan says of it.

    python benchmarks/memory.py [--quick] [--size small] [--images 8] [--recompute none selective full]

Weights, moments and average included. `rival` is the same network written the usual way (benchmarks/usual.py), which
computes nothing again; `plan` in the settings is what `--dry-run` says, and `seconds` what one step took.
"""

import argparse
from dataclasses import replace

from measure import device, finish, line, peak_memory, seconds
from step import SIZES, Step, asked_for, state
from troodon import dist
from troodon.learn.config import ParallelConfig
from troodon.learn.method import Method
from troodon.learn.plan import plan, total
from usual import UsualMethod


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 images")
    parser.add_argument("--size", choices=[*SIZES], default="small")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--compute", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"])
    asked = parser.parse_args()
    images, compute = 2 if asked.quick else asked.images, dist.compute_dtype(asked.compute, device())
    config = asked_for("vitl16_short", asked.size, images, None, False)

    def measured(step: Step) -> tuple[float, float]:
        (took,) = seconds([step], 1)
        lasting = sum(t.numel() * t.element_size() for t in state(step))
        return lasting + peak_memory(step), took

    usual, of_usual = measured(Step(config, UsualMethod, compute))
    lines = []
    for recompute in asked.recompute:
        ours = replace(config, parallel=ParallelConfig(recompute=recompute))
        peak, took = measured(Step(ours, Method, compute))
        told = total(plan(ours, None, device().type, compute.itemsize, 1).memory)
        settings = {"size": asked.size, "images": images, "compute": str(compute)[6:], "plan": told}
        lines.append(line(f"step_peak_memory_{recompute}", peak, usual, "bytes", seconds=took, usual_seconds=of_usual,
                          **settings))  # fmt: skip
    finish(lines)


if __name__ == "__main__":
    main()
