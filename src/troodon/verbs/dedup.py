"""The verbs `dedup` (find copies and keep one of each picture) and `apply` (carry out a selection on the disk)."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from troodon.config import Range, UsageError, from_dict, to_dict
from troodon.curate.config import CurateConfig
from troodon.text import file_size, plural
from troodon.verbs.common import (
    Data,
    Device,
    Paths,
    common_range,
    open_images,
    require_some,
    suggest_next,
)
from troodon.verbs.curation import check_shared, open_decisions, placed, stage_lines

if TYPE_CHECKING:
    from troodon.images.carry_out import Done
    from troodon.model.backbone import Backbone

# No image is dropped because of a mark: out of focus, dark, blank, tiny, elongated.
MARKS = ("sharpness<0.01", "brightness<0.06", "contrast<0.02", "side<64", "aspect>4")
DEDUP_CONFIG = CurateConfig(gather="all", marks=MARKS)


def dedup(
    data: Data,
    out: str | Path,
    *,
    benchmark: Data | None = None,
    backbone: "str | Path | Backbone | None" = None,
    copies: "str | Path | Backbone | None" = None,
    backend: str = "local",
    workers: int = 0,
    settings: dict | None = None,
    range: Range | None = None,
    device: str = "auto",
    decisions: str | Path | None = None,
) -> Path:
    """Find the copies among images, and write a selection of one of each picture; returns the selection.

    Copied images may be cropped, turned, framed, written on and so on (copies/verify.py); the one that most looks like
    the original is kept (copies/keeper.py). No network is needed; `backbone` and `copies`, as of `curate`, add
    candidates. Images like one of `benchmark` are left out too. `settings` are those of CurateConfig, such as
    {"prefer": ["originals"]}. `decisions` is a file that `explore` wrote: what a person decided holds. No image is
    changed: see `apply`. UsageError if `out` was made with other settings.
    """
    from troodon.curate.backends import create_backend
    from troodon.curate.pipeline import NO_IMAGES, curate
    from troodon.images import carry_out

    made = open_decisions(decisions)
    config = _check(from_dict(DEDUP_CONFIG, settings or {}, source="settings"), bool(benchmark), backbone, copies)
    runner, out = create_backend(backend, workers), Path(out)
    check_shared(device, backend)
    try:
        encoder = None if copies is None else placed(copies, device)
        network = placed(_pixels(config, encoder), device) if backbone is None else placed(backbone, device, range)
        range = common_range(range, network, encoder)
        pool = carry_out.made_from(out, open_images(data, range))
        excluded = open_images(benchmark, range) if benchmark else NO_IMAGES
        return curate(
            config, NO_IMAGES, pool, network, out, benchmark=excluded, copies=encoder, backend=runner, decisions=made
        )
    finally:
        runner.close()


def apply(selection: str | Path, action: str, target: str | Path | None = None) -> str:
    """Carry out a selection on the disk; returns what was done, in words. Nothing is deleted or overwritten.

    `action` is "move": the left-out images into the folder `target`; "undo": back from there; "links": a folder
    `target` of links to the kept images; "list": a file of their paths. UsageError, and nothing has changed, if images
    are no single files on local disks, or files have changed since.
    """
    return _carry_out(Path(selection), action, None if target is None else str(target)).text


def _check(config: CurateConfig, has_benchmark: bool, backbone: Any, copies: Any) -> CurateConfig:
    """The config that finds copies, if these settings fit together. UsageError if not."""
    if config.gather != "all":
        raise UsageError(f"gather {config.gather}: dedup keeps every picture once; `troodon curate` gathers")
    if has_benchmark and "benchmark" not in config.steps:
        raise UsageError("steps: images of a benchmark are left out by the step benchmark; add it")
    if config.verify == "none" and (config.prefer or config.keep_by):
        raise UsageError("prefer, keep_by: a closer look chooses by them; leave out --verify none")
    if backbone is None and config.tokens != "cls":
        raise UsageError(f"tokens {config.tokens}: of a backbone; give one, or leave it out")
    # Pixels are what images are compared by; twice says nothing more.
    return replace(config, pixels=False) if backbone is None and copies is None else config


def _pixels(config: CurateConfig, encoder: Any) -> Any:
    """A network without weights, for images of any number of channels, or of those that another one takes."""
    from troodon.curate.encoder import PixelBackbone

    if encoder is not None:
        return PixelBackbone(encoder.channels)
    return PixelBackbone(None if config.verify == "geometric" else 3)


def _carry_out(selection: Path, action: str, target: str | None = None) -> "Done":
    from troodon.images import carry_out

    carry_out.check_action(action, target)
    if action == "move":
        return carry_out.move(selection, Path(target or ""))
    if action == "links":
        return carry_out.link(selection, Path(target or ""))
    if action == "undo":
        return carry_out.undo(selection)
    if target == "-":
        names = carry_out.kept_list(selection)
        sys.stdout.buffer.write(carry_out.lines(names)) if hasattr(sys.stdout, "buffer") else print(*names, sep="\n")
        return carry_out.Done("")
    return carry_out.write_list(selection, Path(target or ""))


def _print_done(done: "Done", selection: str) -> None:
    if done.text:
        print(done.text)
    if done.undo:
        undo = f"troodon apply {shlex.quote(selection)} undo" if done.undo == "undo" else done.undo
        print(f"undo: {undo}")


def count_copies(selection: Path) -> dict[str, int]:
    """Pictures that occur more than once, images that are left out for another or for a benchmark, and their bytes.

    Bytes that are not known, as of rows of Parquet, count as none.
    """
    import numpy as np
    import pyarrow.parquet as pq

    names = ["kept", "pool", "stage", "cause", "length"]
    table = pq.read_table(selection / "images.parquet", columns=names)
    kept, cause, length = (table[name].to_numpy() for name in ("kept", "cause", "length"))
    stage, pool = (np.array(table[name].to_pylist(), object) for name in ("stage", "pool"))
    gone = ~kept & (stage != "decode") & (pool != "benchmark")
    copies, root = np.flatnonzero(gone & (stage != "benchmark") & (cause >= 0)), cause.copy()
    for row in copies:  # a copy of a copy belongs to the last one
        while stage[root[row]] in ("exact", "hash", "colour", "duplicate") and cause[root[row]] >= 0:
            root[row] = cause[root[row]]
    groups = len(np.unique(root[copies]))
    return {"groups": groups, "left_out": int(gone.sum()), "bytes": int(length[gone].clip(0).sum())}


def _left_out_folder(out: str, data: Sequence[str]) -> str:
    """A folder to move left-out images to: beside the selection, or beside the data that the selection lies in."""
    name, place = f"{Path(out).name}-left-out", Path(out).resolve()
    around = [folder for path in data if (folder := Path(path).resolve()) in place.parents]
    return str(min(around).parent / name) if around else f"{out.rstrip('/')}-left-out"


@dataclass(frozen=True)
class Dedup:
    """Find copies, also edited ones, and keep one image of each picture. No network is needed; no image is changed."""

    data: Positional[Paths]
    """Folders, tars, zips, Parquet files, lists, paths inside them, URLs, or images."""
    out: str
    """A new folder: the selection, which `pretrain --data` takes."""
    apply: Annotated[tuple[str, ...], arg(metavar="ACTION [TARGET]")] = ()
    """Carry it out at once, as `troodon apply` does: move FOLDER, links FOLDER, list FILE or undo."""
    benchmark: Paths = ()
    """Images that must not be seen: those that resemble one are left out, too."""
    backbone: str | None = None
    """Adds candidates by its features: a run, a backbone folder, weights in any file, or a name."""
    copies: str | None = None
    """Adds candidates: a run of copies_small, or a copy descriptor's TorchScript file (.pt)."""
    backend: str = "local"
    """Where workers run: local, ray (this machine, or its cluster), or a cluster's address, ray://HOST:PORT."""
    workers: int = 0
    """Processes of the backend local; 0 is this one only. They change the time, not the result."""
    device: Device = "auto"
    """Where networks and comparisons of vectors compute: auto (a GPU, if there is one), cuda, cuda:1, mps or cpu."""
    range: Range | None = None
    """Values of images of more than 8 bits that become black and white, such as 0 4095; by their type if left out."""
    json: bool = False
    """Print the summary as JSON."""
    decisions: str | None = None
    """A file of decisions to keep, leave out or tag images, which `troodon explore` writes; they hold in any case."""
    config: Annotated[CurateConfig, arg(name="")] = DEDUP_CONFIG

    def run(self) -> None:
        from troodon.images import carry_out

        data, done = require_some(self.data, "images to look for copies in"), None
        if self.apply:
            if len(self.apply) > 2:
                raise UsageError(f"apply {' '.join(self.apply)}: one action and where to, as in move FOLDER")
            carry_out.check_action(*self.apply)
        out = dedup(
            data, self.out, benchmark=self.benchmark, backbone=self.backbone, copies=self.copies, backend=self.backend,
            workers=self.workers, settings=to_dict(self.config), range=self.range,
            device=self.device, decisions=self.decisions,
        )  # fmt: skip
        if self.apply:
            done = _carry_out(out, *self.apply)
            if not done.text:  # the list is the output
                return
        summary = json.loads((out / "summary.json").read_text()) | {"copies": count_copies(out)}
        if self.json:
            print(json.dumps(summary | ({"applied": done.text} if done else {}), indent=1))
            return
        stages = [stage for stage in summary["stages"] if stage["name"] != "retrieve"]  # all are kept
        for line in stage_lines(summary | {"stages": stages}):
            print(line)
        counts = summary["copies"]
        print(f"{plural(counts['groups'], 'picture')} more than once; {plural(counts['left_out'], 'image')} left out, "
              f"{file_size(counts['bytes'])}")  # fmt: skip
        if marked := {mark: count for mark, count in summary.get("marked", {}).items() if count}:
            print(f"marked, and not left out for it: {', '.join(f'{n:,} {mark}' for mark, n in marked.items())}")
        print(out)
        where = shlex.quote(self.out)
        commands = [f"troodon report {where}"]
        if done:
            _print_done(done, self.out)
        elif (out / carry_out.MOVES).exists():
            commands.append(f"troodon apply {where} undo")
        elif counts["left_out"]:
            commands.append(f"troodon apply {where} move {shlex.quote(_left_out_folder(self.out, data))}")
        training = [f"troodon pretrain small --data {where} --out runs/first"] if summary["kept"] else []
        suggest_next(*commands, *training)


@dataclass(frozen=True)
class Apply:
    """Carry out a selection on the disk: move what it left out, link or list what it kept. Never deletes; undo."""

    selection: Annotated[Positional[str], arg(metavar="SELECTION")]
    """A folder that dedup or curate has written."""
    action: Annotated[Positional[str], arg(metavar="move|undo|links|list")]
    """move: the left-out images into a folder. undo: back from there. links: a folder of links to the kept images.
    list: a file of their paths; - prints them."""
    target: Annotated[Positional[str | None], arg(metavar="[TARGET]")] = None
    """The folder or file."""

    def run(self) -> None:
        _print_done(_carry_out(Path(self.selection), self.action, self.target), self.selection)
