"""The first screen of a report, after what was done: whether it worked, and what to do next."""

import os
import shlex
from pathlib import Path

from troodon.report.artifacts import Artifact
from troodon.report.markup import Content, h, percent
from troodon.report.runs import Run, knn_text
from troodon.report.scores import verdict

LABELLED = "LABELLED"  # stands for a folder of the user's


def first_screen(artifacts: list[Artifact]) -> Content:
    """Two sentences, with the command that comes next; None where there is nothing to judge and nothing to do."""
    good, text = worked(artifacts)
    words = next_step(artifacts, good)
    kind = {True: "yes", False: "no", None: "open"}[good]
    judged = h("p", h("strong", text, class_=kind)) if text else None
    step = [h("p", words[0]), h("pre", words[1]) if words[1] else None] if words else None
    return h("div", judged, step, class_="first") if judged or step else None


def worked(artifacts: list[Artifact]) -> tuple[bool | None, str]:
    """Whether the features are worth something, None where it is open; and the sentence that says so."""
    runs = _runs(artifacts)
    if ill := [(run, name) for run in runs for name in run.alarms]:
        listed = ", ".join(f"{name} ({run.name})" for run, name in ill)
        return False, f"The training is not healthy: {listed}."
    if lost := [run for run in runs if run.not_finite and run.not_finite[-1] == run.records[-1]["step"]]:
        return False, f"The loss is not finite: {', '.join(run.name for run in lost)}."
    judged = verdict([artifact for artifact in artifacts if artifact.kind == "scores"])
    if judged is not None:
        return judged.better, judged.text
    known = [run for run in runs if run.records]
    if not known:
        return None, ""
    last, healthy = known[-1], all(run.health_readings for run in known)
    calm = "The training is healthy; " if healthy else ""
    if len(last.knn) > 1 and last.knn[0][0] == 0:
        risen = last.knn[-1][1] > last.knn[0][1]
        return (None if risen else False), f"{calm or 'Of its features, '}its quick {knn_text(last)}."
    text = f"{calm}{'w' if calm else 'W'}hat its features are worth is not measured yet."
    return None, text if not last.knn else f"{text} Its quick k-NN is {percent(last.knn[-1][1])}."


def next_step(artifacts: list[Artifact], good: bool | None) -> tuple[str, str] | None:
    """What to do next, and the command for it."""
    of_kind = {kind: [a for a in artifacts if a.kind == kind] for kind in ("index", "selection", "run", "scores")}
    if of_kind["run"]:
        return _after_runs(of_kind["run"], bool(of_kind["scores"]), good)
    for kind, why in (("selection", "Train on what was kept:"), ("index", "Train on these images:")):
        if of_kind[kind]:
            where = _path(of_kind[kind][-1].folder)
            return f"Next: {why[:1].lower()}{why[1:]}", f"troodon pretrain small --data {where} --out runs/first"
    return None


def _after_runs(artifacts: list[Artifact], measured: bool, good: bool | None) -> tuple[str, str]:
    runs = [Run.of(artifact) for artifact in artifacts]
    for artifact, run in zip(artifacts, runs, strict=True):
        if run.alarms:
            return "Next: do what the alarm says under Training, and begin a new run with it.", ""
        if not run.finished:
            again = shlex.join(artifact.command) if artifact.command else ""
            return f"Next: go on with {run.name} by the command that began it, unless it still runs:", again
    last = artifacts[-1]
    where = _path(last.folder)
    if not measured:
        words = f"troodon evaluate mine --backbone {where} --data {LABELLED} --out {where}-scores"
        return f"Next: measure the features; {LABELLED} stands for a folder of images with labels:", words
    if good:
        return "Next: use the features, or give them to another library:", (
            f"troodon embed --backbone {where} --data photos/ --out embeddings\n"
            f"troodon export {where} --to torch --out release.pt2"
        )
    return "Next: train longer, from where this run ended, or on more images:", (
        f"troodon pretrain small --data photos/ --out runs/second --init {where}"
    )


def _runs(artifacts: list[Artifact]) -> list[Run]:
    return [Run.of(artifact) for artifact in artifacts if artifact.kind == "run"]


def _path(folder: Path) -> str:
    """The folder as a word of a command that is given here: relative, if it lies here."""
    here = os.path.relpath(folder)
    return shlex.quote(str(folder) if here.startswith("..") else here)
