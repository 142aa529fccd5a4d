"""What a run will take, told before its first step: images, steps, tokens, parameters, memory, time."""

import time
from dataclasses import asdict, dataclass

import torch

from troodon.learn.config import PretrainConfig
from troodon.learn.parallel import empty
from troodon.model.vit import flops

STATE_BYTES = 4 * 5  # per parameter of the student: itself, its gradient, two moments, its average, in fp32
SAVED_PER_TOKEN = 20  # numbers per token, channel and block that the backward pass needs; measured
# Of the speed of one large product, what a whole step reaches, its images included: on a processor as measured with the
# small recipes, on an accelerator an estimate.
SHARE_OF_PEAK = {"cpu": 0.1, "cuda": 0.35}


@dataclass(frozen=True)
class Plan:
    images: int
    steps: int
    batch: int
    passes: float  # over the images
    tokens_per_step: int
    parameters: int  # of the backbone
    head_parameters: int
    flops_per_step: float
    state_bytes: int  # per rank
    activation_bytes: int  # per rank, estimated
    seconds: float  # estimated
    device: str
    compute: str
    ranks: int

    def render(self) -> str:
        """One screen for people."""
        return "\n".join(
            f"  {name:<11} {value}"
            for name, value in {
                "images": f"{self.images:,}, seen {self.passes:,.1f} times",
                "steps": f"{self.steps:,} of {self.batch} images",
                "tokens": f"{self.tokens_per_step:,} a step through the student",
                "parameters": f"{people(self.parameters)} in the backbone, {people(self.head_parameters)} in the heads",
                "memory": f"{people(self.state_bytes)}B of state + about {people(self.activation_bytes)}B of "
                "activations per rank",
                "time": f"about {duration(self.seconds)} ({people(self.flops_per_step)}FLOP a step)",
                "on": f"{self.ranks} x {self.device}, {self.compute}",
            }.items()
        )


def plan(config: PretrainConfig, images: int, device: torch.device, compute: torch.dtype, ranks: int) -> Plan:
    """The plan of a run; allocates nothing but one small product, to learn how fast this device is."""
    shared = config.objective.heads == "shared"
    branch = empty(config)
    backbone, whole = (sum(p.numel() for p in part.parameters()) for part in (branch.backbone, branch))

    # Of crops of several sizes: the mean over steps, but as much memory as the largest takes.
    patch, views = config.vit.patch, (2, config.crops.locals)
    tokens = largest = forward_wide = student = patches = 0.0
    for wide, narrow, share in config.crops.sizes():
        grids = [(height // patch, width // patch) for height, width in (wide, narrow)]
        of_image = sum(n * (1 + config.vit.registers + h * w) for n, (h, w) in zip(views, grids))
        tokens, largest = tokens + share * config.batch * of_image, max(largest, config.batch * of_image)
        forward = [flops(config.vit, grid) for grid in grids]
        forward_wide += share * forward[0]
        student += share * (1 - config.vit.drop_path) * sum(n * f for n, f in zip(views, forward))
        patches += share * grids[0][0] * grids[0][1]
    rows = {
        "dino": 2 + config.crops.locals,
        "ibot": 2 * config.masks.share * sum(config.masks.ratio) / 2 * patches,
    }
    head_flops = student_logits = 0.0
    for name, head in (("dino", config.dino_head), ("ibot", config.dino_head if shared else config.ibot_head)):
        inner = config.vit.dim * head.hidden + (head.layers - 2) * head.hidden**2 + head.hidden * head.bottleneck
        taught = 2 if name == "dino" else rows["ibot"]
        head_flops += 2 * (inner + head.bottleneck * head.prototypes) * (3 * rows[name] + taught)
        student_logits += (rows[name] + taught) * head.prototypes
    per_step = config.batch * (3 * student + 2 * forward_wide + head_flops)

    width = 2 if compute == torch.bfloat16 else 4
    saved = largest * config.vit.dim * config.vit.depth * SAVED_PER_TOKEN * width * (1 - config.vit.drop_path)
    saved += 3 * 4 * student_logits * config.batch
    return Plan(
        images=images,
        steps=config.steps,
        batch=config.batch,
        passes=config.steps * config.batch / max(images, 1),
        tokens_per_step=round(tokens),
        parameters=backbone,
        head_parameters=whole - backbone,
        flops_per_step=per_step,
        state_bytes=whole * STATE_BYTES // ranks,
        activation_bytes=int(saved / ranks),
        seconds=config.steps * per_step / ranks / (SHARE_OF_PEAK[device.type] * product_rate(device, compute)),
        device=device.type,
        compute=str(compute).removeprefix("torch."),
        ranks=ranks,
    )


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one matrix product that fits the caches, the best of a few."""
    side = 4096 if device.type == "cuda" else 768
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def people(number: float) -> str:
    """1,234 -> '1.2k': a number with a prefix, for people."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000 or prefix == "P":
            break
        number /= 1000
    return f"{number:.3g}{' ' if not prefix else ''}{prefix}"


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def to_dict(plan: Plan) -> dict:
    return asdict(plan)
