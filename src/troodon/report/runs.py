"""What a run has written so far, read once: its records, its events, and how far and how well it goes."""

import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from troodon.report.artifacts import Artifact
from troodon.report.markup import SPACE, is_number, number, percent
from troodon.text import duration, plural

RECENT = 20  # records, of which the speed of now is
SILENT_S, SILENT = 60.0, 6  # without news for longer than this, and for so many times as long as usual: it has stopped


@dataclass(frozen=True)
class Run:
    """A run that goes on, or has ended. `records` are those of steps, in order and each once; "step" is the number of
    steps taken, 0 for the weights that it began with. `events` are the others."""

    folder: Path
    name: str
    config: str  # config.yaml
    records: list[dict]
    events: list[dict]

    @staticmethod
    def of(artifact: Artifact) -> "Run":
        lines = artifact.lines("metrics.jsonl")
        return Run(artifact.folder, artifact.name, artifact.text("config.yaml") or "", *ordered(lines))

    @cached_property
    def planned(self) -> int | None:
        """Steps to take."""
        return None if self.minutes else int(self._setting("steps")) or None

    @cached_property
    def minutes(self) -> float:
        """What the run takes; 0 where its steps are planned."""
        return self._setting("minutes")

    def _setting(self, name: str) -> float:
        match = re.search(rf"^{name}: *([\d.]+) *$", self.config, re.MULTILINE)
        return float(match[1]) if match else 0.0

    @cached_property
    def share(self) -> float:
        """How much of the run is behind it, from 0 to 1."""
        if self.finished:
            return 1.0
        return min(1.0, self.done / self.planned if self.planned else self.last("share") or 0.0)

    @cached_property
    def done(self) -> int:
        """Steps taken: all that were planned if there is a backbone, else up to the last record."""
        recorded = int(self.records[-1]["step"]) if self.records else 0
        ended = self.records and self.finished and not self.stopped_early
        return max(recorded, self.planned or 0) if ended else recorded

    @property
    def stopped_early(self) -> bool:
        return any(event["event"] == "stopped" for event in self.events)

    @cached_property
    def has_backbone(self) -> bool:
        return (self.folder / "backbone" / "backbone.json").is_file()

    @cached_property
    def finished(self) -> bool:
        """Whether no step is to come: less is left than there is between two records, or it has stopped early. A run
        has a backbone from its first checkpoint on."""
        if self.minutes:  # it says so at its end
            return self.has_backbone and (self.stopped_early or any(event["event"] == "time" for event in self.events))
        if not self.has_backbone or not self.records or self.planned is None or self.stopped_early:
            return self.has_backbone
        last = self.records[-1]["step"]
        before = self.records[-2]["step"] if len(self.records) > 1 else 0
        return self.planned - last < max(1, last - before)

    @cached_property
    def seconds(self) -> float | None:
        """Time of training."""
        return next((r["seconds"] for r in reversed(self.records) if is_number(r.get("seconds"))), None)

    @cached_property
    def alarms(self) -> dict[str, dict]:
        """The last event of each alarm that is still on."""
        last = {event.get("alarm"): event for event in self.events if event["event"] == "health"}
        return {str(name): event for name, event in last.items() if not event.get("over")}

    @cached_property
    def health_readings(self) -> int:
        return sum(is_number(r.get("feature_cosine")) or is_number(r.get("target_entropy")) for r in self.records)

    @cached_property
    def not_finite(self) -> list[int]:
        """Steps whose loss is not a finite number."""
        return [r["step"] for r in self.records if "loss" in r and not is_number(r["loss"])]

    def last(self, key: str) -> float | None:
        """The last value of a quantity."""
        return next((r[key] for r in reversed(self.records) if is_number(r.get(key))), None)

    @cached_property
    def knn(self) -> list[tuple[int, float]]:
        """The readings of the quick k-NN, with the steps before them."""
        return [(r["step"], r["knn"]) for r in self.records if is_number(r.get("knn"))]

    @cached_property
    def seconds_left(self) -> float | None:
        """What the steps to come take at the speed of now; None before that is known."""
        if self.minutes and self.seconds is not None and not self.finished:
            return max(0.0, 60 * self.minutes - self.seconds)
        timed = [r for r in self.records[-RECENT:] if is_number(r.get("seconds"))]
        if self.finished or self.planned is None or len(timed) < 2 or timed[-1]["step"] <= timed[0]["step"]:
            return None
        pace = (timed[-1]["seconds"] - timed[0]["seconds"]) / (timed[-1]["step"] - timed[0]["step"])
        return max(0.0, pace * (self.planned - timed[-1]["step"]))

    def is_silent(self, age: float) -> bool:
        """Whether a run that has not ended wrote nothing for so many seconds that it seems to have stopped."""
        times = [r["seconds"] for r in self.records[-RECENT:] if is_number(r.get("seconds"))]
        usual = median(b - a for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0
        return not self.finished and bool(self.records) and age > max(SILENT_S, SILENT * usual)


def ordered(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """Records of steps and events among the lines of metrics.jsonl. Of several records of a step the last counts."""
    by_step, events = {}, []
    for record in lines:
        if "event" in record:
            events.append(record)
        elif is_number(record.get("step")):
            by_step[record["step"]] = record | {"step": record["step"] + 1}
    return [by_step[step] for step in sorted(by_step)], events


def state_text(run: Run) -> str:
    """How far it has come, in a sentence or two."""
    goal = f" of {number(run.planned)}" if run.planned else ""
    if not run.records:
        to_go = f"; {plural(run.planned, 'step')} to go" if run.planned else ""
        return f"Nothing recorded yet{to_go}."
    steps = "step" if run.done == 1 and not run.planned else "steps"
    progress = f"{number(run.done)}{goal} {steps} {time_text(run)}".strip()
    bad, warning = run.not_finite, ""
    if bad:
        warning = f" The loss was not finite in {plural(len(bad), 'record')}, first at step {number(bad[0])}."
    if run.stopped_early:
        return f"Stopped early: {progress}.{warning}"
    if run.finished:
        return f"Finished: {progress}.{warning}"
    none = "" if run.has_backbone else ", no backbone yet"
    return f"Still going, or stopped: {progress}{none}.{warning}"


def time_text(run: Run) -> str:
    return f"in {duration(run.seconds, SPACE)}" if run.seconds is not None else ""


def health_text(run: Run) -> str:
    """Whether it is healthy, in a sentence; "" where nothing is known yet."""
    if run.alarms:
        return f"Not healthy: {', '.join(run.alarms)}."
    known = run.health_readings
    return f"{plural(known, 'reading')} of its health: no alarm." if known else ""


def knn_text(run: Run) -> str:
    """The first and the last reading of the quick k-NN; "" without labels."""
    if not run.knn:
        return ""
    (first, before), (_, last) = run.knn[0], run.knn[-1]
    if len(run.knn) == 1:
        return f"k-NN {percent(last)}"
    since = "before the first step" if first == 0 else f"at step {number(first)}"
    return f"k-NN {percent(last)}, {percent(before)} {since}"
