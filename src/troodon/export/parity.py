"""Whether an export says the same as the backbone: both see the same images, at several sizes and batch sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from troodon.config import pair
from troodon.export.network import Network
from troodon.model.config import Preprocessing
from troodon.progress import watched

Read = Callable[[Tensor], dict[str, Tensor]]  # images (B, C, H, W) -> outputs by name, as those of `Network`
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}  # largest difference of a token, as a share of its length
SHORTEST = 0.01  # RMS below which the length of a token is not what its difference is measured by


class ExportDiffers(RuntimeError):
    """An export that was read back says something else than the backbone. Nothing of it is kept."""


@dataclass(frozen=True)
class Reader:
    """How an export is read back, and what its library does in its own way."""

    name: str  # the library, with its version
    read: Read
    resizes_alike: bool = True  # whether its rule for positions at other grids than the learned one is ours
    rule: str = ""  # that rule in words, where it is not
    notes: dict[str, Any] = field(default_factory=dict)  # what else the user should know: goes into the report


def cases(network: Network, preprocessing: Preprocessing) -> list[tuple[int, int, int]]:
    """Number of images, height and width of each comparison: five sizes, of which one is that of the preprocessing, one
    that of the learned positions if there are any, and two are not square."""
    config = network.vit.config
    patch, grid = config.patch, config.grid if config.positions == "learned" else 9
    height, width = (max(patch, round(side / patch) * patch) for side in pair(preprocessing.crop))
    wanted = [(1, height, width), (3, height, width), (1, grid * patch, grid * patch)]
    wanted += [(2, 5 * patch, 8 * patch), (5, 3 * patch, 2 * patch), (4, 7 * patch, 7 * patch)]
    return list(dict.fromkeys(wanted))


@torch.no_grad()
def compare(network: Network, reader: Reader, preprocessing: Preprocessing, tolerance: float) -> list[dict]:
    """A row for each case and output: the largest difference of a token as a share of its length, and of a number.

    At sizes at which the library resizes positions by another rule, rows have `rule` in place of `tolerance`. Raises
    ExportDiffers for any other difference above the tolerance.
    """
    rows, config, random = [], network.vit.config, torch.Generator().manual_seed(0)
    for images, height, width in watched(cases(network, preprocessing), "export", "sizes read back"):
        x_BCHW = torch.randn(images, config.channels, height, width, generator=random)
        ours, theirs = network(x_BCHW), reader.read(x_BCHW)
        own_grid = config.positions == "learned" and height == width == config.grid * config.patch
        for name, output in theirs.items():
            row: dict[str, Any] = {"images": images, "height": height, "width": width, "output": name}
            row |= _difference(ours[name], output.float())
            row |= {"tolerance": tolerance} if own_grid or reader.resizes_alike else {"rule": reader.rule}
            rows.append(row)
            if "tolerance" in row and not row["difference"] <= tolerance:
                size = f"{images} x {height} x {width}"
                said = f"{name} differs by {row['difference']:.1e} of its length at {size}; at most {tolerance:g}"
                raise ExportDiffers(f"{reader.name} reads something else: {said} is allowed. Nothing was kept")
    return rows


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    if ours.shape != theirs.shape:
        raise ExportDiffers(f"an output of shape {tuple(theirs.shape)} in place of {tuple(ours.shape)}")
    if not ours.numel():
        return {"difference": 0.0, "largest": 0.0}
    length = ours.norm(dim=-1).clamp(min=SHORTEST * ours.shape[-1] ** 0.5)
    apart = ours - theirs
    return {"difference": (apart.norm(dim=-1) / length).max().item(), "largest": apart.abs().max().item()}


def summary(rows: list[dict]) -> dict:
    """The worst difference of rows that a tolerance holds for, and of each size at which another rule does."""
    held = max((row["difference"] for row in rows if "tolerance" in row), default=None)
    sizes = {(row["height"], row["width"]): row["rule"] for row in rows if "rule" in row}
    others = [
        {
            "height": height,
            "width": width,
            "rule": rule,
            "difference": max(r["difference"] for r in rows if (r["height"], r["width"]) == (height, width)),
        }
        for (height, width), rule in sizes.items()
    ]
    if held is None:
        result = "tokens differ at every size"
    elif others:
        result = f"tokens differ by at most {held:.1e} of their length at sizes at which it has our rule for positions"
    else:
        result = f"tokens differ by at most {held:.1e} of their length"
    return {"result": result, "difference": held, "other_rule": others}
