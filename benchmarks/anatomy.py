"""What a training step of a recipe does at its full size, counted without a GPU, and what a GPU could reach at best.

    python benchmarks/anatomy.py [--recipe vitl16_short] [--images 64] [--ranks 1] [--device h100] [--json] [--record]
    python benchmarks/anatomy.py --quick                   # a small network
    python benchmarks/anatomy.py --recipe distill_vitl14   # its teacher is a ViT-g/14 with the heads of `vitg14`

The step runs on tensors without numbers, by the paths for a GPU, in bf16 (benchmarks/counting.py says how bytes are
counted). Of the second step: bytes that operations move which are no products, those of the loss on prototypes among
them; FLOPs of products; operations; the times that the host waits for the device; the collectives of targets, terms and
verdict, which are as many on any number of ranks, those of Sinkhorn-Knopp among them; the peak of memory. With --ranks
the first of so many is counted, eight to a machine, whose networks are sharded: also the collectives of sharding and
their bytes, each the larger of what it takes and gives. What other ranks send has no numbers either. `bound` is
the number of images a second if products ran at the rate that large ones reach, everything else at the bandwidth that
large copies reach, and neither at the same time: no measurement. `mask_seconds` is processor time of this machine, for
a rank of a step of 2,048 images.

`rival` is the same count of an older commit, where it was taken (benchmarks/anatomy_before.json).
"""

import contextlib
import json
import os
import sys
import time
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from counting import Counter, Counts, pretend_gpu, without_numbers
from measure import argument_parser, finish, result
from step import random_batch
from troodon import recipes
from troodon.dist import Share
from troodon.learn import optim
from troodon.learn.clock import Clock
from troodon.learn.config import PretrainConfig
from troodon.learn.frozen import FrozenNetwork
from troodon.learn.loop import Learner, train
from troodon.learn.losses import Ranks
from troodon.learn.method import Method
from troodon.learn.objective import ANCHOR
from troodon.learn.parallel import empty, mesh_of, shard
from troodon.model.config import ViTConfig
from troodon.text import with_prefix
from troodon.views.batch import Batch
from troodon.views.loader import Loader

BEFORE = Path(__file__).parent / "anatomy_before.json"
LOSS = ("learn/prototypes", "learn/losses", "learn/fused", "learn/kernel")  # files of the loss on prototypes
DEVICES_OF_MACHINE = 8  # of ranks
MASKED_BATCH = 2048  # images of the step for which masks are drawn
TEACHERS = {  # of distillation, where it is not a ViT-g/14
    "distill_demo": "demo",
    "distill_small": "small",
    "distill_demo_dino": "demo_dino",
    "distill_small_dino": "small_dino",
    "distill_features": "vitl14",
}
IMAGES = {"vitl16_short": 64, "vitl14": 32, "vitg14": 16, "distill_vitl14": 64}


@dataclass(frozen=True)
class Device:
    """FLOP/s in dense bf16 and bytes/s: those that large products and copies reach, of those of the data sheet."""

    flops: float
    bandwidth: float
    flops_of_sheet: float
    bandwidth_of_sheet: float


DEVICES = {
    "h100": Device(620e12, 2.9e12, 989e12, 3.35e12),
    "h200": Device(620e12, 4.15e12, 989e12, 4.8e12),  # reached: the shares of an H100's sheet
    "a100": Device(250e12, 1.75e12, 312e12, 2.04e12),
}


def config_of(recipe: str, images: int, ranks: int) -> tuple[PretrainConfig, PretrainConfig | None]:
    """The config of a recipe with so many images on each rank, and its teacher's, if it has one.

    Of mixed sizes of crops, the largest.
    """
    if recipe in recipes.KNOWN["distill"]:
        config, teacher = recipes.distill(recipe), recipes.pretrain(TEACHERS.get(recipe, "vitg14"))
    else:
        config, teacher = recipes.pretrain(recipe, start=lambda: recipes.pretrain("vitl14")), None
    group = config.objective.koleo_group
    objective = replace(config.objective, koleo_group=group if group and images % group == 0 else 0)
    wide, narrow, _ = max(config.crops.sizes())
    crops = replace(config.crops, global_px=wide, local_px=narrow, mixed=())
    return replace(config, batch=images * ranks, objective=objective, crops=crops), teacher


def quick_config() -> PretrainConfig:
    """Small, but with the objective and stochastic depth of a large recipe."""
    config, _ = config_of("vitl14", 4, 1)
    vit = ViTConfig(dim=128, depth=2, heads=2, patch=14, grid=16, mlp="swiglu", drop_path=0.4)
    return replace(config, vit=vit, crops=replace(config.crops, locals=2))


@contextlib.contextmanager
def imagined_ranks(count: int) -> Iterator[None]:
    """Be the first of so many ranks, whose messages have no numbers."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(min(count, DEVICES_OF_MACHINE))):
            mesh_of("cpu", torch.distributed.group.WORLD)  # which asks its ranks for their numbers
            yield
    finally:
        torch.distributed.destroy_process_group()


def count_step(config: PretrainConfig, teacher: PretrainConfig | None, ranks: int = 1) -> tuple[Counts, Tally]:
    """What the second of two steps does on the first of `ranks`, and the collectives that it makes, by kind."""
    with imagined_ranks(ranks):
        return _count_step(config, teacher, ranks)


def _count_step(config: PretrainConfig, teacher: PretrainConfig | None, ranks: int) -> tuple[Counts, Tally]:
    images, collectives = config.batch // ranks, Tally()
    real = random_batch(replace(config, batch=images))
    widths = [] if teacher is None else [teacher.vit.dim]
    networks, frozen = [empty(config, widths) for _ in range(2)], []
    anchor = empty(config).backbone if ANCHOR in config.objective.needs else None

    def counted(kind: str):
        def collective(x: torch.Tensor) -> torch.Tensor:
            collectives[kind] += 1
            return x

        return collective

    def placed(network: Any) -> Any:
        if ranks > 1:
            shard(without_numbers(network), config, torch.bfloat16, "cpu")
        return network if ranks > 1 else without_numbers(network)

    with pretend_gpu() as mode:
        student, ema = map(placed, networks)
        if teacher is not None:
            network = without_numbers(empty(replace(teacher, vit=replace(teacher.vit, drop_path=0.0)), widths))
            for layer in network.backbone.blocks.modules():  # as `build_teacher` does
                if isinstance(layer, torch.nn.Linear):
                    without_numbers(layer, torch.bfloat16)
            frozen = [FrozenNetwork("teacher", network, teacher.vit)]
            student.backbone.mask_token.requires_grad_(False)
        if config.schedules.backbone_frozen >= config.steps:
            student.backbone.requires_grad_(False)
        with Counter(mode) as counter:
            crops = (mode.from_tensor(x) for x in (real.globals_GBCHW, real.locals_VBCHW))
            batch = Batch(*crops, real.masks_NP, share=Share(0, 0, config.batch, range(images)))
            method = Method(
                config.objective, student, ema, teachers=frozen, compute=torch.bfloat16,
                anchor=None if anchor is None else placed(anchor),
                ranks=Ranks(*map(counted, ("sums", "maxima", "gathered rows"))),
            )  # fmt: skip
            counter.remember(*student.parameters(), *ema.parameters(), batch.globals_GBCHW, batch.locals_VBCHW)
            counter.remember(*(parameter for each in frozen for parameter in each.network.parameters()))
            take_two_steps(config, method, batch, lambda: (counter.reset(), collectives.clear()))
    return counter.counts, collectives


def take_two_steps(config: PretrainConfig, method: Method, batch: Batch, after_first) -> None:
    """The last two steps of a run."""
    optimizer = optim.adamw(method.student, config.vit.depth, config.optim)

    def after_step(step: int, *_) -> None:
        if step == config.steps - 2:
            after_first()

    learner = Learner(method, optimizer, config.schedules, config.optim, after_step)
    again = Batch(batch.globals_GBCHW, batch.locals_VBCHW, batch.masks_NP, share=batch.share)  # a teacher remembers one
    train(
        [learner], iter([batch, again]), first_step=config.steps - 2, clock=Clock.of_steps(config.steps), accumulate=1,
        stop_requested=lambda: False,
    )  # fmt: skip


def mask_seconds(config: PretrainConfig, images: int, global_batch: int) -> float:
    """Processor time in which a rank with so many images draws the masks of a step, the best of three."""
    (height, width), _, _ = config.crops.sizes()[0]
    grid = (height // config.vit.patch, width // config.vit.patch)
    loader = Loader(
        SimpleNamespace(source_lengths=(1_000_000,)), config.crops, config.photometric, config.masks, config.vit.patch,
        batch_size=global_batch, seed=0, world_size=max(1, global_batch // images),
    )  # fmt: skip
    times = []
    for batch in range(3):
        start = time.process_time()
        loader.draw_masks(loader.positions(batch), grid)
        times.append(time.process_time() - start)
    return min(times)


def numbers(counts: Counts, collectives: Tally, images: int, device: Device) -> dict[str, tuple[float, str]]:
    """What is counted, by name, with its unit."""
    loss = sum(moved.bytes for place, moved in counts.by_place.items() if place.startswith(LOSS))
    seconds = counts.flops / device.flops + counts.non_product_bytes / device.bandwidth
    sharding = {
        "sharding_collectives": (sum(counts.collectives.values()), "collectives"),
        "sharding_bytes": (counts.collective_bytes, "bytes"),
    }
    return {
        "step_non_product_bytes": (counts.non_product_bytes, "bytes"),
        "loss_bytes": (loss, "bytes"),
        "collectives": (sum(collectives.values()), "collectives"),
        "host_reads": (sum(counts.host_reads.values()), "reads"),
        "pageable_copies": (sum(counts.pageable_copies.values()), "copies"),
        "launches": (counts.launches, "operations"),
        "product_flops": (counts.flops, "FLOP"),
        "peak_memory": (counts.peak_memory, "bytes"),
        "bound": (images / seconds, "images/s"),
    } | (sharding if counts.collectives else {})


def describe(counts: Counts, collectives: Tally, device: Device, name: str) -> None:
    """A page about the step, on standard error."""

    def show(title: str, by: dict, most: int) -> None:
        print(f"\n{title:<40}{'bytes':>10}{'time':>10}{'launches':>10}", file=sys.stderr)
        for key, each in sorted(by.items(), key=lambda item: -item[1].bytes)[:most]:
            ms = 1e3 * each.bytes / device.bandwidth
            print(f"  {key or '(torch)':<38}{with_prefix(each.bytes) + 'B':>10}{ms:>7.1f} ms{each.launches:>10,}",
                  file=sys.stderr)  # fmt: skip

    show("what is no product, by file", counts.by_place, 12)
    show("by operation", counts.by_operation, 16)
    at_peak = 1e3 * counts.flops / device.flops_of_sheet
    print(f"\n{name}: products {with_prefix(counts.flops)}FLOP, {at_peak:.1f} ms at the data sheet's peak; they move "
          f"{with_prefix(counts.product_bytes)}B", file=sys.stderr)  # fmt: skip
    waits = ", ".join(f"{count} {what} in {place}" for (place, what), count in counts.host_reads.items() if count)
    pageable = {place: count for place, count in counts.pageable_copies.items() if count}
    print(
        f"host waits: {waits or 'none'}; pageable copies: {pageable}; collectives: {dict(collectives)}; of sharding: "
        f"{dict(counts.collectives)}, {with_prefix(counts.collective_bytes)}B",
        file=sys.stderr,
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network, 4 images")
    parser.add_argument("--recipe", default="vitl16_short", help="of pretrain or of distill")
    parser.add_argument("--images", type=int, help="of each rank; by default those of docs/performance.md, or 8")
    parser.add_argument(
        "--ranks", type=int, default=1, help="that share a batch so many times as large, and the networks"
    )
    parser.add_argument("--device", choices=[*DEVICES], default="h100", help="whose rates give the bound")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        recipe, images, config, teacher = "quick", 4, quick_config(), None
    else:
        recipe, images = arguments.recipe, arguments.images or IMAGES.get(arguments.recipe, 8)
        config, teacher = config_of(recipe, images, arguments.ranks)
    device, before = DEVICES[arguments.device], json.loads(BEFORE.read_text())
    counts, collectives = count_step(config, teacher, arguments.ranks)
    found = numbers(counts, collectives, images, device)
    if config.masks.share:
        found["mask_seconds"] = (mask_seconds(config, images, MASKED_BATCH), "s")
    rivals = dict(before["steps"].get(f"{recipe} {images}", {}))
    if rivals:
        rivals["bound"] = images / (
            rivals["product_flops"] / device.flops + rivals["step_non_product_bytes"] / device.bandwidth
        )
    settings = {"recipe": recipe, "images": images, "ranks": arguments.ranks, "device_of_bound": arguments.device,
                "before": before["commit"] if rivals else None}  # fmt: skip
    rows = [
        result(name, value, rivals.get(name), unit, more_is_better=name == "bound", **settings)
        for name, (value, unit) in found.items()
    ]
    if not arguments.json:
        describe(counts, collectives, device, recipe)
    finish(rows, arguments)


if __name__ == "__main__":
    main()
