"""The section about scores: every backbone under every protocol, with intervals, best first."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from troodon.report import charts
from troodon.report.artifacts import Artifact
from troodon.report.markup import (
    SPACE,
    Card,
    Content,
    Section,
    details,
    figure,
    flatten,
    h,
    is_number,
    join,
    legend,
    note,
    number,
    percent,
    table,
)
from troodon.report.thumbnails import picture

PROTOCOLS = {"knn": "k-NN", "linear": "linear", "linear_chosen_on_val": "linear, chosen on the images to test on",
             "logistic": "logistic regression", "kmeans": "clusters", "segment": "segmentation",
             "segment_linear_4": "segmentation, 4 blocks", "segment_linear_4_ms": "segmentation, 4 blocks and scales",
             "depth": "depth", "depth_patches": "depth, patches alone", "depth_linear_4": "depth, 4 blocks",
             "depth_linear_4_ms": "depth, 4 blocks and scales",
             "depth_dpt": "depth, convolutions", "retrieve": "retrieval", "copies": "copies among all pairs",
             "match": "patches matched", "match_light": "patches matched, other light",
             "discover": "things found"}  # fmt: skip
METRICS = {"accuracy": "accuracy", "miou": "mean IoU", "pixel_accuracy": "pixel accuracy", "nmi": "mutual information",
           "map": "mean average precision", "map_11_points": "mean average precision, 11 points",
           "micro_ap": "average precision", "absrel": "relative error", "rmse": "RMSE",
           "rmse_log": "RMSE of logarithms"}  # fmt: skip
ERRORS = {"absrel", "abs_rel", "rmse", "rmse_log", "error", "loss"}  # lower is better, and not a share of anything
TO = "\N{EN DASH}"
WORDS = {"rounds": "k-means iterations"}  # of settings whose names on disk are earlier ones
BASELINES = re.compile(r"random|histogram|pixel|chance|untrained|prior|patch-colours|mean colour", re.IGNORECASE)
SECONDARY = re.compile(r"pixel_accuracy|rmse|rmse_log|delta\d|p@\d+")  # shown only among all metrics
PICTURES = {
    "pca": "The first three principal components of the patch features, as red, green and blue. With good "
    "features, parts that mean the same get the same colour, without labels.",
    "neighbours": "A query on the left, then the images whose features lie nearest to it.",
}


def scores_section(artifacts: list[Artifact]) -> Section | None:
    """Tables, bars with 95 % intervals, sentences and pictures. None without scores."""
    if not artifacts:
        return None
    entries = label_unlike_protocols([_entries(artifact) for artifact in artifacts])
    groups = _groups(entries)
    main = main_metrics(groups)
    others = details("All metrics", _table(groups)) if len(main) < len(groups) else None
    body = [
        _sentences(main),
        _table(main),
        _bars(main),
        others,
        [_pictures(artifact, len(artifacts)) for artifact in artifacts],
    ]
    if not entries:
        body.insert(0, note("The scores are empty."))
    return Section("scores", "What the features are worth", join(body, _settings(entries)), _cards(main), _clause(main))


@dataclass(frozen=True)
class Verdict:
    """Whether features are better than those that learned nothing, by one score, and the sentence that says so."""

    better: bool | None  # None where intervals overlap
    text: str


def verdict(artifacts: list[Artifact]) -> Verdict | None:
    """The best trained backbone against the best baseline, by k-NN if that was measured; None without both."""
    groups = main_metrics(_groups(label_unlike_protocols([_entries(artifact) for artifact in artifacts])))
    both = {key: group for key, group in groups.items() if _best_trained(group) and _baselines(group)}
    if not both:
        return None
    key = next((key for key in both if key[1].partition(" [")[0] == "knn"), next(iter(both)))
    best, baseline = _best_trained(both[key]), _baselines(both[key])[0]
    assert best is not None
    ours, theirs = _interval_text(best), _interval_text(baseline)
    ends = ("high", "low") if _is_error(key[2]) else ("low", "high")
    apart = bool(ours and theirs) and _better(best | {"value": best[ends[0]]}, baseline | {"value": baseline[ends[1]]})
    where = f" on {key[0]}" if key[0] else ""
    said = f"{_protocol_name(key[1])}{where} is {_value_text(best)}"
    other = f"{_value_text(baseline)} of the best baseline, {baseline['backbone']}"
    if not _better(best, baseline):
        return Verdict(False, f"It did not work yet: {said}, not better than the {other}.")
    if not apart:
        return Verdict(None, f"Whether it worked is not sure: {said}, against {other}, and the intervals overlap.")
    return Verdict(True, f"It worked: {said}, against {other}.")


def _better(entry: dict, other: dict) -> bool:
    return _sort_key(entry) > _sort_key(other)


def _groups(entries: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """The entries by dataset, protocol and metric, the best of each first."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry["dataset"], entry["protocol"], entry["metric"]].append(entry)
    for group in groups.values():
        group.sort(key=lambda e: (-_sort_key(e), e["backbone"]))
    return groups


def _entries(artifact: Artifact) -> list[dict]:
    """The recorded entries, with empty strings for missing names; anything that is no score is skipped."""
    entries = artifact.json("scores.json")
    out = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "value" in entry:
            names = {key: str(entry.get(key) or "") for key in ("protocol", "dataset", "metric")}
            out.append({**entry, **names, "backbone": str(entry.get("backbone") or "backbone")})
    return out


def main_metrics(groups: dict) -> dict:
    """The main metrics of each protocol; secondary ones only where it has no others."""
    main = {(d, p) for d, p, metric in groups if not SECONDARY.fullmatch(metric)}
    return {key: group for key, group in groups.items() if not SECONDARY.fullmatch(key[2]) or key[:2] not in main}


def label_unlike_protocols(artifacts: list[list[dict]]) -> list[dict]:
    """All entries; protocols that artifacts measured differently under one name get names that differ.

    So these are not shown side by side. Baselines (a histogram has no crop) go with what was trained in their artifact.
    """
    labelled: list[tuple[dict, tuple, str]] = []
    for entries in artifacts:
        like: dict[tuple, str] = {}
        for entry in sorted(entries, key=is_baseline):
            key = (entry["dataset"], entry["protocol"], entry["metric"])
            like.setdefault(key, str(entry.get("fingerprint") or "")[:6])
        keys = ((e["dataset"], e["protocol"], e["metric"]) for e in entries)
        labelled += [(entry, key, like[key]) for entry, key in zip(entries, keys)]
    fingerprints = defaultdict(set)
    for _, key, fingerprint in labelled:
        fingerprints[key].add(fingerprint)
    return [
        {**entry, "protocol": f"{entry['protocol']} [{label or 'unsaid'}]"} if len(fingerprints[key]) > 1 else entry
        for entry, key, label in labelled
    ]


def is_baseline(entry: dict) -> bool:
    """Whether this is a score of a baseline: a random network, a histogram, raw pixels."""
    return bool(BASELINES.search(entry["backbone"]))


def _is_error(metric: str) -> bool:
    return metric.lower() in ERRORS


def _sort_key(entry: dict) -> float:
    if not is_number(entry["value"]):
        return -float("inf")
    return -entry["value"] if _is_error(entry["metric"]) else entry["value"]


def _value_text(entry: dict) -> str:
    return number(entry["value"]) if _is_error(entry["metric"]) else percent(entry["value"])


def _interval_text(entry: dict) -> str:
    low, high = entry.get("low"), entry.get("high")
    if not (is_number(low) and is_number(high)):
        return ""
    if _is_error(entry["metric"]):
        return f"{number(low)}{TO}{number(high)}"
    return f"{100 * low:.1f}{TO}{100 * high:.1f}"


def _protocol_name(name: str) -> str:
    plain, bracket, way = name.partition(" [")
    return PROTOCOLS.get(plain, plain.replace("_", " ")) + bracket + way


def _best_trained(group: list[dict]) -> dict | None:
    """The best score of a trained backbone; groups are sorted, the best first."""
    return next((e for e in group if not is_baseline(e) and is_number(e["value"])), None)


def _baselines(group: list[dict]) -> list[dict]:
    return [e for e in group if is_baseline(e) and is_number(e["value"])]


def _sentences(groups: dict) -> Content:
    """k-NN on birds: 71.2 % (68.0-74.1), random network 35.0 %, colour histogram 14.1 %."""
    out = []
    for (dataset, protocol, metric), group in groups.items():
        best = _best_trained(group)
        if best is None:
            continue
        interval = f" ({_interval_text(best)})" if _interval_text(best) else ""
        others = "".join(f", {e['backbone']} {_value_text(e)}" for e in _baselines(group))
        named = METRICS.get(metric.lower(), metric.replace("_", " "))
        where = f" on {dataset}" if dataset else ""
        error = f", {named}" if metric != "accuracy" else ""
        out.append(
            h(
                "li",
                h("strong", f"{_protocol_name(protocol)} {_value_text(best)}"),
                f"{interval}{others}",
                h("span", f"{where}{error}", class_="quiet"),
            )
        )
    return h("ul", out, class_="prose") if out else None


def _table(groups: dict) -> Content:
    """Backbones in rows, protocols in columns, a table for each dataset."""
    out = []
    for dataset in dict.fromkeys(d for d, *_ in groups):
        columns = {key: group for key, group in groups.items() if key[0] == dataset}
        cells = {(e["backbone"], key): e for key, group in columns.items() for e in reversed(group)}
        names = dict.fromkeys(e["backbone"] for group in columns.values() for e in group)
        metrics = [METRICS.get(metric.lower(), metric.replace("_", " ")) for *_, metric in columns]
        head = ["backbone", *(f"{_protocol_name(key[1])}, {metric}" for key, metric in zip(columns, metrics))]
        rows = []
        for name in names:
            row: list[Content] = [h("strong", name) if not BASELINES.search(name) else name]
            for key in columns:
                entry = cells.get((name, key))
                interval = _interval_text(entry) if entry else ""
                row.append(
                    entry and [_value_text(entry), h("span", f" ({interval})" if interval else "", class_="quiet")]
                )
            rows.append(row)
        where = f" on {dataset}" if dataset else ""
        out.append(table(f"Frozen features{where}, with 95{SPACE}% intervals", head, rows))
    return out


def _bars(groups: dict) -> Content:
    out, several = [], Counter((dataset, protocol) for dataset, protocol, _ in groups)
    for (dataset, protocol, metric), group in groups.items():
        known = [e for e in group if is_number(e["value"])]
        if not known:
            continue
        error = _is_error(metric)
        ends = [max(e["value"], e["high"] if is_number(e.get("high")) else 0) for e in known]
        top = (max(ends) or 1.0) if error else 1.0
        rows = []
        for e in known:
            interval = (e["low"], e["high"]) if _interval_text(e) else None
            label = f"{_value_text(e)} ({_interval_text(e)})" if interval else _value_text(e)
            rows.append(charts.Bar(e["backbone"], label, (("ref" if is_baseline(e) else "c1", e["value"]),), interval))
        title = f"{_protocol_name(protocol)} on {dataset}" if dataset else _protocol_name(protocol)
        if several[dataset, protocol] > 1:
            title += f": {METRICS.get(metric, metric)}"
        title = title[:1].upper() + title[1:] if protocol != "knn" else title
        unit, scale = ("", 1.0) if error else (f"{SPACE}%", 100.0)
        caption = "Lower is better." if error else None
        out.append(figure(charts.bar_chart(rows, label=title, top=top, unit=unit, scale=scale), title, caption))
    key = legend(("c1", "trained"), ("ref", "to compare with"), ("mark", f"95{SPACE}% interval"))
    return [key, h("div", out, class_="grid two")] if out else None


def _pictures(artifact: Artifact, artifacts: int) -> Content:
    out, order = [], {name: i for i, name in enumerate(PICTURES)}
    for path in sorted(artifact.pictures(), key=lambda p: order.get(p.stem, len(order))):
        caption = PICTURES.get(path.stem, path.stem.replace("_", " ").capitalize() + ".")
        shown = picture(path, caption)
        where = f"{artifact.name}: " if artifacts > 1 else ""
        out.append(h("figure", shown, h("figcaption", where, caption)) if shown else None)
    return out


def _settings(entries: list[dict]) -> Content:
    rows = []
    for e in entries:
        settings = e.get("settings")
        if isinstance(settings, dict):  # these two are long, and in the fingerprint
            settings = {name: value for name, value in settings.items() if name not in ("protocol", "versions")}
        text = ", ".join(f"{WORDS.get(name, name)} {value}" for name, value in flatten(settings))
        if text:
            rows.append((e["backbone"], _protocol_name(e["protocol"]), e["dataset"], text))
    rows = list(dict.fromkeys(rows))  # metrics of one protocol have the same settings
    title = "Settings of the protocols"
    return details(title, table(title, ("backbone", "protocol", "dataset", "settings"), rows, text=4)) if rows else None


def _cards(groups: dict) -> tuple[Card, ...]:
    """Cards of the first three scores of trained backbones, each with a baseline."""
    out = []
    for (_, protocol, metric), group in groups.items():
        best, others = _best_trained(group), _baselines(group)
        baseline = next((e for e in others if "random" in e["backbone"].lower()), others[0] if others else None)
        if best is not None and len(out) < 3:
            comparison = f"{baseline['backbone']} {_value_text(baseline)}" if baseline else ""
            metric_text = "" if protocol in PROTOCOLS else f" {METRICS.get(metric, metric)}"
            label = f"{_protocol_name(protocol)}{metric_text}, {best['backbone']}"
            out.append(Card(label, _value_text(best), comparison, strong=True))
    return tuple(out)


def _clause(groups: dict) -> str:
    for (dataset, protocol, _), group in groups.items():
        best = _best_trained(group)
        if best is not None:
            where = f" on {dataset}" if dataset else ""
            return f"frozen features reach {_value_text(best)}{where} by {_protocol_name(protocol)}"
    return ""
