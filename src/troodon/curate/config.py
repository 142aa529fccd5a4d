"""What can be set about curation. No torch here."""

import re
from dataclasses import dataclass
from typing import Literal

from troodon.config import UsageError, within

Tokens = Literal["cls", "cls+mean"]
Space = Literal["plain", "centred", "whitened"]
Step = Literal["exact", "hash", "duplicate", "benchmark"]
MARK = re.compile(r"(?P<score>[\w.]+(:\w+)?)(?P<sign>[<>])(?P<limit>-?\d+(\.\d+)?)")


@dataclass(frozen=True)
class CurateConfig:
    """From a pool of images to a selection (https://arxiv.org/abs/2304.07193, section 3 and appendix A)."""

    tokens: Tokens = "cls"
    """What stands for an image: its class token, or that and the mean of its patches."""
    steps: tuple[Step, ...] = ("exact", "duplicate", "benchmark")
    """What is looked for before anything is gathered; any of exact, hash, duplicate, benchmark, in this order."""
    within_curated: Literal["keep", "drop"] = "keep"
    """Duplicates among the curated images themselves: keep every readable one, or drop them too."""
    pixels: bool = True
    """Look for copies by what 8 x 8 pixels tell as well as by the network (see finder.py)."""
    hash_radius: int = 2
    """Step hash: bits of 64 in which perceptual hashes of copies may differ."""
    duplicate_space: Space = "whitened"
    """How embeddings are compared to find near-duplicates (see space.py)."""
    threshold: float | None = None
    """Cosine above which two images are near-duplicates; none: calibrated on the images themselves."""
    false_merges: float = 0.001
    """Calibration: how many other images, on average, one image may be wrongly taken for a copy of. Fewer are, for the
    threshold is extrapolated with care (docs/log.md): at 0.01 a few of 10,000 images are lost, at 0.001 none was."""
    calibration_images: int = 250
    """Calibration: images that are drawn, attacked, and compared."""
    recheck_above: int = 4
    """Groups of more near-duplicates than this may be chains: each member must resemble the kept one itself."""
    search: Literal["auto", "exact", "lists", "faiss"] = "auto"
    """How near-duplicates are searched: exact, lists, faiss, or auto: exact up to half a million images, then lists."""
    rounds: int = 2
    """Searches that are not exact look again among the images that stay, until they have looked so often."""
    benchmark_threshold: float | None = None
    """Cosine above which an image counts as a benchmark's; none: calibrated."""
    benchmark_false_merges: float = 1.0
    """Calibration: how many images, on average, one benchmark image may wrongly cost."""
    disguises: int = 12
    """Attacked copies of each benchmark image that are looked for as well, turned, written on, in a window and so on:
    as many more images to look at and to compare with, and more leaks found. 16 at most, the best first; 0: none."""
    benchmark_mode: Literal["direct", "component"] = "direct"
    """What goes for a benchmark image: images that resemble it, or also all that resemble these, and so on."""
    gather: Literal["sample", "cluster", "auto", "balance", "all"] = "sample"
    """Which images of the pool are gathered: the nearest to each curated one; those of clusters in which curated ones
    lie; the first for curated sets of more than `large` images and the second for others; an even spread; or all."""
    retrieve_space: Space = "whitened"
    """How embeddings are compared to gather."""
    k: int = 4
    """sample: uncurated images to retrieve for each curated one."""
    k_of: tuple[str, ...] = ()
    """sample: curated sets with a k of their own, such as imagenet=32, by the first part of their images' paths."""
    minimum: float = -1.0
    """sample: cosine below which nothing is retrieved."""
    collisions: Literal["unique", "multiplicity", "fill"] = "unique"
    """sample: an image retrieved several times counts once, or as often as it was retrieved (its weight), or goes to
    the nearest, while others take their next."""
    large: int = 1_000_000
    """auto: curated sets of more images than this are retrieved for one by one."""
    clusters: int = 100_000
    """cluster: how many; no more than the pool has images."""
    more_than: int = 3
    """cluster: curated images of one set that a cluster must exceed to be chosen."""
    per_cluster: int = 10_000
    """cluster: images taken from each, at most."""
    cap: int = 1_000_000
    """cluster: images gathered for one curated set, at most."""
    target: int = 0
    """balance: uncurated images to draw; 0: half of them."""
    levels: tuple[int, ...] = (1000, 100, 10)
    """balance: clusters of images, clusters of these, and so on."""
    marks: tuple[str, ...] = ()
    """Scores to write and to mark images by, such as sharpness<0.01, aspect>4, side<64 or my.module:score>0.5. Nothing
    goes for a mark."""
    batch: int = 64
    """Images that the backbone sees at once."""
    part: int = 20_000
    """Images that are one unit of work when they are read and embedded: what a killed process loses."""
    threads: int = 0
    """Threads that read and decode; 0: as many as there are cores, up to 16."""
    seed: int = 0
    """Of what is drawn: images for calibration and attacks on them, first centroids, images of a cluster."""

    def __post_init__(self) -> None:
        within(self, "", -1, 1, "threshold", "benchmark_threshold", "minimum")
        within(self, "", 1, None, "k", "batch", "part", "recheck_above", "calibration_images", "rounds")
        within(self, "", 1, None, "clusters", "levels", "per_cluster", "cap")
        within(self, "", 0, None, "threads", "seed", "more_than", "large", "target")
        within(self, "", 0, 8, "hash_radius")
        within(self, "", 0, 16, "disguises")
        for name in ("false_merges", "benchmark_false_merges"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} {getattr(self, name)}: must be above 0; 0.01 is one image in a hundred")
        for mark in self.marks:
            if not MARK.fullmatch(mark):
                raise UsageError(f"marks {mark!r}: expected a score, < or >, and a number, such as sharpness<0.01")
        for each in self.k_of:
            if not re.fullmatch(r"[^=]+=[1-9]\d*", each):
                raise UsageError(f"k_of {each!r}: expected a curated set and its k, such as imagenet=32")

    def k_for(self, dataset: str) -> int:
        """The k of this curated set."""
        return next((int(each.partition("=")[2]) for each in self.k_of if each.partition("=")[0] == dataset), self.k)
