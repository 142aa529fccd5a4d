"""Make every picture of the pages, in docs/pictures/, from the embedded world: five minutes on one processor core.

    python docs/pictures.py             # or: make pictures

The network is trained here by the recipe `demo`, so the pictures show what a toy sees.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import troodon
from troodon.recipes import own
from troodon.world.scene import WorldConfig
from troodon.world.write import write_world

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 800  # pixels, of a picture at most


def world(folder: Path, px: int) -> Path:
    """A world of few pictures of a side of `px` pixels."""
    counts = WorldConfig(px=px, scale=(0.6, 0.9), clean=600, copies=0, off_topic=0, broken=0, curated=4, train=8, val=8)
    write_world(folder, 0, counts)
    return folder


def shrink(path: Path) -> None:
    """A picture in 128 colours, not wider than WIDTH."""
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    rgb.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    rgb.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def make(work: Path) -> None:
    """Draw all pictures; `work` is for the world and the run that they are made of."""
    pictures = world(work / "world", 128)
    pool, labelled = pictures / "uncurated", pictures / "evaluation" / "val"
    run = work / "run"
    troodon.pretrain("demo", str(pool), run, settings={"threads": 1}, devices=1)
    troodon.show_crops(own.demo(), str(pool), FOLDER / "crops.png", images=4)
    chosen = [str(path) for path in sorted(labelled.glob("*/*"))[::16]]
    troodon.show_pca(run, chosen, FOLDER / "pca.png", size=128)
    troodon.show_attention(run, chosen[:3], FOLDER / "attention.png", size=128)
    troodon.show_neighbours(run, str(labelled), FOLDER / "neighbours.png", query=chosen[:3], k=5)

    for path in FOLDER.glob("*.png"):
        shrink(path)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        make(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
