"""Recipes of curation."""

from troodon.curate.config import CurateConfig


def curate_demo() -> CurateConfig:
    """Curation of the embedded world with a small backbone trained on its own pool."""
    return CurateConfig(tokens="cls+mean")


def curate_small() -> CurateConfig:
    """For ten thousand to a million images: thresholds calibrated on the images themselves, four for each curated one.

    Perceptual hashes come first, which take no search: 54 to 65 % of attacked copies differ in two bits or less, and
    no two of 560 photos do. A small backbone with pixels beside it finds 86 % before its first wrong pair. Up to half a
    million images near-duplicates are searched exactly, 107 s for 200,000 on two cores; then by lists.
    """
    return CurateConfig(steps=("exact", "hash", "duplicate", "benchmark"))


def curate_paper() -> CurateConfig:
    """The pipeline as published (https://arxiv.org/abs/2304.07193, section 3 and appendix A); never run at its size.

    Its thresholds hold for SSCD, which belongs in --copies; whatever else finds copies is warned of. The paper took 32
    for each image of ImageNet-1k, which is --k-of imagenet1k=32, if its images lie in a folder of that name.
    """
    return CurateConfig(
        steps=("exact", "hash", "duplicate", "benchmark"),
        within_curated="keep",
        duplicate_space="plain",
        pixels=False,
        disguises=0,
        threshold=0.6,
        benchmark_threshold=0.45,
        benchmark_mode="component",
        gather="auto",
        retrieve_space="plain",
        collisions="multiplicity",
        k=4,
    )


def curate_balance() -> CurateConfig:
    """Without curated images: copies go, and half of the rest is drawn evenly over clusters of clusters.

    What is rare comes to be as frequent as what is common (https://arxiv.org/abs/2405.15613). Not yet run at size.
    """
    steps = ("exact", "hash", "duplicate", "benchmark")
    return CurateConfig(steps=steps, gather="balance", levels=(1000, 100, 10))
