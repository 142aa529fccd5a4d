"""Recipes that had another content in earlier versions, whose runs go on as they began."""

from collections.abc import Callable
from typing import Any

from troodon.config import UsageError, from_dict, to_dict
from troodon.learn.config import PretrainConfig
from troodon.recipes import distilled, own

Recipe = Callable[..., PretrainConfig]
EARLIER: tuple[tuple[Recipe, Recipe], ...] = (  # today's recipe, and the one that had its name
    (own.small, own.small_dino),
    (own.demo, own.demo_dino),
    (distilled.distill_small, distilled.distill_small_dino),
    (distilled.distill_demo, distilled.distill_demo_dino),
)


def as_it_was(config: PretrainConfig, recorded: dict[str, Any]) -> tuple[PretrainConfig, str] | None:
    """The config of a run with these `recorded` settings, and the recipe's name today, if `config` is of a recipe that
    was another one when the run began: what was set beside the recipe is the same in both."""
    begun = to_dict(from_dict(PretrainConfig(), recorded, source="manifest.json"))
    for now, before in EARLIER:
        for steps in {config.steps, begun["steps"]}:
            changes = _changes(to_dict(now(config.steps)), to_dict(config))
            try:
                found = from_dict(before(steps), {**changes, "steps": steps}, source="settings")
            except UsageError:
                continue
            if to_dict(found) == begun and (steps == config.steps or config.steps == now().steps):
                return found, before.__name__
    return None


def _changes(default: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What is set otherwise in a config than in a default one."""
    changes = {}
    for name, value in config.items():
        if isinstance(value, dict) and isinstance(default.get(name), dict):
            if inner := _changes(default[name], value):
                changes[name] = inner
        elif default.get(name) != value:
            changes[name] = value
    return changes
