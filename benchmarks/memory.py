"""Peak memory of tensors in a step, by how much of it is recomputed, beside the memory that the plan predicts.

    python benchmarks/memory.py [--quick] [--size small] [--images 8] [--recompute none selective full] [--record]

Weights, moments and EMA are included. `rival` is the same network written the usual way (benchmarks/usual.py), which
recomputes nothing; `plan` in the settings is the prediction of `--dry-run`, and `seconds` the time of one step.
"""

from dataclasses import replace

from measure import argument_parser, device, finish, median_seconds, peak_memory, result
from step import SIZES, Step, build_config, lasting_bytes
from troodon import dist
from troodon.learn.config import ParallelConfig
from troodon.learn.method import Method
from troodon.learn.plan import plan, total
from usual import UsualMethod


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="2 images")
    parser.add_argument("--size", choices=[*SIZES], default="small")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--compute", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"])
    arguments = parser.parse_args()
    images, compute = 2 if arguments.quick else arguments.images, dist.compute_dtype(arguments.compute, device())
    config = build_config("vitl16_short", arguments.size, images, None, False)

    def measured(step: Step) -> tuple[float, float]:
        """Bytes at the peak, and seconds of a step."""
        (seconds,) = median_seconds([step], 1)
        return lasting_bytes(step) + peak_memory(step), seconds

    usual_peak, usual_seconds = measured(Step(config, UsualMethod, compute))
    results = []
    for recompute in arguments.recompute:
        ours = replace(config, parallel=ParallelConfig(recompute=recompute))
        peak, seconds = measured(Step(ours, Method, compute))
        planned = total(plan(ours, None, device().type, compute.itemsize, 1).memory)
        settings = {"size": arguments.size, "images": images, "compute": str(compute)[6:], "plan": planned}
        results.append(result(f"step_peak_memory_{recompute}", peak, usual_peak, "bytes", seconds=seconds,
                              usual_seconds=usual_seconds, **settings))  # fmt: skip
    finish(results, arguments)


if __name__ == "__main__":
    main()
