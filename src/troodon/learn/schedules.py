"""Schedules: pure functions of the step, so that a resumed run needs nothing but its step, and its pace if its length
is a time. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from troodon.config import within


@dataclass(frozen=True)
class Schedule:
    """From `start` linearly to `peak` over `warmup` steps, then to `end`: by a half cosine, or not at all."""

    peak: float
    end: float
    warmup: int = 0
    start: float = 0.0
    shape: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a half cosine from peak to end, or peak for ever."""

    def at(self, step: float, steps: int) -> float:
        """The value at `step` of `steps`, counted from zero; also between two steps."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.end + (self.peak - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Anchor:
    """When Gram anchoring takes the EMA as its anchor: before step `start`, then again every `refresh` steps."""

    start: int = 0
    refresh: int = 10_000
    """0 is never again."""
    refreshes: int = 3
    """How often it is taken again, at most."""

    def taken(self, step: int) -> bool:
        """Whether the EMA becomes the anchor before this step."""
        since = step - self.start
        if not self.refresh:
            return since == 0
        return since >= 0 and since % self.refresh == 0 and since // self.refresh <= self.refreshes


@dataclass(frozen=True)
class ScheduledValues:
    """The scheduled numbers of one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    backbone_frozen: bool = False
    anchored: bool = False
    """Whether Gram anchoring has begun."""
    new_anchor: bool = False
    """Whether the EMA becomes the anchor before this step."""


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run."""

    RENAMED: ClassVar[Mapping[str, str]] = {"momentum": "ema_momentum"}

    lr: Schedule = Schedule(peak=4e-3, end=1e-6, warmup=12_500)
    """Learning rate of AdamW, before the factors of the parameter rules."""
    weight_decay: Schedule = Schedule(peak=0.04, end=0.4)
    ema_momentum: Schedule = Schedule(peak=0.992, end=1.0)
    """Share of the EMA of the student's weights that stays at each step."""
    teacher_temperature: Schedule = Schedule(start=0.04, peak=0.07, end=0.07, warmup=37_500)
    last_layer_frozen: int = 1_250
    """Steps at the start in which the prototypes are frozen."""
    backbone_frozen: int = 0
    """Steps at the start in which only the heads learn: new heads on a trained backbone."""
    anchor: Anchor = Anchor()

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "ema_momentum", "teacher_temperature"):
            section, most = f"schedules.{name}.", 1 if name == "ema_momentum" else None
            within(getattr(self, name), section, 0, most, "start", "peak", "end")
            within(getattr(self, name), section, 0, None, "warmup")
        within(self.teacher_temperature, "schedules.teacher_temperature.", 1e-4, None, "peak", "end")
        within(self, "schedules.", 0, None, "last_layer_frozen", "backbone_frozen")
        within(self.anchor, "schedules.anchor.", 0, None, "start", "refresh", "refreshes")

    def at(self, step: float, steps: int, following: float | None = None) -> ScheduledValues:
        """The values at `step` of `steps`, if the next step is at `following`; by default one later."""
        following = step + 1 if following is None else following
        lr = self.lr.at(step, steps)
        return ScheduledValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.last_layer_frozen else lr,
            weight_decay=self.weight_decay.at(step, steps),
            ema_momentum=self.ema_momentum.at(step, steps),
            teacher_temperature=self.teacher_temperature.at(step, steps),
            backbone_frozen=step < self.backbone_frozen,
            anchored=following > self.anchor.start,
            new_anchor=any(map(self.anchor.taken, range(math.ceil(step), math.ceil(following)))),
        )


@dataclass(frozen=True)
class Pace:
    """How a run goes through schedules that are written for `steps` steps: evenly, from `position` at its step `first`
    to their end, `left` steps later."""

    steps: int
    left: int
    first: int = 0
    position: float = 0.0

    @property
    def end(self) -> int:
        """Steps of the run."""
        return self.first + self.left

    def at(self, step: int) -> float:
        """Where a step of the run is in the schedules: exactly at `step` in a run of `steps` steps."""
        return self.position + (self.steps - self.position) * (step - self.first) / self.left

    def set(self, step: int, left: int) -> "Pace":
        """The pace from this step on if so many are left; no step jumps."""
        return replace(self, first=step, position=self.at(step), left=left)
