"""The folder of a run: made, gone on with, or begun anew where nothing has been learned in it."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from troodon.config import UsageError, differences, fingerprint, from_dict, to_dict, to_yaml
from troodon.learn import checkpoint
from troodon.learn.config import PretrainConfig
from troodon.model.saved import SavedViT
from troodon.run import (
    MANIFEST,
    MetricsFile,
    article,
    environment,
    read_manifest,
    say,
    write_bytes,
    write_json,
    write_manifest,
)
from troodon.views.image_source import ImageSource

CONFIG, ENVIRONMENT, IMAGES = "config.yaml", "environment.json", "images.parquet"
# What else may be in the folder of a run that has learned nothing.
BEFORE_STEPS = ("metrics.jsonl", "quarantine.jsonl", "pictures/crops.png", "logged-as", "tensorboard", "checkpoints",
                "backbone")  # fmt: skip
# What is drawn by what; and how it was drawn when a run began that does not have this among its settings.
DRAWN = {"drop_path": "by image", "masks": "by crop"}
BEFORE = {
    "drop_path": "each rank drew by itself which crops skip a branch (vit.drop_path)",
    "masks": "the masks of a batch were drawn one after another",
}
# Settings that say how a run is done and watched. They do not change what it learns, so they may change on the way.
FREE = (
    "threads", "processes", "image_cache_gib", "log_every", "log_to", "health_every", "probe_every", "checkpoint_every",
    "keep", "keep_every", "max_broken",
)  # fmt: skip


def open_folder(
    out: Path, config: PretrainConfig, index: ImageSource, init: SavedViT | None, teachers: Sequence[SavedViT]
) -> None:
    """Make the folder of a run, or check that the one that is there is of this run, and record the latest settings."""
    settings = {"config": to_dict(config), "images": len(index), "init": init and init.fingerprint}
    settings |= {"teachers": [teacher.fingerprint for teacher in teachers]} if teachers else {}
    draws = {"drop_path": config.vit.drop_path, "masks": config.masks.share and not teachers}
    settings |= {name: DRAWN[name] for name, is_drawn in draws.items() if is_drawn}
    data = index.fingerprint or fingerprint(index.column("path"), index.column("length"))
    manifest = read_manifest(out)
    if manifest is not None and manifest["kind"] != "run":
        raise UsageError(f"{out}: already holds {article(manifest['kind'])}; choose a new --out")
    changes = [] if manifest is None else _changes(manifest, settings, config, data)
    if manifest is not None and (not changes or _has_learned(out)):
        if changes:
            raise UsageError(f"{out}: a run with other settings ({'; '.join(changes)}); {_way_out(out, settings)}")
        if (out / CONFIG).read_text() != to_yaml(config):
            write_bytes(out / CONFIG, to_yaml(config).encode())
        for name in [name for name in DRAWN if name in settings and name not in manifest["settings"]]:
            say(f"warning: this run began when {BEFORE[name]}; the steps from here on draw others, {DRAWN[name]}")
        if (changed := index.first_changed(out / IMAGES)) is not None:
            say(f"warning: {changed} has changed since this run began, and is read as it is now")
        return
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if manifest is None and names and not ({ENVIRONMENT} <= names <= {ENVIRONMENT, CONFIG, IMAGES}):
        raise UsageError(f"{out}: is not empty and not a run; choose a new --out")
    for old in (MANIFEST, CONFIG, ENVIRONMENT, IMAGES, *BEFORE_STEPS):
        shutil.rmtree(out / old) if (out / old).is_dir() else (out / old).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / ENVIRONMENT, environment())
    write_bytes(out / CONFIG, to_yaml(config).encode())
    if index.mapped_path is None:
        index.with_times().save(out / IMAGES)
    write_manifest(out, "run", fingerprint(settings, data), settings)


def _changes(manifest: dict, settings: dict, config: PretrainConfig, data: str) -> list[str]:
    """What differs from the run that began, of all that decides what it learns."""
    if manifest["fingerprint"] == fingerprint(settings, data):
        return []
    before = manifest["settings"] | {"config": _decisive(_recorded(manifest))}
    before |= {name: value for name, value in DRAWN.items() if name in settings}
    now = settings | {"config": _decisive(config)}
    if before == now and manifest["fingerprint"] == fingerprint(manifest["settings"], data):
        return []
    return differences(before, now) or ["other images"]


def _recorded(manifest: dict) -> PretrainConfig:
    """The config of a run, also of one of an earlier version, which did not know every setting."""
    return from_dict(PretrainConfig(), manifest["settings"]["config"], source=MANIFEST)


def _decisive(config: PretrainConfig) -> dict:
    default = PretrainConfig()
    config = replace(
        config,
        guard=replace(config.guard, limit=default.guard.limit),
        parallel=replace(config.parallel, recompute=default.parallel.recompute, compile=default.parallel.compile),
    )
    return {name: value for name, value in to_dict(config).items() if name not in FREE}


def _has_learned(out: Path) -> bool:
    return bool(checkpoint.finished(out)) or any(
        r.get("step", 0) >= 0 for r in MetricsFile(out / "metrics.jsonl").read()
    )


def _way_out(out: Path, settings: dict) -> str:
    if "teachers" in settings or not checkpoint.finished(out):
        return "choose a new --out"
    return f"choose a new --out, or start from it: --init {out} --reuse whole"
