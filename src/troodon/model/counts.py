"""What a network of a config has and computes, counted: parameters and activations of its stem, FLOPs. No torch."""

from itertools import pairwise

from troodon.model.config import ViTConfig, stem_widths


def stem_products(config: ViTConfig) -> int:
    """Multiply-adds that make the vector of one patch."""
    if config.stem == "linear":
        return config.dim * config.channels * config.patch**2
    widths, products = (config.channels, *stem_widths(config)), 0
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        products += (config.patch >> number) ** 2 * 9 * before * after
    return products + widths[-1] * config.dim


def stem_parameters(config: ViTConfig) -> int:
    """Weights and biases of what makes vectors of patches."""
    if config.stem == "linear":
        return config.dim * (config.channels * config.patch**2 + 1)
    widths = (config.channels, *stem_widths(config))
    convolutions = sum((9 * before + 2) * after for before, after in pairwise(widths))  # with their norms
    return convolutions + config.dim * (widths[-1] + 1)


def stem_activations(config: ViTConfig) -> int:
    """Numbers that a convolutional stem keeps of one patch for the backward pass, besides its pixels: those before and
    after each norm."""
    widths = stem_widths(config) if config.stem == "convolutional" else ()
    return 2 * sum((config.patch >> number) ** 2 * width for number, width in enumerate(widths, start=1))


def flops(config: ViTConfig, grid: tuple[int, int], kept: float = 1.0) -> float:
    """Floating-point operations of one image's forward pass: two per multiply-add of every matrix product.

    `kept` is the share of the images that go through a branch, with stochastic depth.
    """
    patches = grid[0] * grid[1]
    tokens = 1 + config.registers + patches
    mlp = (2 if config.mlp == "gelu" else 3) * config.dim * config.mlp_hidden
    per_token = 4 * config.dim**2 + 2 * tokens * config.dim + mlp
    return 2 * (kept * config.depth * tokens * per_token + patches * stem_products(config))
