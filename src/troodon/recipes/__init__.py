"""Choices, no mechanism: every recipe is a function that returns a config, and says what to expect of it."""

from collections.abc import Callable

from troodon.config import nearest
from troodon.learn.config import PretrainConfig
from troodon.recipes import own, released

PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe for recipe in (own.demo, own.small, released.vitl16_short, released.vitl14, released.vitg14)
}


def pretrain(name: str) -> PretrainConfig:
    """The config of a pretraining recipe. UsageError with the nearest name for an unknown one."""
    if name not in PRETRAIN:
        raise nearest("recipe", name, PRETRAIN)
    return PRETRAIN[name]()
