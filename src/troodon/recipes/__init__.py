"""Choices, no mechanism: every recipe is a function that returns a config, and says what to expect of it."""

from collections.abc import Callable, Mapping
from typing import Any

from troodon.config import nearest
from troodon.curate.config import CurateConfig
from troodon.learn.config import PretrainConfig
from troodon.recipes import own, released

KNOWN: Mapping[str, dict[str, Callable[[], Any]]] = {
    "pretrain": {
        recipe.__name__: recipe
        for recipe in (own.demo, own.small, released.vitl16_short, released.vitl14, released.vitg14)
    },
    "curate": {recipe.__name__: recipe for recipe in (own.curate_demo, own.curate_small)},
}


def pretrain(name: str) -> PretrainConfig:
    """The config of a pretraining recipe. UsageError with the nearest name for an unknown one."""
    return _recipe("pretrain", name)


def curate(name: str) -> CurateConfig:
    """The config of a curation recipe. UsageError with the nearest name for an unknown one."""
    return _recipe("curate", name)


def any_verb(name: str) -> Any:
    """The config of a recipe of any verb."""
    known = {n: recipe for named in KNOWN.values() for n, recipe in named.items()}
    if name not in known:
        raise nearest("recipe", name, known)
    return known[name]()


def _recipe(verb: str, name: str) -> Any:
    if name not in KNOWN[verb]:
        raise nearest(f"recipe of {verb}", name, KNOWN[verb])
    return KNOWN[verb][name]()
