"""The training loop. This page has everything a step does, in order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from troodon.learn import optim
from troodon.learn.clock import Clock
from troodon.learn.config import OptimConfig
from troodon.learn.method import Method
from troodon.learn.parallel import reduce_between_machines
from troodon.learn.schedules import ScheduledValues, Schedules
from troodon.views.batch import Batch


class NotFinite(FloatingPointError):
    """A loss or a gradient of some rank is not finite. Every rank raises it, before anything has changed.

    `terms` are those of this rank.
    """

    def __init__(self, step: int, terms: dict[str, float]):
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        super().__init__(f"step {step}: a loss or a gradient is not finite ({values})")
        self.step, self.terms = step, terms


@dataclass(frozen=True)
class Learner:
    """One network in training. `after_step` gets the step, the parts of its batch, and the terms and gradient norms.

    They are the parts that the step saw, so that a frozen teacher does not look at them again."""

    method: Method
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    config: OptimConfig
    after_step: Callable[[int, list[Batch], dict[str, Tensor]], None]


def train(
    learners: Sequence[Learner],
    batches: Iterator[Batch],
    *,
    first_step: int,
    clock: Clock,
    accumulate: int,
    stop_requested: Callable[[], bool],
) -> int:
    """Take steps from `first_step` to the end by `clock`, or to a rank's request to stop; returns how many are done.

    All learners see the same batches, and each learns as if it were alone. Raises NotFinite.
    """
    step = first_step
    while step < clock.pace.end:
        batch = next(batches)
        parts, scheduled = batch.chunk(accumulate), [clock.values(learner.schedules, step) for learner in learners]
        terms = []
        for learner, values in zip(learners, scheduled, strict=True):
            terms.append(_backward(learner, parts, values))

        verdict = learners[0].method.ranks.total(broken_and_stop(terms, stop_requested()))
        read_verdict = async_read(verdict)
        for learner in learners:  # with `found_inf` the optimiser changes nothing in a broken step
            setattr(learner.optimizer, "found_inf", verdict[0].clamp(max=1))  # noqa: B010
            learner.optimizer.step()
        broken, stop = read_verdict()
        if broken:
            for learner in learners:
                learner.optimizer.zero_grad()
            raise NotFinite(step, {name: term.item() for of_learner in terms for name, term in of_learner.items()})
        for learner, values, of_learner in zip(learners, scheduled, terms, strict=True):
            learner.optimizer.zero_grad()
            learner.method.after_step(values)
            learner.after_step(step, parts, of_learner)
        step += 1
        clock.tick(step, batch.globals_GBCHW.shape[-2:])
        if stop:
            break
    return step


def broken_and_stop(terms: Sequence[dict[str, Tensor]], stop: bool) -> Tensor:
    """(2,): 1 if some term is not finite, else 0; and 1 for a request to stop, else 0."""
    finite = torch.stack([term for of_learner in terms for term in of_learner.values()]).isfinite().all().float()
    return torch.stack([1 - finite, torch.full_like(finite, float(stop))])  # it is filled in place, so nothing waits


def async_read(x: Tensor) -> Callable[[], list]:
    """A function that returns the numbers of a tensor as it is now. On a GPU it waits for no work launched later."""
    copy = x.to("cpu", non_blocking=True)
    if not x.is_cuda:
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list:
        copied.synchronize()
        return copy.tolist()

    return wait


def _backward(learner: Learner, parts: list[Batch], scheduled: ScheduledValues) -> dict[str, Tensor]:
    """Leave the clipped gradients of a step in the student; returns the terms and the gradient norms."""
    method, terms_of_parts = learner.method, []
    optim.apply(learner.optimizer, scheduled)
    for number, (part, targets) in enumerate(zip(parts, method.targets(parts, scheduled), strict=True), 1):
        reduce_between_machines(method.student, is_due=number == len(parts))
        terms = method.losses(part, targets)
        (torch.stack([*terms.values()]).sum() / len(parts)).backward()
        terms_of_parts.append({name: term.detach() for name, term in terms.items()})
    terms = {name: torch.stack([part[name] for part in terms_of_parts]).mean() for name in terms_of_parts[0]}
    return terms | optim.clip(method.student, learner.config)
