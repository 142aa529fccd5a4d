"""Block masks: their number, sizes and shapes, and that drawing always ends."""

import math

import numpy as np
import pytest
import torch

from troodon.views import masks
from troodon.views.config import CropsConfig, MasksConfig, PhotometricConfig
from troodon.views.crops import generator
from troodon.views.loader import Loader
from troodon.views.masks import block_mask, draw_masks, draw_sizes

GRID, HALF = (16, 16), MasksConfig()


def drawn(count: int, grid: tuple[int, int], config: MasksConfig = HALF, step: int = 0) -> torch.Tensor:
    sizes_N = draw_sizes(count, grid, config, generator(0, -1, step))
    return draw_masks(sizes_N, range(count), grid, lambda crop: generator(0, -1, step, 1 + crop))


class NoImages:
    """An index of ten images, for a loader that is asked for masks only."""

    source_lengths = ()

    def __len__(self) -> int:
        return 10


def loader(rank: int, world_size: int) -> Loader:
    crops, colours = CropsConfig(global_px=16, local_px=8), PhotometricConfig()
    return Loader(NoImages(), crops, colours, MasksConfig(), 2, 16, seed=3, rank=rank, world_size=world_size)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_exactly_the_share_of_crops_is_masked(count: int, share: float) -> None:
    masks_NP = drawn(count, GRID, MasksConfig(share=share))
    assert masks_NP.shape == (count, 256)
    assert masks_NP.dtype == torch.bool
    assert int(masks_NP.any(1).sum()) == int(count * share)


def test_each_slice_of_the_ratios_gives_one_mask() -> None:
    grid, masked = (37, 37), 20
    edges = np.linspace(0.1, 0.5, masked + 1)
    spread = []
    for step in range(5):
        masks_NP = drawn(2 * masked, grid, step=step)
        sizes = np.sort(masks_NP.sum(1).numpy())[-masked:]
        assert (sizes >= (1369 * edges[:-1]).astype(int) - 4).all()  # the few patches by which some fall short
        assert (sizes <= (1369 * edges[1:]).astype(int)).all()
        spread += list((sizes / 1369 - edges[:-1]) / (edges[1] - edges[0]))
    assert abs(np.mean(spread) - 0.5) < 4 * math.sqrt(1 / 12 / len(spread)) + 0.03  # uniform within its slice
    assert np.std(spread) > 0.2


def test_sizes_are_shuffled_over_the_crops() -> None:
    sizes_SN = np.stack([drawn(16, (8, 8), step=s).sum(1).numpy() for s in range(300)])
    share_N, mean = (sizes_SN > 0).mean(0), sizes_SN.mean()
    assert np.abs(share_N - 0.5).max() < 4 * 0.5 / math.sqrt(300)
    assert np.abs(sizes_SN.mean(0) - mean).max() < 4 * sizes_SN.std() / math.sqrt(300)


def test_masks_are_a_function_of_the_generators() -> None:
    first, again, other = (drawn(8, GRID, step=step) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_masks_of_different_crops_have_nothing_in_common() -> None:
    first, *others = drawn(16, GRID, MasksConfig(share=1.0, ratio=(0.3, 0.3))).unique(dim=0)
    assert len(others) == 15
    overlaps = [(first & other).sum() / first.sum() for other in others]
    assert np.mean(overlaps) == pytest.approx(0.3, abs=0.15)


def test_a_rank_draws_the_masks_of_its_own_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks together have the masks that one rank would have; each draws no others, nor does a part of a rank."""
    whole_GBP = loader(0, 1).draw_masks(loader(0, 1).positions(5), (8, 8))
    calls: list[int] = []
    monkeypatch.setattr(
        masks, "block_mask", lambda grid, size, random: calls.append(size) or block_mask(grid, size, random)
    )
    for rank in range(4):
        positions = loader(rank, 4).positions(5)
        calls.clear()
        parts = [loader(rank, 4).draw_masks(part, (8, 8)) for part in (positions[:1], positions[1:])]
        own_GBP = whole_GBP[:, 4 * rank : 4 * rank + 4]
        assert torch.equal(torch.cat(parts, 1), own_GBP)
        assert len(calls) == int(own_GBP.any(2).sum())


def test_few_masks_are_incomplete_and_by_few_patches() -> None:
    random, short = np.random.default_rng(0), []
    for ratio in np.linspace(0.1, 0.5, 2000):
        target = int(256 * ratio)
        short.append(target - block_mask(GRID, target, random).sum())
    short = np.array(short)
    assert short.min() == 0
    assert 0.055 < (short > 0).mean() < 0.10  # 7.6 % in 30,000 draws, and in a separate simulation
    assert (short > 3).mean() < 0.002


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (8, 1), (2, 2), (2, 3), (4, 4), (3, 20)])
def test_drawing_ends_on_tiny_grids_and_never_exceeds_the_target(grid: tuple[int, int]) -> None:
    random, patches = np.random.default_rng(0), grid[0] * grid[1]
    for target in range(patches + 1):
        for _ in range(20):
            mask_hw = block_mask(grid, target, random)
            assert mask_hw.shape == grid
            assert mask_hw.sum() <= target
    some = any(block_mask(grid, patches // 2, random).any() for _ in range(20))
    assert some if patches >= 16 else min(grid) > 1 or not some
    assert drawn(6, grid).shape == (6, patches)


def test_the_first_block_is_a_rectangle_of_the_drawn_size_and_shape() -> None:
    """With a target of four patches and no overlap to use, most masks are one block of four: 2x2, 1x4 or 4x1."""
    random, shapes = np.random.default_rng(0), []
    for _ in range(600):
        mask_hw = block_mask((12, 20), 4, random)
        h, w = (np.flatnonzero(mask_hw.any(axis)) for axis in (1, 0))
        if mask_hw.sum() == 4 and (h[-1] - h[0] + 1) * (w[-1] - w[0] + 1) == 4:
            shapes.append((int(h[-1] - h[0] + 1), int(w[-1] - w[0] + 1)))
    # |log aspect| below ln(25/16) rounds to 2x2, above ln(49/16) to 1x4 or 4x1; between them to 3 or 6 patches.
    assert len(shapes) > 300
    assert {(2, 2), (1, 4), (4, 1)} == set(shapes)
    flat, tall = shapes.count((1, 4)), shapes.count((4, 1))
    assert abs(flat - tall) < 4 * math.sqrt(flat + tall)


def test_masked_patches_lie_together() -> None:
    """Far more neighbours of a masked patch are masked than by chance."""
    random = np.random.default_rng(0)
    together = []
    for _ in range(100):
        mask_hw = block_mask(GRID, 64, random)
        together.append((mask_hw[1:] & mask_hw[:-1]).sum() / mask_hw[:-1].sum())
    assert np.mean(together) > 0.7  # by chance 0.25


def test_every_patch_is_masked_at_times() -> None:
    random = np.random.default_rng(0)
    share_hw = np.mean([block_mask((8, 8), 20, random) for _ in range(400)], axis=0)
    assert share_hw.min() > 0.03
    assert share_hw[0].mean() == pytest.approx(share_hw[-1].mean(), abs=0.06)
    assert share_hw[:, 0].mean() == pytest.approx(share_hw[:, -1].mean(), abs=0.06)
