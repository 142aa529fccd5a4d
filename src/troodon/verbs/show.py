"""The verbs `show`: pictures of what a network is shown, and of what a backbone sees in images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from troodon import recipes
from troodon.config import Range, UsageError
from troodon.learn.config import PretrainConfig, fits
from troodon.progress import Progress
from troodon.run import read_manifest, say, write_bytes
from troodon.text import plural
from troodon.verbs.common import (
    Data,
    Device,
    Paths,
    as_list,
    common_range,
    on_device,
    open_images,
    require_some,
    resolve_config,
)
from troodon.verbs.plans import loader_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from troodon.evaluate.show.views import Picture, View
    from troodon.images.index import Index
    from troodon.model.backbone import Backbone

    Drawn = tuple[Image, dict[str, Any]]  # a sheet, and its numbers

ENDINGS = (".png", ".html")


def show_crops(recipe: str | PretrainConfig, data: Data, out: str | Path, *, images: int = 8, batch: int = 0) -> Path:
    """Draw the views that a network gets of some images, a row for each image: its crop boxes, and every view of it.

    The images are the first of batch number `batch` in a run of that recipe. Returns the picture's path, a PNG.
    """
    from troodon.views.sheet import draw_crops

    if images < 1 or batch < 0:
        raise UsageError(f"images {images}, batch {batch}: at least 1 image, and batches are numbered from 0")
    _check_outside(out, data)
    config = resolve_config(recipe, PretrainConfig(), recipes.pretrain)
    fits(config, 1)
    draw_crops(loader_of(config, open_images(data, config.range)), Path(out), batch, images)
    return Path(out)


def show_pca(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    count: int = 12,
    background: bool = False,
    size: "int | Sequence[int] | None" = None,
    whole: bool = False,
    range: Range | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw images beside the first three principal components of their patch tokens, as red, green and blue.

    Components are those of all images together. The foreground alone is coloured, unless `background` is true: the
    side of the first component that lies less at the borders (DINOv2, section 7.6). At most `count` images are shown,
    spread evenly over the data. `size` is that of the crops; `whole` shows all of each image at its own aspect.
    `out` is a PNG, or a page that ends with .html. `device` is where the backbone computes: "auto" (a GPU, if there is
    one, or where the given backbone is), "cuda", "cuda:1", "mps" or "cpu".

    Returns {"picture", "explained_variance", "images": [{"path", "grid", "foreground"}]}. UsageError for what is none.
    """
    from troodon.evaluate.show.maps import pca

    def draw(found: "Backbone", pictures: "list[Picture]", view: "View") -> "Drawn":
        image, numbers = pca(found, pictures, view, background=background)
        if not any(one["foreground"] for one in numbers["images"]):
            say("show pca: there is no foreground, since all patches have the same features")
        return image, numbers

    return _show("pca", backbone, data, out, draw, count=count, size=size, whole=whole, range=range, device=device)


def show_attention(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    count: int = 4,
    block: int = -1,
    size: "int | Sequence[int] | None" = None,
    whole: bool = False,
    range: Range | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw over images what the class token and the registers attend to in a block: the mean of its heads, and each.

    Blocks are numbered from 0; -1 is the last. Images, `size`, `whole` and `out` as in `show_pca`. Returns {"picture",
    "block", "images"}, in which each image and token has "patches", by head what all patches get of its attention, and
    "max", what one gets at most. UsageError for a block that the backbone does not have.
    """
    from troodon.evaluate.show.maps import attention

    def draw(found: "Backbone", pictures: "list[Picture]", view: "View") -> "Drawn":
        return attention(found, pictures, view, block=block)

    return _show(
        "attention",
        backbone,
        data,
        out,
        draw,
        count=count,
        size=size,
        whole=whole,
        range=range,
        device=device,
        block=block,
    )


def show_matches(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    above: float = 0.5,
    lines: int = 60,
    size: "int | Sequence[int] | None" = None,
    whole: bool = False,
    range: Range | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw lines between the patches of two images that are each other's nearest, by the cosine of their tokens.

    Pairs of a cosine under `above` are left out, and at most the best `lines` pairs are drawn. `size`, `whole` and
    `out` as in `show_pca`. Returns {"picture", "images", "above", "drawn", "matches": [{"score", "first", "second"}]},
    in which a patch is its row and column. UsageError unless the data is two images.
    """
    from troodon.evaluate.show.matches import matches

    if not -1 <= above <= 1 or lines < 1:
        raise UsageError(f"above {above}, lines {lines}: a cosine is from -1 to 1, and lines are 1 or more")

    def draw(found: "Backbone", pictures: "list[Picture]", view: "View") -> "Drawn":
        return matches(found, pictures, view, above=above, count=lines)

    return _show("matches", backbone, data, out, draw, count=2, size=size, whole=whole, range=range, device=device)


def show_neighbours(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    query: Data,
    k: int = 7,
    count: int = 8,
    size: "int | Sequence[int] | None" = None,
    whole: bool = False,
    range: Range | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw images, the queries, beside the k nearest to each among the data, by the cosine of their class tokens.

    `data` may also be what `embed` wrote with this backbone; then its tokens decide, and `size` and `whole` are those
    of the backbone. At most `count` queries are shown. `size`, `whole` and `out` as in `show_pca`. Returns {"picture",
    "images", "queries": [{"query", "label", "nearest": [{"id", "path", "label", "score"}]}]}.
    """
    from troodon.evaluate.show.neighbours import find, neighbours
    from troodon.evaluate.show.views import View
    from troodon.images.index import Index
    from troodon.verbs.embedding import find_nearest

    if k < 1:
        raise UsageError(f"k {k}: must be 1 or more")
    places, view = as_list(data), View(size, whole)
    manifest = read_manifest(Path(places[0])) if len(places) == 1 and isinstance(places[0], str | Path) else None
    is_embedded = manifest is not None and manifest["kind"] == "embeddings"
    if is_embedded and view != View():
        raise UsageError(f"{places[0]}: holds embeddings of the backbone's own size; leave --size and --whole out")
    if is_embedded:
        index = Index.load(Path(places[0], "images.parquet"))

    def draw(found: "Backbone", queries: "list[Picture]", view: "View") -> "Drawn":
        if is_embedded:
            nearest = find_nearest(found, [q.pixels_HWC for q in queries], places[0], k=k, device=device)
            return neighbours(found, index, queries, nearest, f"embeddings in {Path(places[0]).name}")
        images = open_images(data, common_range(range, found))
        with Progress("show neighbours") as progress:
            nearest, broken = find(found, images, queries, view, k, progress)
        _say_broken("neighbours", [f"{images.path(row)}: {error}" for row, error in broken.items()], len(images))
        return neighbours(found, images, queries, nearest, view.sizes(found))

    _check_outside(out, data)
    return _show(
        "neighbours", backbone, query, out, draw, count=count, size=size, whole=whole, range=range, device=device
    )


def _show(
    name: str,
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    draw: Callable[..., Any],
    *,
    count: int,
    size: "int | Sequence[int] | None",
    whole: bool,
    range: Range | None,
    device: str,
    block: int = -1,
) -> dict[str, Any]:
    """Draw `count` images of the data by `draw(backbone, pictures, view)`, write the picture or page, return numbers.

    Everything that may be wrong with the arguments is looked at before the network runs.
    """
    from troodon.evaluate.show.sheet import DENSITY, png
    from troodon.evaluate.show.views import View
    from troodon.report.show import show_page

    out, view = Path(out), View(size, whole)
    if out.suffix.lower() not in ENDINGS or out.is_dir():
        raise UsageError(f"{out}: a picture that ends with .png, or a page that ends with .html")
    if count < 1:
        raise UsageError(f"count {count}: must be 1 or more")
    _check_outside(out, data)
    found = on_device(backbone, range, device)
    view.sizes(found)  # UsageError for a size that is none
    found.block_numbers([block])
    pictures = _pictures(name, open_images(data, common_range(range, found)), found, count)
    try:
        image, numbers = draw(found, pictures, view)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UsageError(f"memory does not hold {view.sizes(found)}; give a smaller --size") from None
        raise
    page, title = png(image), f"show {name}"
    if out.suffix.lower() == ".html":
        page = show_page(title, page, image.width // DENSITY, numbers).encode()
    write_bytes(out, page)
    return {"picture": str(out)} | numbers


def _pictures(name: str, index: "Index", backbone: "Backbone", count: int) -> "list[Picture]":
    """The images that are shown: those it says are read, spread evenly; two for matches, exactly. It names the rest."""
    from troodon.evaluate.show.views import read_pictures, spread

    if name == "matches" and len(index) != 2:
        raise UsageError(f"matches are drawn between two images, and these are {plural(len(index), 'image')}")
    rows = spread(len(index), count)
    if len(rows) < len(index):
        say(f"show {name}: {len(rows):,} of {len(index):,} images, spread evenly; --count shows more")
    pictures, broken = read_pictures(index, rows, backbone.channels)
    if not pictures or (broken and name == "matches"):
        raise UsageError(f"no image to show can be read: {'; '.join(broken)}"[:500])
    _say_broken(name, broken, len(rows))
    return pictures


def _say_broken(name: str, broken: Sequence[str], images: int) -> None:
    if broken:
        say(f"show {name}: {len(broken):,} of {images:,} images cannot be read: {'; '.join(broken)}"[:500])


def _check_outside(out: str | Path, data: Data) -> None:
    """UsageError if the picture would lie in a folder of images, or on one of them."""
    for place in as_list(data):
        if isinstance(place, str | Path) and Path(out).resolve().is_relative_to(Path(place).expanduser().resolve()):
            raise UsageError(f"{out}: would lie in {place} and count as an image there; choose another --out")


@dataclass(frozen=True)
class ShowCrops:
    """A picture to check before training: images with their crops, as a recipe's network would get them."""

    recipe: Positional[str]
    """A recipe (see `troodon recipes`) or a YAML file."""
    data: Paths
    """Folders, tars, paths inside tars, an index or a selection."""
    out: str = "crops.png"
    """The picture."""
    images: int = 8
    """Images in the picture, a row for each."""
    at: int = 0
    """Number of the batch whose first images are shown."""
    config: Annotated[PretrainConfig, arg(name="")] = PretrainConfig()

    def run(self) -> None:
        print(show_crops(self.config, self.data, self.out, images=self.images, batch=self.at))


@dataclass(frozen=True)
class _Show:
    images: Positional[Paths]
    """Images: files, folders, tars, paths inside tars, an index or a selection."""
    backbone: str
    """A run, a backbone folder, weights in any file, or a name such as dinov2_vits14."""
    size: Annotated[tuple[int, ...], arg(metavar="PIXELS [PIXELS]")] = ()
    """What the network is shown: pixels of a side, or height and width; the backbone's own if left out."""
    whole: bool = False
    """Show all of each image at its own aspect, with a shorter side of that size."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    device: Device = "auto"
    """Where the backbone computes: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""
    json: bool = False
    """Print the numbers of the picture as JSON."""

    def show(self, verb: Callable[..., dict[str, Any]], out: str, **options: Any) -> None:
        """Draw, and print where the picture is, or its numbers."""
        images = require_some(self.images, "images to show")
        size = self.size[0] if len(self.size) == 1 else self.size or None
        options |= {"size": size, "whole": self.whole, "range": self.range, "device": self.device}
        numbers = verb(self.backbone, images, out, **options)
        print(json.dumps(numbers, indent=1) if self.json else numbers["picture"])


@dataclass(frozen=True)
class ShowPca(_Show):
    """Images beside the principal components of their patch tokens, as colours."""

    out: str = "pca.png"
    """The picture; a page with its numbers if it ends with .html."""
    count: int = 12
    """Images shown at most, spread evenly over all."""
    background: bool = False
    """Colour all patches, not only the foreground."""

    def run(self) -> None:
        self.show(show_pca, self.out, count=self.count, background=self.background)


@dataclass(frozen=True)
class ShowAttention(_Show):
    """Images under what the class token and the registers attend to, by head."""

    out: str = "attention.png"
    """The picture; a page with its numbers if it ends with .html."""
    count: int = 4
    """Images shown at most, spread evenly over all."""
    block: int = -1
    """Number of the block, from 0; -1 is the last."""

    def run(self) -> None:
        self.show(show_attention, self.out, count=self.count, block=self.block)


@dataclass(frozen=True)
class ShowNeighbours(_Show):
    """Images beside those of a set that are nearest to them; the set may be what `embed` wrote."""

    query: Paths = ()
    """Images whose nearest ones are shown, a row for each."""
    out: str = "neighbours.png"
    """The picture; a page with its numbers if it ends with .html."""
    k: int = 7
    """Nearest images of each query."""
    count: int = 8
    """Queries shown at most, spread evenly over all."""

    def run(self) -> None:
        query = require_some(self.query, "--query")
        self.show(show_neighbours, self.out, query=query, k=self.k, count=self.count)


@dataclass(frozen=True)
class ShowMatches(_Show):
    """Two images with lines between the patches that are each other's nearest."""

    out: str = "matches.png"
    """The picture; a page with its numbers if it ends with .html."""
    above: float = 0.5
    """Smallest cosine of a pair of patches."""
    lines: int = 60
    """Pairs drawn at most, the best ones."""

    def run(self) -> None:
        self.show(show_matches, self.out, above=self.above, lines=self.lines)
