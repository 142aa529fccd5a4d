"""The training loop. Everything a step does is on this page, in the order it is done."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from troodon.data.batch import Batch
from troodon.learn import optim
from troodon.learn.config import OptimConfig
from troodon.learn.method import Method
from troodon.learn.schedules import Schedules


class NotFinite(FloatingPointError):
    """A loss or a gradient of some rank is not finite; on every rank, and before anything was changed.

    `here` are the terms of this rank.
    """

    def __init__(self, step: int, here: dict[str, float]):
        said = ", ".join(f"{name} {value:.4g}" for name, value in here.items())
        super().__init__(f"step {step}: a loss or a gradient is not finite ({said})")
        self.step, self.here = step, here


def train(
    method: Method,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    schedules: Schedules,
    config: OptimConfig,
    *,
    first_step: int,
    steps: int,
    accumulate: int,
    seed: int,
    rank: int,
    asked_to_stop: Callable[[], bool],
    after_step: Callable[[int, Batch, dict[str, Tensor]], None],
) -> int:
    """Take steps `first_step` to `steps`, or until some rank is asked to stop; returns how many have been done.

    `after_step` sees each step's terms and gradient norms. Raises NotFinite.
    """
    for step in range(first_step, steps):
        torch.manual_seed(hash((seed, step, rank)))  # stochastic depth: the only randomness inside a step
        batch = next(batches)
        knobs = schedules.at(step, steps)
        optim.apply(optimizer, knobs)

        parts, seen = batch.parts(accumulate), []
        for part, targets in zip(parts, method.targets(parts, knobs), strict=True):
            terms = method.losses(part, targets, knobs)
            (torch.stack([*terms.values()]).sum() / accumulate).backward()
            seen.append({name: term.detach() for name, term in terms.items()})
        terms = {name: torch.stack([terms[name] for terms in seen]).mean() for name in seen[0]}
        terms |= optim.clip(method.student, config)

        broken = ~torch.stack([*terms.values()]).isfinite().all()
        stop = broken.new_tensor(asked_to_stop())
        broken, stop = method.ranks.total(torch.stack([broken, stop]).float()).tolist()
        if broken:
            optimizer.zero_grad()
            raise NotFinite(step, {name: value.item() for name, value in terms.items()})
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(knobs)
        after_step(step, batch, terms)
        if stop:
            return step + 1
    return steps
