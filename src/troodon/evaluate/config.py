"""Configuration of evaluation. This module does not import torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from troodon.config import UsageError, nearest, within


@dataclass(frozen=True)
class LinearConfig:
    """Linear classifiers on frozen features. All settings are trained together (DINOv2, appendix B.3)."""

    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    """Candidate learning rates. Each is scaled by batch / 256."""
    blocks: tuple[int, ...] = (1, 4)
    """Candidate numbers of last blocks whose class tokens are concatenated."""
    pooling: tuple[Literal["cls", "cls+mean"], ...] = ("cls", "cls+mean")
    """Candidates: class tokens alone, or with the mean patch token of the last block."""
    scale: Literal["none", "standardise"] = "standardise"
    """none: features as they are (the paper). standardise: mean 0 and standard deviation 1 in each channel, over the
    training images."""
    epochs: int = 10
    """Epochs over the training images, within the two limits on steps."""
    least_steps: int = 300
    """Minimum number of steps."""
    most_steps: int = 12500
    """Maximum number of steps."""
    batch: int = 128
    """Images per step, or all training images if there are fewer."""
    held_out: float = 0.1
    """Fraction of each training class that is held out to choose the classifier."""
    seeds: int = 1
    """Number of runs with different initial weights, orders and held-out images. The score is their mean."""

    def __post_init__(self) -> None:
        for name in ("epochs", "least_steps", "most_steps", "batch", "seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"linear.{name} {getattr(self, name)} is not at least 1")
        for name in ("rates", "blocks", "pooling"):
            if not getattr(self, name):
                raise UsageError(f"linear.{name} is empty: give at least one candidate")
        if min(self.rates) <= 0:
            raise UsageError(f"linear.rates {min(self.rates)} is not above 0")
        if min(self.blocks) < 1:
            raise UsageError(f"linear.blocks {min(self.blocks)} is not at least 1")
        if not 0.0 < self.held_out < 1.0:
            raise UsageError(f"linear.held_out {self.held_out} is not between 0 and 1")


@dataclass(frozen=True)
class LogisticConfig:
    """Logistic regression with an L2 penalty, fitted by L-BFGS (DINOv2, appendix B.3)."""

    strengths: tuple[float, ...] = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
    """Candidate values of C, the inverse of the regularisation strength."""
    steps: int = 1000
    """Maximum number of L-BFGS iterations."""
    tolerance: float = 1e-5
    """A fit has converged when no entry of its gradient exceeds this."""
    held_out: float = 0.1
    """Fraction of each training class that is held out to choose C."""

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
    """Training of heads on feature maps. The same for segmentation and depth."""

    side: int = 0
    """Side of a window in pixels, rounded to whole patches. 0 takes the size of the network's input images."""
    steps: int = 1000
    """Training steps."""
    batch: int = 16
    """Windows per step."""
    rate: float = 1e-3
    """Learning rate of AdamW. Linear warm-up over a tenth of the steps, times a cosine to 0."""
    weight_decay: float = 1e-4
    seeds: int = 1
    """Number of runs with different initial weights and orders. The score is their mean."""
    scales: tuple[float, ...] = (1.0, 1.32, 1.73)
    """Scales of the multi-scale protocol: shorter side of the resized image, divided by the side of a window."""
    heads: tuple[Head, ...] = ("linear", "patches", "linear_4", "linear_4_ms")
    """linear: a linear layer on the last block; for depth it sees the class token too. patches: the same without the
    class token, for depth. linear_4: on four blocks (the last ones for segmentation, spread over the network for depth,
    as in the paper). linear_4_ms: the same at several scales. dpt: convolutions on four blocks, for depth."""
    bins: int = 256
    """Number of depth bins."""
    unit: float = 0.001
    """Metres per unit of the depth files, if the dataset does not define it."""
    range: tuple[float, float] | None = None
    """Smallest and largest valid depth in metres, if the dataset does not define it."""

    def __post_init__(self) -> None:
        within(self, "dense.", 0, None, "side", "weight_decay")
        within(self, "dense.", 1, None, "steps", "batch", "seeds", "scales")
        within(self, "dense.", 2, None, "bins")
        if self.rate <= 0 or self.unit <= 0:
            raise UsageError(f"dense: rate {self.rate} and unit {self.unit} must be above 0")
        if not self.heads or not self.scales:
            raise UsageError("dense.heads and dense.scales: give at least one of each")
        if self.range is not None and not 0 <= self.range[0] < self.range[1]:
            raise UsageError(f"dense.range {self.range[0]} {self.range[1]}: give the smallest and the largest distance")


Protocol = Literal[
    "knn", "linear", "logistic", "kmeans", "retrieve", "copies", "segment", "depth", "match", "discover"
]  # fmt: skip
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True)
class EvaluateConfig:
    """The protocols that run on frozen features, and their settings."""

    suite: str = "mine"
    protocols: tuple[Protocol, ...] = PROTOCOLS
    """A protocol runs on each dataset with ground truth for it; match runs on masks, depths and unlabelled images."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours of k-NN. details.json has a score for each, scores.json for the best on training images."""
    temperature: float = 0.07
    """The weight of a neighbour is softmax(cosine / temperature)."""
    shots: tuple[int, ...] = ()
    """Few-shot k-NN: numbers of training images per class. One score for each."""
    shot_seeds: int = 5
    """Number of random choices of these images. The score is their mean."""
    linear: LinearConfig = LinearConfig()
    choose: tuple[Literal["held-out", "val"], ...] = ("held-out",)
    """Images on which linear classifiers are chosen: held-out training images or, as papers do, the test images."""
    logistic: LogisticConfig = LogisticConfig()
    kmeans_iterations: int = 100
    """Maximum number of k-means iterations."""
    cluster_seeds: int = 3
    """Number of k-means initialisations. The score is their mean."""
    retrieval_at: tuple[int, ...] = (1, 5, 10)
    """Values of k for the precision of the first k retrieved images. Mean average precision is always reported."""
    dense: DenseConfig = DenseConfig()
    match_images: int = 100
    """Number of images of which two views are matched."""
    match_within: tuple[float, ...] = (0.05, 0.1)
    """A match is correct within this fraction of the side of the view (PCK thresholds)."""
    resamples: int = 1000
    """Number of bootstrap samples of the images for each confidence interval."""
    seed: int = 0
    """Seed of all random choices, including the split of datasets without one."""
    RENAMED: ClassVar[dict[str, str]] = {"rounds": "kmeans_iterations", "at": "retrieval_at"}

    def __post_init__(self) -> None:
        if not self.protocols:
            raise UsageError(f"protocols is empty: give some of {', '.join(PROTOCOLS)}")
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
        within(self, "", 1, None, "retrieval_at", "kmeans_iterations", "cluster_seeds", "match_images")
        for name in ("shot_seeds", "resamples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is not at least 1")
        if not self.match_within or not all(0 < fraction <= 1 for fraction in self.match_within):
            raise UsageError(f"match_within {self.match_within}: give fractions of a side, above 0 and at most 1")


SUITES = {
    # A quarter of the paper's values of C and fewer steps: thousands of images take one minute instead of ten.
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


def get_suite(name: str) -> EvaluateConfig:
    """Return the suite of that name. Raises UsageError with the nearest name for any other."""
    if name not in SUITES:
        raise nearest("suite", name, SUITES)
    return SUITES[name]
