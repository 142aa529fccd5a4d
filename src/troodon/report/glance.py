"""An artifact at a glance: the few numbers of it that a notebook shows where a verb returns its folder."""

from pathlib import Path

from troodon.report.artifacts import Artifact, open_artifact
from troodon.report.markup import number, percent
from troodon.report.runs import Run, health_text, knn_text, state_text
from troodon.report.scores import ERRORS, METRICS, PROTOCOLS
from troodon.text import html_table

Rows = list[tuple[str, str]]


def folder_table(folder: Path) -> str | None:
    """A table about the artifact in a folder; of a run's backbone, about the run. None where there is none."""
    artifact = open_artifact(folder, folder.name)
    if (
        artifact is not None
        and artifact.kind == "backbone"
        and (run := open_artifact(folder.parent, folder.parent.name))
    ):
        artifact = run if run.kind == "run" else artifact
    if artifact is None:
        return None
    make = {"run": _run, "selection": _selection, "scores": _scores, "index": _index, "embeddings": _embeddings}
    rows = make[artifact.kind](artifact) if artifact.kind in make else []
    return html_table(f"{artifact.kind.capitalize()} {artifact.name}", [*rows, ("folder", str(folder))])


def scores_table(entries: list[dict]) -> str:
    """A table of scores as `evaluate` returns them."""
    rows = []
    for e in entries:
        words = [PROTOCOLS.get(e["protocol"], e["protocol"]), METRICS.get(e["metric"], e["metric"]), e["dataset"]]
        is_share = e["metric"] not in ERRORS
        low, value, high = (percent(e[k]) if is_share else number(e[k]) for k in ("low", "value", "high"))
        rows.append((e["backbone"], *words, value, f"{low} to {high}"))
    return html_table("Frozen features, with 95 % intervals", rows)


def _run(artifact: Artifact) -> Rows:
    run = Run.of(artifact)
    told = [("state", state_text(run)), ("health", health_text(run)), ("quick k-NN", knn_text(run))]
    return [(name, text) for name, text in told if text]


def _selection(artifact: Artifact) -> Rows:
    summary = artifact.json("summary.json") or {}
    stages = [s for s in summary.get("stages", ()) if s.get("dropped")]
    kept = [("kept", f"{number(summary['kept'])} images")] if "kept" in summary else []
    return kept + [(f"left out by {s['name']}", number(s["dropped"])) for s in stages]


def _scores(artifact: Artifact) -> Rows:
    return [
        (f"{e['backbone']}, {PROTOCOLS.get(e['protocol'], e['protocol'])}", number(e["value"]))
        for e in artifact.json("scores.json") or ()
    ]


def _index(artifact: Artifact) -> Rows:
    return summary_rows(artifact.json("summary.json") or {})


def summary_rows(summary: dict) -> Rows:
    """What `scan` has found, in short."""
    named = {"images": "images", "ok": "that can be read", "shards": "shards"}
    rows = [(words, number(summary[name])) for name, words in named.items() if name in summary]
    labels = summary.get("labels")
    return rows + ([("classes", number(len(labels)))] if labels else [])


def _embeddings(artifact: Artifact) -> Rows:
    known = ("backbone", "tokens", "compute", "images")
    return [(name, number(artifact.settings[name])) for name in known if name in artifact.settings]
