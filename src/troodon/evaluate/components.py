"""Principal components of patch tokens, as colours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Shape suffixes: h w patches along height and width, D channels, T patches of all images, C components.


@dataclass(frozen=True)
class PatchColours:
    """The first three principal components of the patches of some images, as red, green and blue."""

    colours: list[np.ndarray]  # uint8 (h, w, 3) of each image; the background is black
    foreground: list[np.ndarray]  # bool (h, w) of each image; all patches, unless the background was looked for
    variance: np.ndarray  # (3,): the share of the variance of the foreground that each component explains


def patch_colours(patches: Sequence[np.ndarray], *, foreground: bool = False) -> PatchColours:
    """Principal components over the patches (h, w, D) of all images together, so that a colour means the same in all.

    Each component is scaled from its 1st to its 99th percentile. Its sign is such that the channel with the largest
    weight counts positive, which depends neither on the order of images nor on how they were batched.

    With `foreground`, the sign of the first component divides the patches of all images in two; the side of which a
    smaller share lies at the borders of images is the foreground. The rest stays black, and the components are those of
    the foreground alone (DINOv2, section 7.6).
    """
    grids = [hwD.shape[:2] for hwD in patches]
    x_TD = np.concatenate([hwD.reshape(-1, hwD.shape[-1]) for hwD in patches]).astype(np.float64)
    foreground_T = np.ones(len(x_TD), dtype=bool)
    if foreground:
        first_T = principal_components(x_TD, 1)[0][:, 0]
        at_border_T = np.concatenate([_border(*grid).ravel() for grid in grids])
        sides = first_T > 0, first_T < 0
        foreground_T = min(sides, key=lambda side_T: (side_T & at_border_T).sum() / max(1, side_T.sum()))
    values_T3, variance_3 = np.zeros((len(x_TD), 3)), np.zeros(3)
    if foreground_T.any():
        values, variance_3 = principal_components(x_TD[foreground_T], 3)
        low, high = np.percentile(values, [1, 99], axis=0)
        values_T3[foreground_T] = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours_T3, ends = (values_T3 * 255).round().astype(np.uint8), np.cumsum([h * w for h, w in grids])[:-1]
    return PatchColours(
        [x.reshape(*grid, 3) for x, grid in zip(np.split(colours_T3, ends), grids, strict=True)],
        [x.reshape(grid) for x, grid in zip(np.split(foreground_T, ends), grids, strict=True)],
        variance_3,
    )


def principal_components(x_TD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components (T, count) of rows, and the share of the variance that each explains (count,).

    The largest channel of each axis is positive.
    """
    x_TD = x_TD - x_TD.mean(0)
    values_D, axes_DD = np.linalg.eigh(x_TD.T @ x_TD)
    axes_DC = axes_DD[:, ::-1][:, :count]
    axes_DC = axes_DC * np.sign(np.take_along_axis(axes_DC, np.abs(axes_DC).argmax(0)[None], 0))
    projected_TC = x_TD @ axes_DC
    share_C = values_D[::-1][:count].clip(0) / (values_D.clip(0).sum() or 1)
    missing = count - projected_TC.shape[1]
    return np.pad(projected_TC, ((0, 0), (0, missing))), np.pad(share_C, (0, missing))


def _border(h: int, w: int) -> np.ndarray:
    """Which patches (h, w) lie at the border of an image."""
    border_hw = np.ones((h, w), dtype=bool)
    border_hw[1:-1, 1:-1] = False
    return border_hw
