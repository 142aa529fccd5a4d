"""What a notebook shows of features and of a backbone: a short table of shapes, and of what they are."""

from typing import Any

from troodon.config import pair
from troodon.text import html_table, plural


def features_table(features: Any) -> str:
    """The table of a `Features`."""
    images, grids = len(features.cls), features.patches
    if isinstance(grids, list):
        patches = f"{len(grids)} grids, such as {shape(grids[0])}" if grids else "none"
    else:
        patches = shape(grids)
    rows = [
        ("cls", shape(features.cls), "one vector for each image: the class token"),
        ("patches", patches, "a vector for each patch, by row and column"),
    ]
    if features.registers.shape[1]:
        rows.append(("registers", shape(features.registers), "further tokens, which belong to no patch"))
    if features.blocks:
        rows.append(("blocks", str(len(features.blocks)), "the same after other blocks, in order"))
    return html_table(f"Features of {plural(images, 'image')}, {features.cls.dtype}, on {features.cls.device}", rows)


def backbone_table(backbone: Any) -> str:
    """The table of a `Backbone`."""
    config, seen = backbone.config, backbone.preprocessing
    height, width = pair(seen.crop)
    grid = f"{height // config.patch}, {width // config.patch}"
    parameters = sum(p.numel() for p in backbone.vit.parameters())
    rows = [
        ("network", f"ViT of {plural(config.depth, 'block')}, {config.dim} channels", f"{parameters:,} parameters"),
        ("images", f"{height} x {width} pixels", f"{plural(backbone.channels, 'channel')}, resized and cropped"),
        ("features(images).cls", f"(images, {config.dim})", "one vector for each image"),
        ("features(images).patches", f"(images, {grid}, {config.dim})", f"of {config.patch} pixels a side"),
        ("computes on", str(backbone.device), str(backbone.compute).removeprefix("torch.")),
    ]
    return html_table(f"Backbone {backbone.name}", rows)


def shape(tensor: Any) -> str:
    return str(tuple(tensor.shape))
