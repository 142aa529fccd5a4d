"""Make every picture of the pages, in docs/pictures/, from the embedded world: six minutes on one processor core.

    python docs/pictures.py                     # or: make pictures
    python docs/pictures.py health              # those of a name: sight, health

The networks are trained here by the recipes `demo` and `demo_dino`, so the pictures show what a toy sees.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import troodon
from troodon.recipes import own
from troodon.report.artifacts import Artifact, open_artifact
from troodon.report.charts import HEIGHT, overlay_chart
from troodon.report.charts import WIDTH as CHART_WIDTH
from troodon.report.markup import SPACE, Markup, h
from troodon.report.runs import Run
from troodon.report.training import EXACT, FROM_ZERO, HEALTH, LEARNING, SHARES, values
from troodon.world.scene import WorldConfig
from troodon.world.write import write_world

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 800  # pixels, of a picture at most
CURVES = ("loss", "mean_target_entropy", "prototypes_used", "feature_cosine", "effective_rank", "knn")
# A centre that never moves, and no Sinkhorn-Knopp: all images get the same target.
COLLAPSED = {
    "objective": {"targets": "centring", "centre_momentum": 1.0},
    "schedules": {"teacher_temperature": {"peak": 0.04, "end": 0.04, "shape": "constant"}},
}
STYLE = """
svg { font: 12px Inter, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
svg svg { overflow: visible } .ground { fill: #fdfdfb } text { fill: #5c646d }
.title { fill: #1d2126; font-size: 15px; font-weight: 600 }
.end { text-anchor: end } .middle { text-anchor: middle } .rule { stroke: #e8e9e4 } .axis { stroke: #9aa1a8 }
polyline { fill: none; stroke-width: 1.9; stroke-linejoin: round }
polyline.c1 { stroke: #0072b2 } .dot.c1 { fill: #0072b2 } polyline.c2 { stroke: #d55e00 } .dot.c2 { fill: #d55e00 }
@media (prefers-color-scheme: dark) {
  .ground { fill: #14171a } text { fill: #9ba3ab } .title { fill: #e4e6e8 } .rule { stroke: #282d32 }
  .axis { stroke: #737b83 } polyline.c1 { stroke: #56b4e9 } .dot.c1 { fill: #56b4e9 } polyline.c2 { stroke: #e8823a }
  .dot.c2 { fill: #e8823a }
}
"""


def world(folder: Path, px: int, **counts: int) -> Path:
    """A world of few pictures of a side of `px` pixels."""
    none = {"copies": 0, "off_topic": 0, "broken": 0}
    write_world(folder, 0, WorldConfig(px=px, scale=(0.6, 0.9), **none, **counts))
    return folder


def shrink(path: Path) -> None:
    """A picture of a page, not wider than WIDTH, as a WebP: a tenth of the bytes of a PNG of as many colours."""
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    rgb.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    rgb.save(FOLDER / f"{path.stem}.webp", quality=85, method=6)


def sight(work: Path) -> None:
    """What a network is shown, and what it sees; `work` is for the world and the run that they are made of."""
    pictures = world(work / "world", 128, clean=600, curated=4, train=8, val=8)
    pool, labelled = pictures / "uncurated", pictures / "evaluation" / "val"
    run = work / "run"
    troodon.pretrain("demo", str(pool), run, settings={"threads": 1}, devices=1)
    troodon.show_crops(own.demo(), str(pool), work / "crops.png", images=4)
    chosen = [str(path) for path in sorted(labelled.glob("*/*"))[::16]]
    troodon.show_pca(run, chosen, work / "pca.png", size=128)
    troodon.show_attention(run, chosen[:3], work / "attention.png", size=128)
    troodon.show_neighbours(run, str(labelled), work / "neighbours.png", query=chosen[:3], k=5)
    for path in work.glob("*.png"):
        shrink(path)


def health(work: Path) -> None:
    """The curves of a healthy run and of one that collapses, over one another."""
    data = world(work / "labelled", 64, clean=1, curated=1, train=40, val=1) / "evaluation" / "train"
    runs = []
    for name, changes in (("healthy", {}), ("collapsed", COLLAPSED)):
        often = {"health_every": 5, "log_every": 5, "probe_every": 15, "threads": 1, "batch": 32, "steps": 150}
        troodon.pretrain("demo_dino", str(data), work / name, settings={**often, **changes}, devices=1)
        artifact = open_artifact(work / name, name)
        assert isinstance(artifact, Artifact)
        runs.append(Run.of(artifact))
    titles = {key: title for key, title, _ in (*LEARNING, *HEALTH)}
    wide, tall = CHART_WIDTH + 20, HEIGHT + 42
    panels = [
        h("g", h("text", titles[key], x=46, y=14, class_="title"),
          h("svg", curves(runs, key), x=0, y=22, width=CHART_WIDTH, height=HEIGHT),
          transform=f"translate({10 + i % 2 * wide} {44 + i // 2 * tall})")
        for i, key in enumerate(CURVES)
    ]  # fmt: skip
    key = [
        h("g", h("polyline", points="0,0 22,0", class_=colour), h("text", words, x=30, y=4),
          transform=f"translate({56 + 90 * i} 18)")
        for i, (colour, words) in enumerate((("c1", "healthy"), ("c2", "collapsed")))
    ]  # fmt: skip
    ground = h("rect", width="100%", height="100%", rx=8, class_="ground")
    size = f"0 0 {2 * wide + 10} {3 * tall + 44}"
    whole = h("svg", h("style", Markup(STYLE)), ground, key, panels, xmlns="http://www.w3.org/2000/svg", viewBox=size,
              width=2 * wide + 10, height=3 * tall + 44)  # fmt: skip
    (FOLDER / "health.svg").write_text(whole + "\n", encoding="utf-8")


def curves(runs: list[Run], key: str) -> Markup:
    """One reading of both runs over the steps."""
    lines = [(run.name, f"c{i}", *values(run.records, key)) for i, run in enumerate(runs, 1)]
    unit = f"{SPACE}%" if key in SHARES else ""
    return overlay_chart(lines, label=key, unit=unit, floor=0.0 if key in FROM_ZERO else None, smooth=key not in EXACT)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    made = {"sight": sight, "health": health}
    for chosen in sys.argv[1:] or made:
        with tempfile.TemporaryDirectory() as folder:
            made[chosen](Path(folder))
