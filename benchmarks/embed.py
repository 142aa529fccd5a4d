"""Embedding: images a second of `Backbone.optimized().features`, against transformers' Dinov2 with the same weights.

    python benchmarks/embed.py [--quick] [--size base] [--px 224] [--images 32] [--rounds 3] [--compile]
                               [--against auto | transformers | usual] [--record]
    python benchmarks/embed.py --pipeline [--quick] [--images 512] [--rounds 5] [--cores 1]

`embed_images_per_second` is ours, in the precision that it chooses itself, against the rival in its default precision,
fp32; the two other results compare both sides in one precision. The settings hold the differences of the features.
Without transformers (pip install 'troodon[bench]') the rival is the same network written the usual way
(benchmarks/usual.py); `against` in the settings says which it was. Images and weights are random and already in memory:
nothing is decoded.

`--pipeline` measures the rest: from files to vectors with a network of no cost (benchmarks/pipeline.py).
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import usual
from measure import argument_parser, device, finish, median_seconds, result
from pipeline import pipeline
from troodon.model.backbone import Backbone
from troodon.model.config import BASE, GIANT, LARGE, SMALL, Preprocessing
from troodon.model.weights import load_weights

SIZES = {"small": SMALL, "base": BASE, "large": LARGE, "giant": GIANT}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformers_model(size: str) -> tuple[Backbone, Callable[[Tensor, torch.dtype], Tensor]]:
    """Our backbone, and transformers' model with the same random weights as (images, dtype) -> class tokens."""
    from transformers import Dinov2Config, Dinov2Model

    vit = SIZES[size]
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=vit.dim, num_hidden_layers=vit.depth, num_attention_heads=vit.heads, image_size=518,
        patch_size=14, use_swiglu_ffn=vit.mlp == "swiglu", layerscale_value=0.1,
    )  # fmt: skip
    model = Dinov2Model(config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        backbone = load_weights(Path(folder))
    models = {dtype: Dinov2Model(config).eval() for dtype in DTYPES.values()}
    for dtype, copy in models.items():
        copy.load_state_dict(model.state_dict())
        copy.to(device(), dtype).requires_grad_(False)
    return backbone, lambda images, dtype: models[dtype](images.to(dtype)).last_hidden_state[:, 0].float()


def usual_model(size: str) -> tuple[Backbone, Callable[[Tensor, torch.dtype], Tensor]]:
    backbone = Backbone.random(replace(SIZES[size], layer_scale=0.1), Preprocessing()).to(device())

    def run(images: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            return usual.forward(backbone.vit, [images])[0].cls_BD.float()

    return backbone, run


def main() -> None:
    parser = argument_parser(__doc__, packages=("transformers",))
    parser.add_argument("--quick", action="store_true", help="ViT-S/14, 8 images")
    parser.add_argument("--size", choices=[*SIZES], default="base")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--images", type=int, help="32; of --pipeline 512")
    parser.add_argument("--rounds", type=int, help="3; of --pipeline 5")
    parser.add_argument("--pipeline", action="store_true", help="from files, with a network of no cost")
    parser.add_argument("--cores", type=int, default=0, help="of --pipeline; 0: all")
    parser.add_argument("--compile", action="store_true", help="compile our side only")
    parser.add_argument("--against", choices=["auto", "transformers", "usual"], default="auto")
    arguments = parser.parse_args()
    if arguments.pipeline:
        images, rounds = (128, 3) if arguments.quick else (512, 5)
        rows = pipeline(arguments.images or images, arguments.rounds or rounds, arguments.cores)
        finish(rows, arguments)
        return
    size, count = ("small", 8) if arguments.quick else (arguments.size, 32)
    count = arguments.images or count
    against = arguments.against
    if against == "auto":
        against = "transformers" if importlib.util.find_spec("transformers") else "usual"
        if against == "usual":
            print("transformers is not installed: the rival is the same network written the usual way", file=sys.stderr)
    backbone, rival = {"transformers": transformers_model, "usual": usual_model}[against](size)
    backbone = backbone.to(device())
    chosen = backbone.optimized("auto", compile=arguments.compile)
    images = torch.randn(count, 3, arguments.px, arguments.px, device=device())

    ours = {dtype: backbone.optimized(name, compile=arguments.compile) for name, dtype in DTYPES.items()}
    with torch.inference_mode():
        reference = backbone.features(images[:4]).cls
        differences = {
            name: ((x - reference).norm() / reference.norm()).item()
            for name, x in {
                "ours": chosen.features(images[:4]).cls, "rival": rival(images[:4], torch.float32),
                "rival in bf16": rival(images[:4], torch.bfloat16),
            }.items()
        }  # fmt: skip
        functions = {("ours", dtype): lambda b=b: b.features(images) for dtype, b in ours.items()}
        functions |= {("rival", dtype): lambda d=dtype: rival(images, d) for dtype in DTYPES.values()}
        times = median_seconds([*functions.values()], arguments.rounds or 3)
        rates = {side: count / seconds for side, seconds in zip(functions, times, strict=True)}
    settings = {
        "size": size, "px": arguments.px, "images": count, "against": against, "compile": arguments.compile,
        "differences": differences,
    }  # fmt: skip
    names = {dtype: name for name, dtype in DTYPES.items()}
    pairs = [("", chosen.compute, torch.float32), *((f"_{name}", dtype, dtype) for name, dtype in DTYPES.items())]
    finish([
        result(
            f"embed_images_per_second{suffix}", rates["ours", dtype], rates["rival", rival_dtype], "images/s",
            more_is_better=True, dtype=names[dtype], rival_dtype=names[rival_dtype], **settings,
        )
        for suffix, dtype, rival_dtype in pairs
    ], arguments)  # fmt: skip


if __name__ == "__main__":
    main()
