"""What became of a run that keeps the best of its weights, in words. No torch here."""

from collections.abc import Iterator
from pathlib import Path

from troodon.learn.best import Reading, best, given_up, readings
from troodon.learn.config import PretrainConfig
from troodon.run import MetricsFile, say

METRICS = "metrics.jsonl"


def tell(run: Path, config: PretrainConfig) -> None:
    """Say why a run stopped, and which weights it keeps; and record it once, as events of the run."""
    if not config.adapt.patience:
        return
    metrics = MetricsFile(run / METRICS)
    records = metrics.read()
    step = max((r["step"] for r in records if "step" in r), default=-1) + 1
    told = {r["message"] for r in records if "event" in r}
    for name, message in lines(records, config.adapt.patience):
        say(f"  {message}")
        if message not in told:
            metrics.append({"event": name, "at": step, "message": message})


def lines(records: list[dict], patience: int) -> Iterator[tuple[str, str]]:
    """What is to be said: "stopped" and why, and the "outcome"."""
    known = readings(records, float("inf"))
    if not known:
        yield "outcome", without_readings(records)
        return
    (step, top), last = best(known), known[-patience:]
    if given_up(known, patience):
        highest = best(last)[1]
        why = f"the last {patience} k-NN readings are at most {highest:.1%}, and the best is {top:.1%} {_when(step)}"
        advice = "Lower schedules.lr.peak, or optim.layer_decay (earlier blocks learn more slowly)"
        yield "stopped", f"stopped early, as features got worse: {why}. {advice}"
    yield "outcome", summary(known)


def summary(readings: list[Reading]) -> str:
    """The first reading, the best one, whose weights are kept, and the last one."""
    (first, before), (step, top), (_, last) = readings[0], best(readings), readings[-1]
    start = "before" if first == 0 else _when(first)
    return f"k-NN {start} {before:.1%}, best {top:.1%} {_when(step)} (kept), last {last:.1%}"


def without_readings(records: list[dict]) -> str:
    """What is known without labels: how many directions features use, which is no measure of their worth."""
    ranks = [(r["step"] + 1, r["effective_rank"]) for r in records if "effective_rank" in r]
    text = "no k-NN readings (they need labels), so the last weights are kept; whether they are better is not known"
    if len(ranks) > 1:
        (first, before), (step, after) = ranks[0], ranks[-1]
        text += f" (effective rank {before:.1f} at step {first:,}, {after:.1f} at step {step:,})"
    return f"{text}: compare both with troodon evaluate"


def _when(step: int) -> str:
    return f"at step {step:,}" if step else "before the first step"
