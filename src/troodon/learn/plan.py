"""The plan of a run, before its first step: images, parameters, FLOPs, memory, time. No torch here, so a plan of any
network takes no time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from troodon.learn.config import PretrainConfig, constant_shapes
from troodon.learn.cost import Cost, Grid, total
from troodon.model.config import ViTConfig, depth_group
from troodon.text import duration, with_prefix

if TYPE_CHECKING:
    import torch

# The share of the speed of one large product that a whole step reaches, loading of images included: measured with the
# small recipes on a CPU, an estimate on a GPU.
SHARE_OF_PEAK = {"cpu": 0.1, "cuda": 0.35}


@dataclass(frozen=True)
class Plan:
    """The plan of a run. With crops of several sizes: means over steps, and the memory of the largest."""

    config: PretrainConfig
    images: int | None  # in the data; None if unknown
    device: str
    width: int  # bytes of a number in products: 2 is bf16
    ranks: int
    parameters: Mapping[str, int]  # of the student, by part
    tokens: float  # a step, through the student
    flops: Mapping[str, float]  # a step, over all ranks
    state: Mapping[str, float]  # bytes of each rank after a step
    phases: Mapping[str, Mapping[str, float]]  # bytes of each rank in each phase of a step, besides lasting state
    images_per_second: float | None = None  # over all ranks; None if unknown

    @property
    def busiest(self) -> str:
        """The phase with the most memory."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of each rank at the peak of a step, by part. Gradients take the place of what is kept for them."""
        return {name: n for name, n in self.state.items() if name != "gradients"} | dict(self.phases[self.busiest])

    @property
    def steps(self) -> int | None:
        """Of the run; None where it has a time and its speed is unknown."""
        c = self.config
        if not c.minutes:
            return c.steps
        return round(60 * c.minutes * self.images_per_second / c.batch) if self.images_per_second else None

    @property
    def seconds(self) -> float | None:
        if self.config.minutes:
            return 60 * self.config.minutes
        return self.config.steps * self.config.batch / self.images_per_second if self.images_per_second else None

    def render(self) -> str:
        """The plan as text, one screen."""
        c, seen, rate = self.config, (self.steps or 0) * self.config.batch, self.images_per_second
        visits = f", each of {self.images:,} {seen / self.images:,.1f} times" if self.images else ""
        each = " on each" if self.ranks > 1 else ""
        lines = [
            ("on", f"{self.ranks} x {self.device}, {'bf16' if self.width == 2 else 'fp32'}"),
            (
                "steps",
                f"{self.steps:,} of {c.batch:,} images: {with_prefix(seen).strip()} in all{visits}"
                if self.steps is not None
                else f"of {c.batch:,} images, as many as {c.minutes:g} minutes hold",
            ),
            ("tokens", f"{with_prefix(self.tokens)} a step through the student"),
            ("parameters", summed(self.parameters)),
            ("products", f"{summed(self.flops, 'FLOP')} a step"),
            ("state", f"{summed(self.state, 'B')}{each}"),
            ("memory", f"about {with_prefix(total(self.memory))}B of tensors{each} {self.busiest}:"),
            *((f"  {name}", f"{with_prefix(size)}B") for name, size in self.memory.items() if size),
        ]
        peak = total(self.memory) - total(self.phases[self.busiest])
        others = [(name, parts) for name, parts in self.phases.items() if name != self.busiest]
        lines += [("", f"{with_prefix(peak + total(parts))}B {name}") for name, parts in others]
        lines += [
            ("time", "give --images-per-second for the time" if rate is None or self.seconds is None
             else f"about {duration(self.seconds)} at {rate:,.4g} images/s")
        ]  # fmt: skip
        return "\n".join(f"  {name:<20} {value}" for name, value in lines)


def plan(
    config: PretrainConfig,
    images: int | None,
    device: str,
    width: int,
    ranks: int,
    images_per_second: float | None = None,
    teachers: Sequence[ViTConfig] = (),
) -> Plan:
    """The plan of a run on `ranks` devices ("cpu" or "cuda"), whose products have numbers of `width` bytes.

    `teachers` are frozen; without any, the EMA teaches.
    """
    costs = [
        (Cost(config, wide, narrow, device, width, ranks, tuple(teachers)), share)
        for wide, narrow, share in grids(config)
    ]
    largest = max((cost for cost, _ in costs), key=lambda cost: total(cost.student()))
    steps = [(cost.flops(), share) for cost, share in costs]
    state = largest.state()
    gradients = {"gradients": state["gradients"]}
    return Plan(
        config, images, device, width, ranks,
        parameters=largest.parameters,
        tokens=sum(share * cost.tokens for cost, share in costs) * ranks * config.parallel.accumulate,
        flops={name: sum(share * flops[name] for flops, share in steps) for name in steps[0][0]},
        state=state,
        phases={
            "while the student learns": (gradients if config.parallel.accumulate > 1 else {}) | largest.student(),
            **({"while the teacher runs": largest.teacher()} if "teacher" in steps[0][0] else {}),
            "while the optimiser works": gradients,
        },
        images_per_second=images_per_second,
    )  # fmt: skip


def shapes_change(config: PretrainConfig, ranks: int) -> str | None:
    """Why compiled blocks help little, if stochastic depth keeps another number of crops at each step; else None."""
    images, group = config.batch // ranks // config.parallel.accumulate, depth_group(config.batch)
    if config.parallel.compile != "always" or constant_shapes(config, ranks):
        return None
    return (
        f"parallel.compile helps little: with vit.drop_path, blocks have one shape only where whole groups of {group} "
        f"images go through them at once, and here {images} do"
    )


def timed(planned: Plan, device: "torch.device", dtype: "torch.dtype") -> Plan:
    """The plan with the time it takes if all ranks have a device like this one. Ranks share the processors of a CPU."""
    devices = planned.ranks if device.type == "cuda" else 1
    rate = devices * SHARE_OF_PEAK[device.type] * product_rate(device, dtype)
    return replace(planned, images_per_second=rate * planned.config.batch / total(planned.flops))


def product_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s of one matrix product that fits the caches, the best of six."""
    import torch

    side = 4096 if device.type == "cuda" else 768
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def grids(config: PretrainConfig) -> list[tuple[Grid, Grid, float]]:
    """Grids of patches of global and of local crops, and the share of the steps that have these."""
    patch = config.vit.patch
    return [
        ((wide[0] // patch, wide[1] // patch), (narrow[0] // patch, narrow[1] // patch), share)
        for wide, narrow, share in config.crops.sizes()
    ]


def summed(parts: Mapping[str, float], unit: str = "") -> str:
    """{"a": 1000, "b": 200} -> '1.2k: a 1k, b 200'."""
    each = ", ".join(f"{name} {with_prefix(n)}{unit}" for name, n in parts.items())
    return f"{with_prefix(total(parts))}{unit}: {each}"
