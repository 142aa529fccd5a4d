"""Choices, no mechanism: every recipe is a function that returns a config, and says what to expect of it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from troodon.config import UsageError, nearest
from troodon.curate.config import CurateConfig
from troodon.learn.config import PretrainConfig
from troodon.model.config import SMALL
from troodon.recipes import automatic, curation, distilled, onward, own, released

KNOWN: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "pretrain": {
        recipe.__name__: recipe
        for recipe in (
            automatic.auto,
            own.demo,
            own.small,
            own.demo_dino,
            own.small_dino,
            own.copies_small,
            onward.adapt,
            onward.heads,
            onward.high_resolution,
            released.vitl16_short,
            released.vitl14,
            released.vitg14,
            released.vits14,
            released.vitb14,
            released.vits14_reg,
            released.vitb14_reg,
            released.vitl14_reg,
            released.vitg14_reg,
        )
    },
    "distill": {
        recipe.__name__: recipe
        for recipe in (
            distilled.distill_demo,
            distilled.distill_small,
            distilled.distill_demo_dino,
            distilled.distill_small_dino,
            distilled.distill_vits14,
            distilled.distill_vitb14,
            distilled.distill_vitl14,
            distilled.distill_features,
        )
    },
    "curate": {
        recipe.__name__: recipe
        for recipe in (
            curation.curate_demo,
            curation.curate_small,
            curation.curate_paper,
            curation.curate_balance,
        )
    },
}


def pretrain(name: str, start: Callable[[], PretrainConfig | None] = lambda: None) -> PretrainConfig:
    """The config of a pretraining recipe; `start` gives the config of what those that go on from weights begin with.

    UsageError with the nearest name for an unknown one, and where there is nothing to go on from.
    """
    recipe = _recipe("pretrain", name)
    if not needs_start(recipe):
        return recipe()
    if (config := start()) is None:
        raise UsageError(f"recipe {name} goes on from weights: give them as --init (a run, a backbone, a .pth file)")
    return recipe(config)


def distill(name: str) -> PretrainConfig:
    """The config of a student. UsageError with the nearest name for an unknown recipe."""
    return _recipe("distill", name)()


def curate(name: str) -> CurateConfig:
    """The config of a curation recipe. UsageError with the nearest name for an unknown one."""
    return _recipe("curate", name)()


def any_verb(name: str) -> Any:
    """The config of a recipe of any verb; of one that goes on from weights, as if they were a ViT-S/14."""
    known = {n: recipe for named in KNOWN.values() for n, recipe in named.items()}
    if name not in known:
        raise nearest("recipe", name, known)
    recipe = known[name]
    return recipe(PretrainConfig(vit=SMALL)) if needs_start(recipe) else recipe()


def needs_start(recipe: Callable) -> bool:
    return "start" in inspect.signature(recipe).parameters


def _recipe(verb: str, name: str) -> Callable[..., Any]:
    if name not in KNOWN[verb]:
        raise nearest(f"recipe of {verb}", name, KNOWN[verb])
    return KNOWN[verb][name]
