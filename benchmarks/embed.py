"""Embedding: images a second of `Backbone.faster().features`, against transformers' Dinov2 with the same weights.

    python benchmarks/embed.py [--quick] [--size base] [--px 224] [--images 32] [--rounds 3] [--compile]
                               [--against auto | transformers | usual]

`embed_images_per_second` is ours, with the precision that it chooses by itself, against the rival as it comes, in fp32;
the two other lines compare in one precision each. The features of both are compared as well. Without transformers
(pip install 'troodon[bench]') the rival is the same network written the usual way (benchmarks/usual.py); `against` in
the settings says which it was. On random images and weights, which are there already: nothing is decoded.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import usual
from measure import device, finish, line, seconds
from troodon.model.backbone import Backbone, open_weights
from troodon.model.config import BASE, GIANT, LARGE, SMALL, Preprocessing

SIZES = {"small": SMALL, "base": BASE, "large": LARGE, "giant": GIANT}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def of_transformers(size: str) -> tuple[Backbone, Callable[[Tensor, torch.dtype], Tensor]]:
    """Their network with random weights, ours with the same; theirs as images, dtype -> class tokens."""
    from transformers import Dinov2Config, Dinov2Model

    like = SIZES[size]
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=like.dim, num_hidden_layers=like.depth, num_attention_heads=like.heads, image_size=518,
        patch_size=14, use_swiglu_ffn=like.mlp == "swiglu", layerscale_value=0.1,
    )  # fmt: skip
    model = Dinov2Model(config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        backbone = open_weights(Path(folder))
    models = {dtype: Dinov2Model(config).eval() for dtype in DTYPES.values()}
    for dtype, each in models.items():
        each.load_state_dict(model.state_dict())
        each.to(device(), dtype).requires_grad_(False)
    return backbone, lambda images, dtype: models[dtype](images.to(dtype)).last_hidden_state[:, 0].float()


def of_usual(size: str) -> tuple[Backbone, Callable[[Tensor, torch.dtype], Tensor]]:
    backbone = Backbone.random(replace(SIZES[size], layer_scale=0.1), Preprocessing()).to(device())

    def run(images: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            return usual.forward(backbone.vit, [images])[0].cls_BD.float()

    return backbone, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-S/14, 8 images")
    parser.add_argument("--size", choices=[*SIZES], default="base")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours only")
    parser.add_argument("--against", choices=["auto", "transformers", "usual"], default="auto")
    asked = parser.parse_args()
    size, count = ("small", 8) if asked.quick else (asked.size, asked.images)
    against = asked.against
    if against == "auto":
        against = "transformers" if importlib.util.find_spec("transformers") else "usual"
        if against == "usual":
            print("transformers is not installed: the rival is the same network written the usual way", file=sys.stderr)
    backbone, rival = {"transformers": of_transformers, "usual": of_usual}[against](size)
    backbone = backbone.to(device())
    chosen = backbone.faster("auto", compile=asked.compile)
    images = torch.randn(count, 3, asked.px, asked.px, device=device())

    ours = {dtype: backbone.faster(name, compile=asked.compile) for name, dtype in DTYPES.items()}
    with torch.inference_mode():
        exact = backbone.features(images[:4]).cls
        differences = {
            name: ((x - exact).norm() / exact.norm()).item()
            for name, x in {
                "ours": chosen.features(images[:4]).cls, "rival": rival(images[:4], torch.float32),
                "rival in bf16": rival(images[:4], torch.bfloat16),
            }.items()
        }  # fmt: skip
        sides = {("ours", dtype): lambda b=b: b.features(images) for dtype, b in ours.items()}
        sides |= {("rival", dtype): lambda d=dtype: rival(images, d) for dtype in DTYPES.values()}
        rates = {side: count / took for side, took in zip(sides, seconds([*sides.values()], asked.rounds), strict=True)}
    settings = {
        "size": size, "px": asked.px, "images": count, "against": against, "compile": asked.compile,
        "differences": differences,
    }  # fmt: skip
    names = {dtype: name for name, dtype in DTYPES.items()}
    pairs = [("", chosen.compute, torch.float32), *((f"_{name}", dtype, dtype) for name, dtype in DTYPES.items())]
    finish([
        line(
            f"embed_images_per_second{suffix}", rates["ours", mine], rates["rival", theirs], "images/s",
            more_is_better=True, dtype=names[mine], rival_dtype=names[theirs], **settings,
        )
        for suffix, mine, theirs in pairs
    ])  # fmt: skip


if __name__ == "__main__":
    main()
