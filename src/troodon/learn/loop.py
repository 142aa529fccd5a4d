"""The training loop. Everything a step does is on this page, in the order it is done."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from troodon.learn import optim
from troodon.learn.config import OptimConfig
from troodon.learn.method import Method
from troodon.learn.schedules import Knobs, Schedules
from troodon.views.batch import Batch


class NotFinite(FloatingPointError):
    """A loss or a gradient of some rank is not finite; on every rank, and before anything was changed.

    `here` are the terms of this rank.
    """

    def __init__(self, step: int, here: dict[str, float]):
        said = ", ".join(f"{name} {value:.4g}" for name, value in here.items())
        super().__init__(f"step {step}: a loss or a gradient is not finite ({said})")
        self.step, self.here = step, here


@dataclass(frozen=True)
class Learner:
    """One network on its way: what it learns, by which rules, and who sees each step's terms and gradient norms."""

    method: Method
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    config: OptimConfig
    after_step: Callable[[int, Batch, dict[str, Tensor]], None]


def train(
    learners: Sequence[Learner],
    batches: Iterator[Batch],
    *,
    first_step: int,
    steps: int,
    accumulate: int,
    seed: int,
    rank: int,
    asked_to_stop: Callable[[], bool],
) -> int:
    """Take steps `first_step` to `steps`, or until some rank is asked to stop; returns how many have been done.

    All learners see the same batches, and each learns as if it were alone. Raises NotFinite.
    """
    for step in range(first_step, steps):
        batch = next(batches)
        parts, knobs = batch.parts(accumulate), [learner.schedules.at(step, steps) for learner in learners]
        terms = []
        for learner, knobs_now in zip(learners, knobs, strict=True):
            torch.manual_seed(hash((seed, step, rank)))  # stochastic depth: the only randomness inside a step
            terms.append(_gradients(learner, parts, knobs_now))

        broken = ~torch.stack([value for found in terms for value in found.values()]).isfinite().all()
        stop = broken.new_tensor(asked_to_stop())
        verdict = learners[0].method.ranks.total(torch.stack([broken, stop]).float())
        read = reading(verdict)
        for learner in learners:  # which change nothing where the step is broken
            setattr(learner.optimizer, "found_inf", verdict[0].clamp(max=1))  # noqa: B010
            learner.optimizer.step()
        broken, stop = read()
        if broken:
            for learner in learners:
                learner.optimizer.zero_grad()
            raise NotFinite(step, {name: value.item() for found in terms for name, value in found.items()})
        for learner, knobs_now, found in zip(learners, knobs, terms, strict=True):
            learner.optimizer.zero_grad()
            learner.method.after_step(knobs_now)
            learner.after_step(step, batch, found)
        if stop:
            return step + 1
    return steps


def reading(x: Tensor) -> Callable[[], list]:
    """What gives the numbers of a tensor as it is now. On an accelerator that waits for no work launched since."""
    here = x.to("cpu", non_blocking=True)
    if not x.is_cuda:
        return here.tolist
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list:
        copied.synchronize()
        return here.tolist()

    return wait


def _gradients(learner: Learner, parts: list[Batch], knobs: Knobs) -> dict[str, Tensor]:
    """Leave the gradients of a step, clipped, with the student; its terms and the norms of gradients."""
    method, seen = learner.method, []
    optim.apply(learner.optimizer, knobs)
    for part, targets in zip(parts, method.targets(parts, knobs), strict=True):
        terms = method.losses(part, targets, knobs)
        (torch.stack([*terms.values()]).sum() / len(parts)).backward()
        seen.append({name: term.detach() for name, term in terms.items()})
    terms = {name: torch.stack([terms[name] for terms in seen]).mean() for name in seen[0]}
    return terms | optim.clip(method.student, learner.config)
