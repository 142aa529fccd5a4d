"""The training loop. Everything a step does is on this page, in the order it is done."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from troodon.data.batch import Batch
from troodon.learn import optim
from troodon.learn.method import Method
from troodon.learn.schedules import Schedules


def train(
    method: Method,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    schedules: Schedules,
    *,
    first_step: int,
    steps: int,
    clip: float,
    seed: int,
    rank: int,
    after_step: Callable[[int, dict[str, Tensor]], bool],
) -> None:
    """Take steps `first_step` to `steps`; `after_step` sees each one's terms, and may ask to stop by True.

    Raises FloatingPointError, on every rank and before anything is changed, when a loss or a gradient of any
    rank is not finite.
    """
    for step in range(first_step, steps):
        torch.manual_seed(hash((seed, step, rank)))  # stochastic depth: the only randomness inside a step
        batch = next(batches)
        knobs = schedules.at(step, steps)
        optim.apply(optimizer, knobs)

        terms = method.losses(batch, knobs)
        torch.stack([*terms.values()]).sum().backward()
        norm = optim.clip(method.student, clip)
        terms = {name: term.detach() for name, term in terms.items()} | {"grad_norm": norm}
        broken = ~torch.stack([*terms.values()]).isfinite().all()
        if method.ranks.total(broken.float()).item():
            said = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise FloatingPointError(f"step {step}: the loss or its gradient is not finite ({said})")

        optimizer.step()
        optimizer.zero_grad()
        method.after_step(knobs)
        if after_step(step, terms):
            return
