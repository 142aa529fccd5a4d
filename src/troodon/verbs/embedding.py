"""The verb `embed`: vectors of images, in files that others read, and the images nearest to a query."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from troodon.config import Range, UsageError, nearest
from troodon.devices import accelerator
from troodon.run import read_manifest, say, write_bytes
from troodon.slurm import NO_ARRAY, ArrayConfig, open_backend
from troodon.text import printable, set_aside
from troodon.verbs.common import Data, Device, Paths, common_range, on_device, open_images, with_range
from troodon.verbs.curation import check_shared, placed

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone

Compute = Literal["auto", "fp32", "bf16"]
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def embed(
    backbone: "str | Path | Backbone",
    data: Data,
    out: str | Path,
    *,
    tokens: str = "cls",
    blocks: Sequence[int] = (),
    format: str = "npy",
    batch: int = 64,
    threads: int = 0,
    compute: str = "auto",
    compile: bool = False,
    range: Range | None = None,
    device: str = "auto",
    backend: str = "local",
    workers: int = 0,
    slurm: ArrayConfig = NO_ARRAY,
) -> Path:
    """Write the vectors of images: class tokens ("cls"), mean patch tokens ("mean"), both ("cls+mean") or "patches".

    `blocks` are the numbers of the blocks whose tokens these are, from 0, where -1 is the last, the default; those of
    several are concatenated. `format` is "npy", a matrix of float16, or a table that other programs read, "parquet" or
    "arrow" (docs/features.md). The same call does nothing, or goes on where it stopped; UsageError for other settings.

    `compute` is the precision of products: "bf16", "fp32", or the faster on this machine ("auto"), which is measured
    once and then kept, also by a command that goes on. `compile` compiles the network first. `range` gives the values
    of images of more than 8 bits that become black and white, in place of the backbone's own. `device` is "auto" (a
    GPU, if there is one, or where the given backbone is), "cuda", "cuda:1", "mps" or "cpu". `backend`, `workers` and
    `slurm` share the work, as in `curate`. Returns the folder.
    """
    from troodon.curate.embed import embed as write_embeddings
    from troodon.curate.embedding_files import FORMATS, TOKENS

    for name, value, known in (("tokens", tokens, TOKENS), ("format", format, FORMATS)):
        if value not in known:
            raise nearest(name, value, known)
    if batch < 1:
        raise UsageError(f"batch {batch}: must be 1 or more")
    is_alone = (backend, workers) == ("local", 0)
    if compile and not is_alone:
        raise UsageError("compile: a network is compiled in this process only; leave out --compile, or the workers")
    check_shared(device, backend)
    runner = open_backend(backend, workers, slurm)
    out, backbone = Path(out), on_device(backbone, range, device) if is_alone else placed(backbone, device, range)
    numbers = backbone.block_numbers(list(blocks)) if blocks else []
    index = open_images(data, common_range(range, backbone))
    faster, is_new = _optimized(backbone, out, compute, compile), not out.exists()
    try:
        write_embeddings(
            faster, index, out, batch=batch, threads=threads, tokens=tokens, blocks=numbers, file_format=format,
            backend=runner,
        )  # fmt: skip
    finally:
        runner.close()
    if is_new:
        _say_unreadable(out)
    return out


def find_nearest(
    backbone: "str | Path | Backbone",
    queries: Sequence[Any],
    out: str | Path,
    *,
    k: int = 10,
    range: Range | None = None,
    device: str = "auto",
) -> list[list[dict]]:
    """The k images of embeddings nearest to each query, best first: {"id", "path", "label", "score"}.

    Queries are pictures as `Backbone.features` takes them; the score is the cosine similarity. UsageError if the
    embeddings are of another backbone, or of patches, of which an image has many.
    """
    import pyarrow.parquet as pq

    from troodon.curate.embed import encoder
    from troodon.curate.embedding_files import nearest_images
    from troodon.images.index import saved_range

    if k < 1:
        raise UsageError(f"k {k}: must be 1 or more")
    out, manifest = Path(out), read_manifest(Path(out))
    if manifest is None or manifest["kind"] != "embeddings":
        raise UsageError(f"{out}: holds no finished embeddings; give --data to make them")
    settings, backbone = manifest["settings"], on_device(backbone, range, device)
    if settings["weights"] != backbone.fingerprint:
        raise UsageError(f"{out}: was made with another backbone, {settings['backbone']}; give that one")
    if settings["tokens"] == "patches":
        raise UsageError(f"{out}: holds patches, of which an image has many; a query takes cls, mean or cls+mean")
    # A range of their index applies to queries as well.
    prepared = with_range(backbone, saved_range(pq.read_schema(out / "images.parquet"))).prepare(list(queries))
    _, encode = encoder(_optimized(backbone, out, "auto", False), settings["tokens"], settings.get("blocks", ()))
    return nearest_images(encode(prepared), out, k, accelerator(backbone.device))


def _optimized(backbone: "Backbone", out: Path, compute: str, compile: bool) -> "Backbone":
    """The backbone in this precision; for "auto" in that of the embeddings in `out`, finished or begun, if any are."""
    from troodon.curate.embed import parts_folder

    recorded = parts_folder(out) / "compute"
    if compute == "auto" and (manifest := read_manifest(out)) and manifest["kind"] == "embeddings":
        return backbone.optimized(PRECISIONS[manifest["settings"].get("compute", "float32")], compile=compile)
    if compute == "auto" and recorded.is_file() and recorded.read_text() in PRECISIONS:
        return backbone.optimized(PRECISIONS[recorded.read_text()], compile=compile)
    faster = backbone.optimized(compute, compile=compile)
    if compute == "auto" and not out.exists():
        write_bytes(recorded, str(faster.compute).removeprefix("torch.").encode())
    return faster


def _say_unreadable(out: Path) -> None:
    """Say which images have no vector."""
    import pyarrow.parquet as pq

    images = pq.read_table(out / "images.parquet", columns=["path", "status", "reason"])
    broken = images.filter(images["status"].to_numpy() != "ok").to_pylist()
    if broken:
        named = "; ".join(f"{image['path']}: {image['reason']}" for image in broken)
        say(f"embed: {set_aside(Counter(image['status'] for image in broken), len(images))}; {named}"[:500])


@dataclass(frozen=True)
class Embed:
    """Vectors of images, by a backbone, as a matrix or a table; and the images nearest to others."""

    backbone: str
    """A run, a backbone folder, weights in any file, or a name such as dinov2_vits14."""
    data: Paths = ()
    """Folders, tars, paths inside tars, or images; not needed for a --query of a finished --out."""
    out: str | None = None
    """A new folder; without it, a --query writes nothing."""
    tokens: str = "cls"
    """cls: class tokens; mean: mean patch tokens; cls+mean: both; patches: all patch tokens."""
    blocks: Annotated[tuple[int, ...], arg(metavar="NUMBER [NUMBER ...]")] = ()
    """Blocks whose tokens are concatenated, from 0; -1 is the last, which is the default."""
    format: Literal["npy", "parquet", "arrow"] = "npy"
    """npy: a float16 matrix; parquet, arrow: a table with id, path, label and embedding."""
    query: Annotated[tuple[tuple[str, ...], ...], UseAppendAction, arg(metavar="IMAGE [IMAGE ...]")] = ()
    """Images whose nearest ones are printed, with their cosine similarity."""
    k: int = 10
    """Nearest images of each query."""
    json: bool = False
    """Print these as JSON."""
    batch: int = 64
    """Images that go through the network together."""
    threads: int = 0
    """Threads that read images; 0 is one per processor."""
    compute: Compute = "auto"
    """Precision of products; auto measures once which is faster here. Vectors stay the same to a hundredth."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by the backbone's rule if left
    out."""
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""
    backend: str = "local"
    """Where workers run: local, ray (this machine, or its cluster), a cluster's address, ray://HOST:PORT, or slurm."""
    workers: int = 0
    """Processes of the backend local, 0 for this one only; jobs of the backend slurm. They do not change the result."""
    slurm: ArrayConfig = ArrayConfig()
    compile: bool = False
    """Compile the network first (torch.compile): takes minutes, and pays off after hours."""

    def run(self) -> None:
        queries = [image for images in self.query for image in images]
        if not queries and (self.json or self.k != Embed.k):
            raise UsageError(f"{'--json' if self.json else '--k'}: is about the images nearest to a --query; give one")
        if missing := [name for name in ("data", "out") if not getattr(self, name)][int(bool(queries)) :]:
            raise UsageError(f"--{missing[0]} is missing: embed takes --data and --out; with --query, one is enough")
        with tempfile.TemporaryDirectory(prefix="troodon-") if self.out is None else nullcontext("") as folder:
            out = self.out or str(Path(folder, "embeddings"))
            if queries:
                self._search(queries, out)
            else:
                print(self._embed(self.backbone, out))

    def _search(self, queries: list[str], out: str) -> None:
        """Make the embeddings in `out`, if there is data, and print the images nearest to the queries."""
        if self.k < 1 or (self.data and self.tokens == "patches"):
            wrong = f"k {self.k}: must be 1 or more" if self.k < 1 else "a query takes --tokens cls, mean or cls+mean"
            raise UsageError(wrong)
        backbone = on_device(self.backbone, self.range, self.device)
        backbone.prepare(queries)  # before long work: UsageError for an image that cannot be read
        if self.data:
            self._embed(backbone, out)
        else:
            self._check_recorded(Path(out))
        found = find_nearest(backbone, queries, out, k=self.k, device=self.device)
        if self.json:
            print(
                json.dumps(
                    [{"query": q, "nearest": images} for q, images in zip(queries, found, strict=True)], indent=1
                )
            )
            return
        width = max([len(image["label"] or "") for images in found for image in images], default=0)
        for query, images in zip(queries, found, strict=True):
            print(printable(query))
            for rank, image in enumerate(images, start=1):
                print(printable(f"{rank:>4} {image['score']:7.4f}  {image['label'] or '':<{width}}  {image['path']}"))

    def _embed(self, backbone: "str | Backbone", out: str) -> Path:
        options: dict[str, Any] = {"tokens": self.tokens, "blocks": self.blocks, "format": self.format}
        options |= {"batch": self.batch, "threads": self.threads, "range": self.range, "device": self.device}
        options |= {"backend": self.backend, "workers": self.workers, "slurm": self.slurm}
        return embed(backbone, self.data, out, **options, compute=self.compute, compile=self.compile)

    def _check_recorded(self, out: Path) -> None:
        """UsageError for options that finished embeddings do not have, where there is no data to make others."""
        settings = (read_manifest(out) or {}).get("settings", {})
        defaults = {"tokens": "cls", "blocks": [], "format": "npy"}
        for name, default in defaults.items():
            given = getattr(self, name) if name != "blocks" else list(self.blocks)
            if settings and given != default and given != (was := settings.get(name, default)):
                raise UsageError(f"{out}: was made with other settings ({name}: {was} -> {given}); leave --{name} out")
