"""The verb `explore`: a page on this machine to look around among images, and to decide about them."""

import os
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from troodon.config import Range, UsageError
from troodon.run import article, read_manifest, say
from troodon.verbs.common import Device, on_device, open_images, with_range

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy import ndarray

    from troodon.explore.collection import Collection
    from troodon.explore.server import Server
    from troodon.model.backbone import Backbone

KINDS = ("embeddings", "selection")
OF_EMBEDDINGS = ("status", "width", "height", "sha256")  # columns that a ledger takes from its embeddings


def explore(
    source: str | Path,
    *,
    backbone: "str | Path | Backbone | None" = None,
    out: str | Path | None = None,
    port: int = 0,
    open: bool = True,
    range: Range | None = None,
    device: str = "auto",
) -> None:
    """Serve a page about embeddings, a selection or images on 127.0.0.1, until Ctrl-C; prints its address.

    Images are embedded first, by `backbone`, into the folder `out`. For embeddings and selections, the backbone that
    made them is needed only to search by pictures from elsewhere. `port` 0 takes any free one, and `open` opens a
    browser. `device` is where the network and the layout compute, as for `embed`. What is decided on the page is
    written to decisions.jsonl in the folder (docs/explore.md). UsageError for what cannot be shown.
    """
    server = serve(source, backbone=backbone, out=out, port=port, range=range, device=device)
    print(server.address, flush=True)
    say("explore: Ctrl-C ends it; every decision is saved as it is made")
    if open:
        webbrowser.open(server.address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("explore: ended")
    finally:
        server.server_close()


def serve(
    source: str | Path,
    *,
    backbone: Any = None,
    out: str | Path | None = None,
    port: int = 0,
    range: Range | None = None,
    device: str = "auto",
) -> "Server":
    """The server of `explore`, which listens and does not answer yet."""
    from troodon.devices import accelerator, choose_device
    from troodon.explore.api import Api
    from troodon.explore.collection import LAYOUT
    from troodon.explore.layout import layout_of
    from troodon.explore.server import Server

    if not 0 <= port < 65536:
        raise UsageError(f"port {port}: a number from 0, which is any free one, to 65535")
    network = None if backbone is None else on_device(backbone, range, device)
    folder = _folder(source, network, out, device)
    collection = open_collection(folder, network)
    target = accelerator(choose_device(device))
    file = folder / LAYOUT

    def layout() -> Any:
        return layout_of(collection.x_ND, collection.has_vector_N, file, collection.fingerprint, target)

    try:
        return Server(Api(collection, layout).routes(), port)
    except OSError as error:
        raise UsageError(f"port {port}: {error.strerror}; choose another one, or 0 for any") from None


def _folder(source: str | Path, network: Any, out: str | Path | None, device: str) -> Path:
    """The artifact to show; images are embedded into `out` first."""
    folder = Path(source).expanduser()
    kind = (read_manifest(folder) or {}).get("kind")
    if kind in KINDS:
        if out is not None:
            raise UsageError(f"out {out}: {folder} has its vectors already; leave it out")
        return folder
    if kind is not None and kind != "index":
        raise UsageError(f"{source}: is {article(kind)}; give embeddings, a selection, or images with --backbone")
    if network is None:
        open_images(str(source))  # is it there, and has it images?
        raise UsageError(f"{source}: holds no embeddings and is no selection; give --backbone, which embeds its images")
    from troodon.verbs.embedding import embed

    made = Path(out) if out is not None else Path(f"{folder.resolve().name}-embeddings")
    say(f"explore: embeds the images of {source} into {made}")
    return embed(network, str(source), made, device=device)


def open_collection(folder: Path, backbone: Any = None) -> "Collection":
    """The images, vectors and ledger of an artifact. UsageError if they cannot be shown, or the backbone is another."""
    import pyarrow.parquet as pq

    from troodon.explore.collection import Collection
    from troodon.images.carry_out import moved_files
    from troodon.images.index import SCHEMA, Index, saved_range

    manifest = read_manifest(folder)
    assert manifest is not None
    vectors = folder / "embeddings" if manifest["kind"] == "selection" else folder
    made = read_manifest(vectors)
    if made is None:
        raise UsageError(f"{folder}: its folder embeddings is gone, and nothing can be shown without; make it again")
    if made["settings"].get("tokens") == "patches":
        raise UsageError(f"{folder}: holds patches, of which an image has many; embed with --tokens cls or mean")
    images = pq.read_table(folder / "images.parquet")
    if vectors != folder:
        known = pq.read_table(vectors / "images.parquet", columns=list(OF_EMBEDDINGS))
        for name in OF_EMBEDDINGS:
            images = images.append_column(name, known[name]) if name not in images.column_names else images
    images = _where_they_are(images, moved_files(folder)).combine_chunks()
    found_range = saved_range(images.schema)
    index = Index(images.select(SCHEMA.names), base=str(folder.resolve()), range=found_range)
    x_ND = _vectors(vectors, len(images))
    encode = _encoder(made["settings"], backbone, found_range, folder)
    return Collection(
        folder, manifest["kind"], made["fingerprint"], index, images, x_ND, encode, str(made["settings"]["backbone"])
    )


def _where_they_are(images: "pa.Table", moved: dict[str, str]) -> "pa.Table":
    """The table, with the present places of images that `apply` has moved."""
    import pyarrow as pa

    if not moved:
        return images
    places = pa.array([moved.get(place, place) for place in images["container"].to_pylist()], pa.string())
    return images.set_column(images.schema.get_field_index("container"), "container", places)


def _vectors(folder: Path, count: int) -> "ndarray":
    """The vectors (N, D) float16; zeros for images without one."""
    import numpy as np

    from troodon.curate.embedding_files import iter_vectors

    if (file := folder / "embeddings.npy").exists():
        return np.load(file, mmap_mode="r")
    x_ND = None
    for rows, x_BD in iter_vectors(folder):
        x_ND = np.zeros((count, x_BD.shape[1]), np.float16) if x_ND is None else x_ND
        x_ND[rows] = x_BD
    return np.zeros((count, 1), np.float16) if x_ND is None else x_ND


def _encoder(settings: dict, backbone: Any, found_range: Range | None, folder: Path) -> Any:
    """The function from an image in bytes to its vector, by the network that made these vectors; None without it."""
    from troodon.curate.embed import encoder
    from troodon.curate.encoder import PixelBackbone
    from troodon.images.decode import BadImage, decode

    if settings["weights"] == PixelBackbone.fingerprint:  # as `dedup` makes them, without a network
        network, encode = encoder(PixelBackbone(None), settings["tokens"])
        return lambda data: encode(network.prepare([decode(data, None, range=found_range)]))[0]
    if backbone is None:
        say("explore: give --backbone, the one that made the vectors, to search by pictures from elsewhere")
        return None
    if settings["weights"] != backbone.fingerprint:
        raise UsageError(f"{folder}: was made with another backbone, {settings['backbone']}; give that one")
    from troodon.verbs.embedding import PRECISIONS

    network = with_range(backbone, found_range).optimized(PRECISIONS[settings.get("compute", "float32")])
    _, encode = encoder(network, settings["tokens"], settings.get("blocks", ()))

    def vector(data: bytes) -> "ndarray":
        try:
            return encode(network.prepare([data]))[0]
        except UsageError as error:  # for a person at a command line
            raise BadImage("decode error", str(error)) from None

    return vector


@dataclass(frozen=True)
class Explore:
    """A page to look around among images: a map, search, copies, tags; and to decide which stay."""

    source: Positional[str]
    """Embeddings, a selection, or images (folders, tars and so on) with --backbone."""
    backbone: str | None = None
    """Embeds images, and pictures to search by: a run, a backbone folder, weights in any file, or a name."""
    out: str | None = None
    """For images: where their embeddings are kept; NAME-embeddings here, if left out."""
    port: int = 0
    """The port on 127.0.0.1; 0 is any free one."""
    open: bool = True
    """Open the page in a browser; --no-open only prints its address."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""

    def run(self) -> None:
        explore(
            self.source, backbone=self.backbone, out=self.out, port=self.port, open=self.open, range=self.range,
            device=self.device,
        )  # fmt: skip
        from troodon.explore.api import BACKGROUND

        if any(thread.name == BACKGROUND for thread in threading.enumerate()):
            os._exit(0)  # a layout on its way: the interpreter would abort, since no thread inside torch can be ended
