"""Recipes of curation."""

from troodon.curate.config import CurateConfig


def curate_demo() -> CurateConfig:
    """Curation of the embedded world with a small backbone trained on its pool."""
    return CurateConfig(tokens="cls+mean")


def curate_small() -> CurateConfig:
    """For ten thousand to a million images: copies by a closer look, four images per curated one.

    Of 630 edited copies of 70 photographs, among 440 others, 628 go and nothing else does (docs/log.md). Candidates by
    vectors are searched exactly up to half a million images (107 s for 200,000 on two cores), then by lists.
    """
    return CurateConfig(steps=("exact", "duplicate", "benchmark"))


def curate_paper() -> CurateConfig:
    """The published pipeline (https://arxiv.org/abs/2304.07193, section 3 and appendix A); not yet run at its size.

    Its thresholds hold for SSCD, which is passed as --copies; any other network gives a warning. The paper retrieved 32
    images for each image of ImageNet-1k: --k-of imagenet1k=32, if its images are in a folder of that name.
    """
    return CurateConfig(
        steps=("exact", "hash", "duplicate", "benchmark"),
        verify="none",
        within_curated="keep",
        duplicate_space="plain",
        pixels=False,
        benchmark_attacks=0,
        threshold=0.6,
        benchmark_threshold=0.45,
        benchmark_mode="component",
        gather="auto",
        retrieve_space="plain",
        collisions="multiplicity",
        k=4,
    )


def curate_balance() -> CurateConfig:
    """Without curated images: drops copies and draws half of the rest evenly over hierarchical clusters.

    Rare content becomes as frequent as common content (https://arxiv.org/abs/2405.15613). Not yet run at size.
    """
    steps = ("exact", "duplicate", "benchmark")
    return CurateConfig(steps=steps, gather="balance", levels=(1000, 100, 10))
