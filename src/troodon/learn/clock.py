"""The clock of a run: which step is the last, and how far each step is in the schedules.

A run of so many steps goes through its schedules step by step. A run of so many minutes measures its steps, and goes
through its schedules at the pace that ends them with its time: its learning rate never jumps, whatever the speed does.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from troodon import dist
from troodon.learn.config import PretrainConfig
from troodon.learn.schedules import Pace, ScheduledValues, Schedules
from troodon.text import duration

UNMEASURED = 1_000_000  # steps to the end, until a step is measured: the run stays where it is in its schedules
RECENT, FASTEST = 1 / 4, 3 / 4  # the latest steps of a session, and which of them count: none that compiles


class Clock:
    """The pace of a run. Rank zero reads the time, and the others follow it.

    `began` is when the command began, as `time.monotonic` has it: what went before the first step counts.
    """

    def __init__(self, config: PretrainConfig, began: float | None = None):
        self.seconds = 60 * config.minutes
        self.pace = Pace(config.steps, UNMEASURED if self.seconds else config.steps)
        self.began = self.now() if began is None else began
        self.spent = 0.0  # seconds before `began`, up to the checkpoint that the run goes on from
        self.size: tuple[int, ...] = ()  # of crops of the last step
        # The longest so far, in seconds: what follows a step, and to write a checkpoint. The end will take as long.
        self.between, self.writing = 0.0, 0.0
        self.start(0)

    @classmethod
    def of_steps(cls, steps: int) -> "Clock":
        """The clock of a run of so many steps."""
        return cls(PretrainConfig(steps=steps))

    @staticmethod
    def now() -> float:
        return time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of its time that the run has used."""
        return self.spent + self.now() - self.began

    @property
    def seconds_left(self) -> float:
        """Of the time of the run; 0 if it has none."""
        return max(0.0, self.seconds - self.elapsed) if self.seconds else 0.0

    @property
    def length(self) -> str:
        """The number of steps in all, in words."""
        if not self.seconds:
            return f"{self.pace.end:,}"
        return f"about {self.pace.end:,}" if self.pace.end < UNMEASURED else "?"

    def told(self, done: int) -> str:
        """What came of the time of the run, in words."""
        return f"{done:,} steps in {duration(self.elapsed)} of {duration(self.seconds)}"

    def share_before(self, batch: int) -> float:
        """The share of the schedules that is over before the batch of this number, as far as the pace is known."""
        return min(1.0, self.pace.at(batch) / self.pace.steps)

    def share(self, done: int) -> dict[str, float]:
        """For the records of a run that has a time: the share of its schedules that is behind it."""
        return {"share": self.pace.at(done) / self.pace.steps} if self.seconds else {}

    def state(self) -> dict | None:
        """What a checkpoint keeps of a run that has a time."""
        if not self.seconds:
            return None
        return asdict(self.pace) | {"seconds": self.elapsed, "between": self.between, "writing": self.writing}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Go on as a checkpoint says that an earlier command wrote."""
        self.load(state)
        self.spent = 0.0 if state is None else state["seconds"]

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take the pace that a checkpoint has."""
        if state is not None:
            self.pace = Pace(**{name: state[name] for name in asdict(self.pace)})
            self.between, self.writing = state["between"], state["writing"]

    def start(self, step: int) -> None:
        """Measure steps from this one on."""
        self.first, self.next, self.last, self.steps_s, self.after_s = step, step + 1, 0.0, [], 0.0
        self.after = 0.0

    def values(self, schedules: Schedules, step: int) -> ScheduledValues:
        """The scheduled values of a step."""
        return schedules.at(self.pace.at(step), self.pace.steps, self.pace.at(step + 1))

    def due(self, done: int, every: int, by_share: bool = False) -> bool:
        """Whether after so many steps it is time for what is done after each `every` steps, and after the last one.

        Where a run of so many minutes has few steps, it is done at each quarter of it; with `by_share`, as often as in
        a run of the config's steps.
        """
        if not every or done == self.pace.end or not self.seconds:
            return every > 0 and (done % every == 0 or done == self.pace.end)
        if not by_share and 4 * every <= self.pace.end:
            return done % every == 0
        part = min(every, self.pace.steps) if by_share else self.pace.steps / 4
        return self.pace.at(done) // part > self.pace.at(done - 1) // part

    def noted(self, after: float, writing: float) -> None:
        """Of a network: seconds of what followed this step, and of the last writing of a checkpoint."""
        self.after += after
        self.writing = max(self.writing, writing)

    def tick(self, done: int, size: Sequence[int] = ()) -> None:
        """After each step, of crops of this size; the time sets the pace after 2, 4, 8 ..., then at each twentieth of
        what is left. Another size is measured anew."""
        if not self.seconds or done >= self.pace.end:
            return
        if tuple(size) != self.size:
            self.size = tuple(size)
            self.start(done)
        now = self.now()
        if self.last:
            self.steps_s.append(now - self.last - self.after)
            self.after_s += self.after
        self.last, self.between, self.after = now, max(self.between, self.after), 0.0
        if done < self.next or not self.steps_s:  # the first step of a session is slow, and not measured
            return
        left = dist.all_gather_objects(self._steps_left())[0]
        self.pace = self.pace.set(done, left)
        self.next = done + max(1, min(done - self.first, left // 20))

    def _steps_left(self) -> int:
        """How many steps fit into the rest of the time."""
        recent = sorted(self.steps_s[-max(8, int(RECENT * len(self.steps_s))) :])
        fastest = recent[: max(1, int(FASTEST * len(recent)))]
        each = sum(fastest) / len(fastest) * (1 + self.after_s / max(sum(self.steps_s), 1e-9))
        return max(1, round((self.seconds - self.elapsed - self.between - self.writing) / max(each, 1e-9)))
