"""The section about runs: loss terms, schedules and speed over steps, settings, and pictures of the input."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from troodon.report.artifacts import Artifact
from troodon.report.charts import describe_curve, line_chart
from troodon.report.markup import (
    SPACE,
    Card,
    Content,
    Markup,
    Section,
    details,
    flatten,
    h,
    is_number,
    join,
    legend,
    note,
    number,
    table,
)
from troodon.report.runs import Run, health_text, state_text, time_text
from troodon.report.thumbnails import picture
from troodon.text import plural

# (key of metrics.jsonl, title, what it is)
LEARNING = [
    ("loss", "Total loss", "What is minimised: the sum of the terms."),
    ("dino_global", "DINO, global crops", "Predict the teacher's targets for one large crop from the other."),
    ("dino_local", "DINO, local crops", "Predict the teacher's targets for large crops from small ones."),
    ("ibot", "iBOT, masked patches", "Predict the teacher's targets for hidden patches, which the teacher sees."),
    ("koleo", "KoLeo, spread", "Pushes images away from their nearest neighbours; lower is wider."),
    ("kde", "KDE, spread", "Pushes images away from where others are dense; lower is wider."),
    ("contrast", "Contrast", "Find the other view of an image among all views of the step."),
    ("gram", "Gram anchoring", "Keep the cosines between patches as an earlier EMA had them."),
    ("knn", "Quick k-NN", "Accuracy of frozen features by their neighbours; labels are used only here."),
]
HEALTH = [
    ("target_entropy", "Entropy of targets", "Of ln K. At 100 % targets are the same for every image."),
    ("mean_target_entropy", "Mean target's entropy", "Of ln K. Near 0 % all images get the same targets."),
    ("prototypes_used", "Prototypes in use", "Different first choices, of as many as possible."),
    ("feature_cosine", "Mean cosine of two images", "At 1 all images look the same to the network."),
    ("effective_rank", "Effective rank of features", "Directions in which images differ, weighted by how much."),
    ("nearest_distance", "Nearest distance", "To the nearest image of a batch, on the unit sphere."),
]
SCHEDULES = [
    ("lr", "Learning rate", None),
    ("momentum", "EMA momentum", "The share of the EMA that stays at each step."),
    ("teacher_temperature", "Teacher temperature", None),
    ("weight_decay", "Weight decay", None),
]
MACHINE = [
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("grad_norm_backbone", "Gradient norm, backbone", None),
    ("grad_norm_dino_head", "Gradient norm, DINO head", None),
    ("grad_norm_ibot_head", "Gradient norm, iBOT head", None),
    ("images_per_second", "Images per second", None),
    ("data_wait", "Waiting for data", "Share of the time in which the device waits."),
]
Groups = Sequence[tuple[str, Sequence[tuple[str, str, str | None]]]]
GROUPS: Groups = [
    ("Is it learning?", LEARNING),
    ("Is it healthy?", HEALTH),
    ("Schedules, gradient and speed", SCHEDULES + MACHINE),
]
# Values in [0, 1], shown in per cent.
SHARES = {"data_wait", "knn", "target_entropy", "mean_target_entropy", "prototypes_used"}
EXACT = {"knn"} | {key for key, *_ in SCHEDULES}  # without noise: drawn without a running mean
FROM_ZERO = SHARES | {"images_per_second", "lr", "grad_norm", "effective_rank"}
COLOURS = {key: colour for colour, group in (("c3", SCHEDULES), ("c2", MACHINE), ("c4", HEALTH)) for key, *_ in group}
COLOURS |= {"knn": "c4"}
KNOWN = {"step", "seconds"} | {key for _, group in GROUPS for key, *_ in group}
PICTURES = {"crops": "The input of the network: augmented large and small crops."}
EVENT_ROWS, QUARANTINE_ROWS, OTHER_CHARTS = 20, 10, 12


def training_section(artifacts: list[Artifact]) -> Section | None:
    """Curves, final numbers, pictures, settings and environment of each run. None without one."""
    if not artifacts:
        return None
    body, runs = [], [Run.of(artifact) for artifact in artifacts]
    for artifact, run in zip(artifacts, runs, strict=True):
        body.append(h("h3", run.name) if len(runs) > 1 else None)
        body.append(_run_body(artifact, run, "h4" if len(runs) > 1 else "h3"))
    alarms = list(dict.fromkeys(name for run in runs for name in run.alarms))
    longest = max(runs, key=lambda run: run.done)
    steps = longest.done
    card = Card("steps", number(steps), "still going" if not longest.finished else time_text(longest))
    who = "a network" if len(runs) == 1 else f"{number(len(runs))} networks"
    verb = "has learned" if len(runs) == 1 and not longest.finished else "learned"
    clause = f"{who} {verb} without labels for {plural(steps, 'step')}" if steps else f"{who} began to learn"
    if alarms:
        clause += f" (not healthy: {', '.join(alarms)})"
    return Section("training", "Training", join(body), (card,) if steps else (), clause)


def _run_body(artifact: Artifact, run: Run, heading: str) -> Markup:
    return join(
        h("p", state_text(run), class_="prose"),
        health_body(run),
        charts(run.records, heading),
        _final(run.records),
        _pictures(artifact),
        _quarantine(artifact),
        events_table(run.events),
        _settings(artifact),
    )


def values(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one quantity; shares in per cent."""
    pairs = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
    scale = 100.0 if key in SHARES else 1.0
    return np.array([x for x, _ in pairs]), np.array([y * scale for _, y in pairs], dtype=float)


def health_body(run: Run) -> Content:
    """The alarms that are on, with their causes, or that there is none; None where nothing is known yet."""
    if run.alarms:
        return [
            h("p", h("strong", f"{name}, since step {number(event.get('at'))}: "), event.get("message"), class_="alarm")
            for name, event in run.alarms.items()
        ]
    text = health_text(run)
    return h("p", text, class_="prose") if text else None


def _pictures(artifact: Artifact) -> Content:
    out = []
    for path in artifact.pictures():
        caption = PICTURES.get(path.stem, path.stem.replace("_", " ").capitalize() + ".")
        shown = picture(path, caption)
        out.append(h("figure", shown, h("figcaption", caption)) if shown else None)
    return out


def charts(records: list[dict], heading: str, groups: Groups = GROUPS) -> Content:
    """The curves of a run, by group; with all groups also those that it has beside these."""
    extra = sorted({key for r in records for key, value in r.items() if is_number(value)} - KNOWN)[:OTHER_CHARTS]
    others = [(key, key.replace("_", " ").capitalize(), None) for key in extra]
    key, out = legend(("c1", "running mean"), ("faint", "every record")), []
    for title, group in [*groups, *([("Also recorded", others)] if groups[-1] is GROUPS[-1] else [])]:
        drawn = [_chart(records, *entry) for entry in group]
        if any(drawn):
            out += [h(heading, title, class_="sub"), None if out else key, h("div", drawn, class_="grid")]
    return out


def _chart(records: list[dict], key: str, title: str, caption: str | None) -> Content:
    x_N, y_N = values(records, key)
    if not len(x_N):
        return None
    unit = f"{SPACE}%" if key in SHARES else ""
    drawing = line_chart(
        x_N,
        y_N,
        label=describe_curve(title, x_N, y_N, unit),
        colour=COLOURS.get(key, "c1"),
        unit=unit,
        smooth=key not in EXACT,
        floor=0.0 if key in FROM_ZERO else None,
    )
    head = h("p", title, h("span", _format(key, y_N[-1]), class_="last"), class_="title")
    return h("figure", head, drawing, h("figcaption", caption) if caption else None)


def _format(key: str, value: float) -> str:
    return f"{value:.1f}{SPACE}%" if key in SHARES else number(float(value), 4)


def _final(records: list[dict]) -> Content:
    rows = []
    for key, title, _ in LEARNING + MACHINE:
        x_N, y_N = values(records, key)
        if len(x_N):
            tail = y_N[-max(1, len(y_N) // 10) :]
            numbers = (y_N[0], y_N.min(), y_N.max(), tail.mean(), y_N[-1])
            rows.append((title, *(_format(key, v) for v in numbers)))
    head = ("quantity", "first", "lowest", "highest", "mean of the last tenth", "last")
    return table("Final numbers", head, rows) if rows else None


def _quarantine(artifact: Artifact) -> Content:
    records = artifact.lines("quarantine.jsonl")
    if not records:
        return None
    kinds = Counter(str(r.get("status") or r.get("reason") or "unknown") for r in records).most_common(3)
    counted = f"{plural(len(records), 'file')} could not be used and {'was' if len(records) == 1 else 'were'} set aside"
    rows = [(str(r.get("path", "?")), str(r.get("reason") or r.get("status") or "")) for r in records[:QUARANTINE_ROWS]]
    rest = (
        note(f"and {number(len(records) - QUARANTINE_ROWS)} more, in quarantine.jsonl.")
        if len(records) > QUARANTINE_ROWS
        else None
    )
    text = f"{counted} ({', '.join(f'{number(n)} {kind}' for kind, n in kinds)})."
    title = "Files set aside in training"
    return join(h("p", text, class_="prose"), details(title, table(title, ("file", "reason"), rows, text=2), rest))


def events_table(events: list[dict]) -> Content:
    if not events:
        return None
    rows = [(str(e["event"]), str(e.get("message", "")), number(e.get("at"))) for e in events[-EVENT_ROWS:]]
    title = "Events" if len(events) <= EVENT_ROWS else f"The last {EVENT_ROWS} of {number(len(events))} events"
    return table(title, ("event", "what happened", "after step"), rows, text=2)


def _settings(artifact: Artifact) -> Content:
    out = []
    if settings := artifact.text("config.yaml"):
        out.append(details("Settings (config.yaml)", h("pre", settings)))
    for name, title in (("environment.json", "Environment"), ("plan.json", "Plan")):
        rows = flatten(artifact.json(name))
        if rows:
            out.append(details(f"{title} ({name})", table(title, ("what", "value"), rows, text=2)))
    return out
