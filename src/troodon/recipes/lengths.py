"""The same recipe in another number of steps."""

from dataclasses import replace

from troodon.config import from_dict
from troodon.learn.config import PretrainConfig
from troodon.learn.schedules import Schedule, Schedules


def for_steps(config: PretrainConfig, steps: int) -> PretrainConfig:
    """The same training in so many steps: what is counted in steps keeps its share of the run.

    Intervals of readings and checkpoints shrink to a quarter of a short run, at least `log_every`, and never grow; but
    readings that decide when the run stops keep their share too.
    """
    if steps == config.steps:
        return config
    shorter, quarter = (
        replace(config, steps=steps),
        max(config.log_every, steps // 4),
    )  # UsageError for no number of steps
    return replace(
        shorter,
        schedules=scaled(config.schedules, steps, config.steps),
        health_every=min(config.health_every, quarter),
        probe_every=_probe_every(config, steps) if config.adapt.patience else min(config.probe_every, quarter),
        checkpoint_every=min(config.checkpoint_every, quarter),
    )


def _probe_every(config: PretrainConfig, steps: int) -> int:
    return max(1, config.probe_every * steps // config.steps) if config.probe_every else 0


def scaled(schedules: Schedules, steps: int, before: int) -> Schedules:
    """The schedules of a run of `before` steps, for one of `steps`."""

    def share(number: int) -> int:
        return number * steps // before

    def warmed(schedule: Schedule) -> Schedule:
        return replace(schedule, warmup=share(schedule.warmup))

    anchor = schedules.anchor
    return Schedules(
        lr=warmed(schedules.lr),
        weight_decay=warmed(schedules.weight_decay),
        ema_momentum=warmed(schedules.ema_momentum),
        teacher_temperature=warmed(schedules.teacher_temperature),
        last_layer_frozen=share(schedules.last_layer_frozen),
        backbone_frozen=share(schedules.backbone_frozen),
        anchor=replace(
            anchor, start=share(anchor.start), refresh=max(1, share(anchor.refresh)) if anchor.refresh else 0
        ),
    )


def as_begun(config: PretrainConfig, recorded: dict | None) -> PretrainConfig:
    """The config with which a run goes on: versions up to 0.1 did not adapt a recipe to its number of steps.

    Where the run with these `recorded` settings is of such a version and differs in nothing else, it keeps the numbers
    of steps that it began with.
    """
    if recorded is None or "max_broken" in recorded:
        return config
    before = from_dict(PretrainConfig(), recorded, source="manifest.json")
    same = before.steps == config.steps and scaled(before.schedules, 0, 1) == scaled(config.schedules, 0, 1)
    return replace(config, schedules=before.schedules) if same else config


def longer_than_run(config: PretrainConfig) -> list[str]:
    """The settings that are counted in steps and are more than the steps of the run."""
    s = config.schedules
    numbers = {"lr.warmup": s.lr.warmup, "backbone_frozen": s.backbone_frozen}
    if config.objective.prototypes:
        numbers |= {"last_layer_frozen": s.last_layer_frozen}
    return [f"schedules.{name} {number:,}" for name, number in numbers.items() if number > config.steps]
