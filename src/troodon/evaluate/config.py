"""What can be set about evaluation. No torch here."""

from dataclasses import dataclass
from typing import Literal

from troodon.config import UsageError, nearest


@dataclass(frozen=True)
class LinearConfig:
    """Linear classifiers on frozen features, all settings trained together (paper, appendix B.3)."""

    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    """Learning rates to choose from; each is scaled by batch / 256."""
    blocks: tuple[int, ...] = (1, 4)
    """How many of the last blocks to concatenate the class tokens of, to choose from."""
    pooling: tuple[Literal["cls", "cls+mean"], ...] = ("cls", "cls+mean")
    """Class tokens alone, or with the mean patch token of the last block, to choose from."""
    scale: Literal["none", "standardise"] = "standardise"
    """Features as they are (the paper), or each channel with mean 0 and deviation 1 over the training images."""
    epochs: int = 10
    """Passes over the training images, as far as the two limits on steps allow."""
    least_steps: int = 300
    most_steps: int = 12500
    batch: int = 128
    """Images per step; all of them where there are fewer."""
    held_out: float = 0.1
    """Share of each training class that is held out to choose the classifier."""
    seeds: int = 1
    """Repetitions with other initial weights, orders and held-out images; the value is their mean."""

    def __post_init__(self) -> None:
        for name in ("epochs", "least_steps", "most_steps", "batch", "seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"linear.{name} {getattr(self, name)} is not at least 1")
        for name in ("rates", "blocks", "pooling"):
            if not getattr(self, name):
                raise UsageError(f"linear.{name} is empty: give at least one to choose from")
        if min(self.rates) <= 0:
            raise UsageError(f"linear.rates {min(self.rates)} is not above 0")
        if min(self.blocks) < 1:
            raise UsageError(f"linear.blocks {min(self.blocks)} is not at least 1")
        if not 0.0 < self.held_out < 1.0:
            raise UsageError(f"linear.held_out {self.held_out} is not between 0 and 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Which protocols run on frozen features, and how."""

    suite: str = "mine"
    protocols: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote in k-NN; one score for each."""
    temperature: float = 0.07
    """A neighbour's vote is softmax(cosine / temperature)."""
    shots: tuple[int, ...] = ()
    """Besides, k-NN from only so many training images of each class; one score for each."""
    shot_seeds: int = 5
    """Random choices of those images; the value is their mean."""
    linear: LinearConfig = LinearConfig()
    resamples: int = 1000
    """Bootstrap resamples of the images behind an interval."""
    seed: int = 0
    """Of everything random here, the split of unsplit data among it."""

    def __post_init__(self) -> None:
        if not self.protocols:
            raise UsageError("protocols is empty: give knn, linear or both")
        if "knn" in self.protocols and (not self.ks or min(self.ks) < 1):
            raise UsageError(
                f"ks {' '.join(map(str, self.ks)) or '(none)'}: give numbers of neighbours, each at least 1"
            )
        if self.temperature <= 0:
            raise UsageError(f"temperature {self.temperature} is not above 0")
        if self.shots and min(self.shots) < 1:
            raise UsageError(f"shots {min(self.shots)} is not at least 1")
        for name in ("shot_seeds", "resamples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is not at least 1")


SUITES = {
    "mine": EvaluateConfig(),
    "paper": EvaluateConfig(suite="paper", linear=LinearConfig(scale="none", least_steps=12500)),
    "quick": EvaluateConfig(
        suite="quick",
        ks=(10, 20),
        linear=LinearConfig(rates=(1e-3, 5e-3, 2e-2, 1e-1), blocks=(1,), epochs=5, least_steps=200),
    ),
}


def suite(name: str) -> EvaluateConfig:
    """The suite of that name. UsageError, with the nearest one, for any other."""
    if name not in SUITES:
        raise nearest("suite", name, SUITES)
    return SUITES[name]
