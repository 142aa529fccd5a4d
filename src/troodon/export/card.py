"""The model card of an export: what is recorded of the run, its images and its scores. It claims nothing else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from troodon.config import UsageError
from troodon.model.backbone import Backbone
from troodon.run import read_json, read_manifest, version
from troodon.text import plural, printable


@dataclass(frozen=True)
class Origin:
    """What is known of where a backbone comes from."""

    run: Path | None = None  # folder of the run that made it
    scores: Sequence[dict] = ()  # entries of scores.json
    licence: str | None = None  # of the data, as the user says


def origin_of(backbone: Any, scores: Sequence[str | Path], licence: str | None) -> Origin:
    """The run that a path leads to, if it does, and the given scores. UsageError for a folder without scores."""
    run = None
    if isinstance(backbone, str | Path):
        path = Path(backbone).resolve()
        places = (path.parent, path.parents[2]) if path.name == "backbone" and len(path.parts) > 3 else (path,)
        run = next((p for p in places if (read_manifest(p) or {}).get("kind") == "run"), None)
    entries = []
    for folder in map(Path, scores):
        if (read_manifest(folder) or {}).get("kind") != "scores":
            raise UsageError(f"{folder}: no scores; --scores takes what `troodon evaluate` wrote")
        entries += read_json(folder / "scores.json")
    return Origin(run, entries, licence)


def card(backbone: Backbone, origin: Origin, report: dict) -> str:
    """README.md of an export to Hugging Face."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dinov2", "self-supervised-learning", "troodon"],
    }
    name = _plain(origin.run.name if origin.run else backbone.name)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n\n{_network(backbone)}",
        _use(backbone, report),
        _training(origin),
        _data(origin),
        _scores(origin),
        _parity(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _network(backbone: Backbone) -> str:
    c = backbone.config
    parameters = sum(p.numel() for p in backbone.vit.parameters())
    registers = f", {plural(c.registers, 'register')}" if c.registers else ""
    return (
        f"A vision transformer that gives features of images: {plural(c.depth, 'block')}, {c.dim} channels, "
        f"{plural(c.heads, 'head')}, patches of {c.patch} pixels{registers}, {c.mlp} MLPs, {parameters / 1e6:.1f} M "
        f"parameters, images of {plural(c.channels, 'channel')}. Exported by Troodon {version()}; fingerprint of the "
        f"backbone: `{backbone.fingerprint}`."
    )


def _use(backbone: Backbone, report: dict) -> str:
    missing = report.get("without_processor")
    if missing:
        prepare = f"# prepared as follows, since {_plain(missing)}\n# {json.dumps(backbone.preprocessing.as_dict())}"
        imports, inputs = "AutoModel", "pixel_values=images"
    else:
        prepare = (
            'processor = AutoImageProcessor.from_pretrained(place)\ninputs = processor(image, return_tensors="pt")'
        )
        prepare += "  # an array (height, width, 1)" if backbone.channels == 1 else ""
        imports, inputs = "AutoImageProcessor, AutoModel", "**inputs"
    first = 1 + backbone.config.registers
    code = (
        f"from transformers import {imports}\n\n{prepare}\n"
        f"tokens = AutoModel.from_pretrained(place)({inputs}).last_hidden_state\n"
        f"cls, patches = tokens[:, 0], tokens[:, {first}:]"
    )
    return f"## Use\n\n`place` is this folder, or its name on the hub.\n\n```python\n{code}\n```"


def _training(origin: Origin) -> str:
    if origin.run is None:
        return "## Training\n\nNothing is recorded: these weights were not exported from a run."
    recorded = (read_manifest(origin.run) or {})["settings"]
    config = recorded["config"]
    start = f"started from the backbone `{recorded['init']}`" if recorded.get("init") else "started from random weights"
    teachers = ", ".join(f"`{teacher}`" for teacher in recorded.get("teachers", []))
    learns = f"distilled from {teachers}" if teachers else "pretrained without labels"
    text = f"This network was {learns}, for {config['steps']:,} steps of {config['batch']:,} images; it {start}."
    recipe = yaml.safe_dump(config, sort_keys=False).rstrip()
    return f"## Training\n\n{text} The whole recipe:\n\n```yaml\n{recipe}\n```"


def _data(origin: Origin) -> str:
    lines = []
    if origin.run is not None:
        manifest = read_manifest(origin.run) or {}
        lines.append(f"{plural(manifest['settings']['images'], 'image')}.")
        lines += [_selection(folder) for folder in _sources(manifest.get("command", []))]
    if origin.licence:
        lines.append(f"Licence of the data, as told by who exported this: {_plain(origin.licence)}.")
    elif origin.run is not None:
        lines.append("Nothing is recorded of the licence of the data.")
    return "\n\n".join(["## Data", *filter(None, lines)]) if lines else ""


def _sources(command: list[str]) -> list[Path]:
    """The places that a command names as --data."""
    sources, taking = [], False
    for word in command:
        if word.startswith("--"):
            taking = word.partition("=")[0] == "--data"
            sources += [Path(word.partition("=")[2])] if taking and "=" in word else []
        elif taking:
            sources.append(Path(word))
    return sources


def _selection(folder: Path) -> str:
    """The story of a selection, in numbers; nothing of other sources."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["kind"] != "selection" or not (folder / "summary.json").exists():
        return ""
    summary = read_json(folder / "summary.json")
    rows = [
        f"| {_plain(stage.get('name', ''))} | {_plain(stage.get('what') or '')} | {stage['in']:,} | "
        f"{stage.get('dropped', 0):,} |"
        for stage in summary.get("stages", [])
    ]
    text = f"A selection (`{manifest['fingerprint']}`) of {summary['kept']:,} images. What each stage left out:"
    return "\n".join([text, "", "| stage | leaves out | images before | left out |", "|---|---|---|---|", *rows])


def _scores(origin: Origin) -> str:
    if not origin.scores:
        return ""
    rows = [
        f"| {_plain(e['dataset'])} | {_plain(e['protocol'])} | {_plain(e['metric'])} | {_plain(e['backbone'])} | "
        f"{e['value']:.4g} | {e['low']:.4g} to {e['high']:.4g} | `{e['fingerprint']}` |"
        for e in origin.scores
    ]
    text = "Two scores can be compared only if their fingerprints are equal."
    head = "| dataset | protocol | metric | features | value | interval | fingerprint |\n|---|---|---|---|---|---|---|"
    return "\n".join(["## Scores", "", text, "", head, *rows])


def _parity(report: dict) -> str:
    lines = [f"{report['reader']} read this folder back: {report['result']} (`parity.json`)."]
    lines += [
        f"At {row['height']} x {row['width']} pixels they differ by up to {row['difference']:.1e}: {row['rule']}."
        for row in report["other_rule"]
    ]
    lines += [f"{note}." for note in report.get("processor", {}).get("notes", ())]
    return "## Parity\n\n" + "\n".join(f"- {line}" for line in lines)


def _plain(text: object) -> str:
    """Words of users and of files in one line, in which nothing is markup."""
    plain = printable(" ".join(str(text).split()))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in plain)
