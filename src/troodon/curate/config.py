"""Settings of curation. This module does not import torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from troodon.config import UsageError, to_dict, within

Tokens = Literal["cls", "cls+mean"]
SpaceKind = Literal["plain", "centred", "whitened"]
DropStep = Literal["exact", "hash", "duplicate", "benchmark"]
MARK_PATTERN = re.compile(r"(?P<score>[\w.]+(:\w+)?)(?P<sign>[<>])(?P<limit>-?\d+(\.\d+)?)")


@dataclass(frozen=True)
class CurateConfig:
    """Settings from a pool of images to a selection (https://arxiv.org/abs/2304.07193, section 3 and appendix A)."""

    tokens: Tokens = "cls"
    """Embedding of an image: its class token, or this and the mean of its patch tokens."""
    steps: tuple[DropStep, ...] = ("exact", "duplicate", "benchmark")
    """Steps that drop images before gathering: any of exact, hash, duplicate, benchmark, in this order."""
    within_curated: Literal["keep", "drop"] = "keep"
    """Duplicates among the curated images: keep every readable image, or drop duplicates here too."""
    verify: Literal["geometric", "none"] = "geometric"
    """What decides that two images are copies. geometric: a closer look at candidates (copies/verify.py): an affine map
    that takes one onto the other, after which their pixels agree; look-alikes stay. none: the cosine of their
    embeddings above a threshold, as in the paper."""
    candidates: int = 10
    """verify geometric: images, at most, that an image is compared with from each source of candidates."""
    prefer: tuple[str, ...] = ()
    """verify geometric: of copies, images of these folders are kept first, the first folder before the others."""
    keep_by: str = ""
    """verify geometric: of copies, the one with the highest score is kept: a score as of marks, such as sharpness or
    my.module:score. Without it, the one that most looks like an original (copies/keeper.py)."""
    pixels: bool = True
    """Find copies by 8 x 8 pixels as well as by the network (see encoder.py)."""
    hash_radius: int = 2
    """Step hash: maximum number of bits, of 64, in which the perceptual hashes of copies differ."""
    duplicate_space: SpaceKind = "whitened"
    """Space in which embeddings are compared to find near-duplicates (see space.py)."""
    threshold: float | None = None
    """Cosine above which two images are near-duplicates, or with verify geometric, candidates. None: calibrated on the
    images themselves; for candidates, the cosine that three others of an image exceed."""
    false_merges: float = 0.001
    """verify none: number of other images, on average, that one image may be wrongly taken for a copy of. The actual
    number is smaller, because the threshold is extrapolated conservatively (docs/log.md): at 0.01 a few of 10,000
    images are lost, at 0.001 none was."""
    calibration_images: int = 250
    """Number of images that are drawn to choose a threshold; with verify none they are attacked and compared too."""
    recheck_above: int = 4
    """verify none: larger groups of near-duplicates may be chains: each of their members must resemble the kept image
    itself."""
    search: Literal["auto", "exact", "lists", "faiss"] = "auto"
    """Search for near-duplicates: exact, lists, faiss, or auto: exact up to half a million images, then lists."""
    rounds: int = 2
    """Number of searches. Methods that are not exact search again among the remaining images."""
    benchmark_threshold: float | None = None
    """The same as threshold, with a benchmark image."""
    benchmark_false_merges: float = 1.0
    """verify none: number of images, on average, that are wrongly dropped for one benchmark image."""
    benchmark_attacks: int = 12
    """verify none: number of attacked copies of each benchmark image (rotated, with text, in a window and so on) that
    images are compared with. More copies cost more time and find more leaks. At most 16, the most useful first; 0:
    none."""
    benchmark_mode: Literal["direct", "component"] = "direct"
    """Images dropped for a benchmark image: those that resemble it, or also all that resemble these, and so on."""
    gather: Literal["sample", "cluster", "auto", "balance", "all"] = "sample"
    """How images of the pool are gathered. sample: the nearest to each curated image. cluster: images of clusters that
    contain curated images. auto: sample for curated sets of more than `large` images, cluster for others. balance: an
    even sample. all: all images."""
    retrieve_space: SpaceKind = "whitened"
    """Space in which embeddings are compared to gather."""
    k: int = 4
    """sample: number of uncurated images retrieved for each curated image."""
    k_of: tuple[str, ...] = ()
    """sample: values of k for single curated sets, such as imagenet=32, named by the first part of their paths."""
    min_similarity: float = -1.0
    """sample: minimum cosine of a retrieved image."""
    collisions: Literal["unique", "multiplicity", "fill"] = "unique"
    """sample: an image retrieved several times counts once (unique), counts as often as it was retrieved, by its weight
    (multiplicity), or belongs to the nearest query while the other queries take their next image (fill)."""
    large: int = 1_000_000
    """auto: curated sets of more images than this are gathered by sample."""
    clusters: int = 100_000
    """cluster: number of clusters, at most the number of images in the pool."""
    more_than: int = 3
    """cluster: a cluster is chosen if it contains more curated images of one set than this."""
    per_cluster: int = 10_000
    """cluster: maximum number of images taken from a cluster."""
    cap: int = 1_000_000
    """cluster: maximum number of images gathered for one curated set."""
    target: int = 0
    """balance: number of uncurated images to draw; 0: half of them."""
    levels: tuple[int, ...] = (1000, 100, 10)
    """balance: number of clusters of images, of clusters of these clusters, and so on."""
    marks: tuple[str, ...] = ()
    """Scores to write and conditions to mark images by, such as sharpness<0.01, aspect>4, side<64 or
    my.module:score>0.5. No image is dropped because of a mark."""
    batch: int = 64
    """Batch size of the backbone."""
    partition_size: int = 20_000
    """Images per unit of work when images are read and embedded. A killed process loses one unit."""
    threads: int = 0
    """Threads that read and decode; 0: one per processor, at most 16."""
    seed: int = 0
    """Seed of all random choices: calibration images and their attacks, initial centroids, images of a cluster."""
    RENAMED: ClassVar[dict[str, str]] = {
        "disguises": "benchmark_attacks", "minimum": "min_similarity", "part": "partition_size",
    }  # fmt: skip

    def __post_init__(self) -> None:
        within(self, "", -1, 1, "threshold", "benchmark_threshold", "min_similarity")
        within(self, "", 1, None, "k", "batch", "partition_size", "recheck_above", "calibration_images", "rounds")
        within(self, "", 1, 1000, "candidates")
        within(self, "", 1, None, "clusters", "levels", "per_cluster", "cap")
        within(self, "", 0, None, "threads", "seed", "more_than", "large", "target")
        within(self, "", 0, 8, "hash_radius")
        within(self, "", 0, 16, "benchmark_attacks")
        for name in ("false_merges", "benchmark_false_merges"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} {getattr(self, name)}: must be above 0; 0.01 is one image in a hundred")
        for mark in self.marks:
            if not MARK_PATTERN.fullmatch(mark):
                raise UsageError(f"marks {mark!r}: expected a score, < or >, and a number, such as sharpness<0.01")
        for setting in self.k_of:
            if not re.fullmatch(r"[^=]+=[1-9]\d*", setting):
                raise UsageError(f"k_of {setting!r}: expected a curated set and its k, such as imagenet=32")

    def unread(self) -> list[str]:
        """The settings that were changed and are not read, because of others, with what reads them."""
        default = CurateConfig()
        return [f"{name} {getattr(self, name)}: read with {what} only" for names, what, is_read in READ_WITH
                for name in names if getattr(self, name) != getattr(default, name) and not is_read(self)]  # fmt: skip

    def k_for(self, dataset: str) -> int:
        """Return the k of this curated set."""
        pairs = (setting.partition("=") for setting in self.k_of)
        return next((int(k) for name, _, k in pairs if name == dataset), self.k)

    def recorded(self, *names: str) -> dict:
        """Return these settings (all without names) as manifests and fingerprints record them: by their first names."""
        values, first_names = to_dict(self), {new: old for old, new in self.RENAMED.items()}
        return {first_names.get(name, name): values[name] for name in names or values}


# Settings, what they are read with, and whether they are.
READ_WITH: tuple[tuple[tuple[str, ...], str, Callable[[CurateConfig], bool]], ...] = (
    (
        ("false_merges", "benchmark_false_merges", "benchmark_attacks", "recheck_above"),
        "--verify none",
        lambda c: c.verify == "none",
    ),
    (
        ("benchmark_threshold", "benchmark_mode", "benchmark_false_merges", "benchmark_attacks"),
        "--benchmark",
        lambda c: "benchmark" in c.steps,
    ),
    (("candidates",), "--verify geometric", lambda c: c.verify == "geometric"),
    (("hash_radius",), "the step hash", lambda c: "hash" in c.steps),
    (
        ("k", "k_of", "min_similarity", "collisions"),
        "--gather sample or auto",
        lambda c: c.gather in ("sample", "auto"),
    ),
    (
        ("clusters", "more_than", "per_cluster", "cap"),
        "--gather cluster or auto",
        lambda c: c.gather in ("cluster", "auto"),
    ),
    (("large",), "--gather auto", lambda c: c.gather == "auto"),
    (("target", "levels"), "--gather balance", lambda c: c.gather == "balance"),
    (("retrieve_space",), "--gather other than all", lambda c: c.gather != "all"),
)
