"""What can be set about evaluation. No torch here."""

from dataclasses import dataclass
from typing import Literal, get_args

from troodon.config import UsageError, nearest, within


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
class LogisticConfig:
    """Logistic regression with a squared penalty, by L-BFGS (paper, appendix B.3)."""

    strengths: tuple[float, ...] = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
    """Values of C to choose from: the weight of the images against the penalty."""
    steps: int = 1000
    """Steps of the optimiser, at most."""
    tolerance: float = 1e-5
    """A problem is solved when no entry of its gradient is above this."""
    held_out: float = 0.1
    """Share of each training class that is held out to choose C."""

    def __post_init__(self) -> None:
        within(self, "logistic.", 1, None, "steps")
        if not self.strengths or min(self.strengths) <= 0:
            raise UsageError(f"logistic.strengths {self.strengths}: give numbers above 0")
        if self.tolerance <= 0:
            raise UsageError(f"logistic.tolerance {self.tolerance} is not above 0")
        if not 0.0 < self.held_out < 1.0:
            raise UsageError(f"logistic.held_out {self.held_out} is not between 0 and 1")


Head = Literal["linear", "patches", "linear_4", "linear_4_ms", "dpt"]


@dataclass(frozen=True)
class DenseConfig:
    """What is trained on maps of patches, and how: the same for masks and depths."""

    side: int = 0
    """Pixels on the side of a window, in whole patches; 0 is what the network's images have."""
    steps: int = 1000
    batch: int = 16
    """Windows of a step."""
    rate: float = 1e-3
    """Of AdamW; warmed up over a tenth of the steps, then on a cosine to 0."""
    weight_decay: float = 1e-4
    seeds: int = 1
    """Repetitions with other initial weights and orders; the value is their mean."""
    scales: tuple[float, ...] = (1.0, 1.32, 1.73)
    """Of the multi-scale protocol: times that the shorter side of an image is a window's."""
    heads: tuple[Head, ...] = ("linear", "patches", "linear_4", "linear_4_ms")
    """A linear layer on the last block; for depth, where that sees the class token too, on its patches alone; on four
    blocks (for masks the last, for depths spread over the network, as in the paper); on four at several scales;
    convolutions on four, for depth."""
    bins: int = 256
    """Of depth."""
    unit: float = 0.001
    """Metres of a count of depth, where the owner of the data does not say it."""
    range: tuple[float, float] | None = None
    """Metres that count, least and most, where the owner of the data does not say it."""

    def __post_init__(self) -> None:
        within(self, "dense.", 0, None, "side", "weight_decay")
        within(self, "dense.", 1, None, "steps", "batch", "seeds", "scales")
        within(self, "dense.", 2, None, "bins")
        if self.rate <= 0 or self.unit <= 0:
            raise UsageError(f"dense: rate {self.rate} and unit {self.unit} must be above 0")
        if not self.heads or not self.scales:
            raise UsageError("dense.heads and dense.scales: give at least one of each")
        if self.range is not None and not 0 <= self.range[0] < self.range[1]:
            raise UsageError(f"dense.range {self.range[0]} {self.range[1]}: give the least and the largest distance")


Protocol = Literal[
    "knn", "linear", "logistic", "kmeans", "retrieve", "copies", "segment", "depth", "match", "discover"
]  # fmt: skip
ALL: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True)
class EvaluateConfig:
    """Which protocols run on frozen features, and how."""

    suite: str = "mine"
    protocols: tuple[Protocol, ...] = ALL
    """Those that a set of data has a truth for are done; patches are matched in any images with masks or depths."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote in k-NN; one score for each."""
    temperature: float = 0.07
    """A neighbour's vote is softmax(cosine / temperature)."""
    shots: tuple[int, ...] = ()
    """Besides, k-NN from only so many training images of each class; one score for each."""
    shot_seeds: int = 5
    """Random choices of those images; the value is their mean."""
    linear: LinearConfig = LinearConfig()
    choose: tuple[Literal["held-out", "val"], ...] = ("held-out",)
    """What linear classifiers are chosen on: held-out training images, or, as papers do, the images to test on."""
    logistic: LogisticConfig = LogisticConfig()
    rounds: int = 100
    """Of k-means, at most."""
    cluster_seeds: int = 3
    """Beginnings of k-means; the value is the mean."""
    at: tuple[int, ...] = (1, 5, 10)
    """Besides mean average precision, the precision of the first so many images retrieved."""
    dense: DenseConfig = DenseConfig()
    match_images: int = 100
    """Images of which two views are matched."""
    match_within: tuple[float, ...] = (0.05, 0.1)
    """A match is right within this share of the view's side."""
    resamples: int = 1000
    """Bootstrap resamples of the images behind an interval."""
    seed: int = 0
    """Of everything random here, the split of unsplit data among it."""

    def __post_init__(self) -> None:
        if not self.protocols:
            raise UsageError(f"protocols is empty: give some of {', '.join(ALL)}")
        if "knn" in self.protocols and (not self.ks or min(self.ks) < 1):
            raise UsageError(
                f"ks {' '.join(map(str, self.ks)) or '(none)'}: give numbers of neighbours, each at least 1"
            )
        if self.temperature <= 0:
            raise UsageError(f"temperature {self.temperature} is not above 0")
        if self.shots and min(self.shots) < 1:
            raise UsageError(f"shots {min(self.shots)} is not at least 1")
        if not self.choose:
            raise UsageError("choose is empty: give held-out, val or both")
        within(self, "", 1, None, "at", "rounds", "cluster_seeds", "match_images")
        for name in ("shot_seeds", "resamples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is not at least 1")
        if not self.match_within or not all(0 < share <= 1 for share in self.match_within):
            raise UsageError(f"match_within {self.match_within}: give shares of a side, above 0")


SUITES = {
    # A quarter of the paper's values of C, and fewer steps: of thousands of images a minute, and not ten.
    "mine": EvaluateConfig(logistic=LogisticConfig(strengths=LogisticConfig().strengths[::4], steps=200)),
    "paper": EvaluateConfig(
        suite="paper",
        linear=LinearConfig(scale="none", least_steps=12500),
        choose=("held-out", "val"),
        dense=DenseConfig(steps=40000, heads=("linear", "linear_4", "linear_4_ms", "dpt")),
    ),
    "quick": EvaluateConfig(
        suite="quick",
        protocols=("knn", "linear", "retrieve", "copies", "segment", "depth"),
        ks=(10, 20),
        linear=LinearConfig(rates=(1e-3, 5e-3, 2e-2, 1e-1), blocks=(1,), epochs=5, least_steps=200),
        dense=DenseConfig(steps=100, heads=("linear",)),
    ),
}


def suite(name: str) -> EvaluateConfig:
    """The suite of that name. UsageError, with the nearest one, for any other."""
    if name not in SUITES:
        raise nearest("suite", name, SUITES)
    return SUITES[name]
