"""What the features are worth: every backbone under every protocol, with intervals, best first."""

import re
from collections import Counter, defaultdict

from troodon.report import charts
from troodon.report.artifacts import Artifact
from troodon.report.markup import (
    SPACE,
    Card,
    Content,
    Part,
    figure,
    flat,
    folded,
    h,
    is_number,
    join,
    legend,
    note,
    number,
    share,
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
REFERENCE = re.compile(r"random|histogram|pixel|chance|untrained|prior|patch-colours|mean colour", re.IGNORECASE)
SECOND = re.compile(r"pixel_accuracy|rmse|rmse_log|delta\d|p@\d+")  # metrics that are told only with all others
PICTURES = {
    "pca": "The first three principal components of the patch features, as red, green and blue. With good "
    "features, parts that mean the same get the same colour, although nobody named them.",
    "neighbours": "A query on the left, then the images whose features lie nearest to it.",
}


def scores(artifacts: list[Artifact]) -> Part | None:
    """Tables, bars with 95 % intervals, sentences and pictures. None without scores."""
    if not artifacts:
        return None
    entries = label_unlike_protocols([_entries(one) for one in artifacts])
    groups = defaultdict(list)
    for entry in entries:
        groups[entry["dataset"], entry["protocol"], entry["metric"]].append(entry)
    for group in groups.values():
        group.sort(key=lambda e: (-_better(e), e["backbone"]))
    first = main_metrics(groups)
    others = folded("All metrics", _table(groups)) if len(first) < len(groups) else None
    body = [_words(first), _table(first), _bars(first), others, [_pictures(one, len(artifacts)) for one in artifacts]]
    if not entries:
        body.insert(0, note("The scores are empty."))
    return Part("scores", "What the features are worth", join(body, _settings(entries)), _cards(first), _clause(first))


def _entries(one: Artifact) -> list[dict]:
    """Entries as recorded, with names for what they leave out; a list of anything else is no list of scores."""
    found = one.json("scores.json")
    out = []
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, dict) and "value" in entry:
            names = {key: str(entry.get(key) or "") for key in ("protocol", "dataset", "metric")}
            out.append({**entry, **names, "backbone": str(entry.get("backbone") or "backbone")})
    return out


def main_metrics(groups: dict) -> dict:
    """Of each protocol the metrics that say most; others only where there are none of these."""
    said = {(d, p) for d, p, metric in groups if not SECOND.fullmatch(metric)}
    return {key: group for key, group in groups.items() if not SECOND.fullmatch(key[2]) or key[:2] not in said}


def label_unlike_protocols(artifacts: list[list[dict]]) -> list[dict]:
    """All entries; where artifacts measured by one name in unlike ways, the name says which, so that none stand side
    by side. What an artifact compares with (a histogram has no crop) goes with what was trained there."""
    found: list[tuple[dict, tuple, str]] = []
    for entries in artifacts:
        like: dict[tuple, str] = {}
        for entry in sorted(entries, key=is_baseline):
            key = (entry["dataset"], entry["protocol"], entry["metric"])
            like.setdefault(key, str(entry.get("fingerprint") or "")[:6])
        keys = ((e["dataset"], e["protocol"], e["metric"]) for e in entries)
        found += [(entry, key, like[key]) for entry, key in zip(entries, keys)]
    ways = defaultdict(set)
    for _, key, way in found:
        ways[key].add(way)
    return [
        {**entry, "protocol": f"{entry['protocol']} [{way or 'unsaid'}]"} if len(ways[key]) > 1 else entry
        for entry, key, way in found
    ]


def is_baseline(entry: dict) -> bool:
    """Whether this is something to compare with: a random network, a histogram, raw pixels."""
    return bool(REFERENCE.search(entry["backbone"]))


def _is_error(metric: str) -> bool:
    return metric.lower() in ERRORS


def _better(entry: dict) -> float:
    if not is_number(entry["value"]):
        return -float("inf")
    return -entry["value"] if _is_error(entry["metric"]) else entry["value"]


def _value(entry: dict) -> str:
    return number(entry["value"]) if _is_error(entry["metric"]) else share(entry["value"])


def _interval(entry: dict) -> str:
    low, high = entry.get("low"), entry.get("high")
    if not (is_number(low) and is_number(high)):
        return ""
    if _is_error(entry["metric"]):
        return f"{number(low)}{TO}{number(high)}"
    return f"{100 * low:.1f}{TO}{100 * high:.1f}"


def _protocol(name: str) -> str:
    plain, bracket, way = name.partition(" [")
    return PROTOCOLS.get(plain, plain.replace("_", " ")) + bracket + way


def _ours(group: list[dict]) -> dict | None:
    """The best of those that were trained."""
    return next((e for e in group if not is_baseline(e) and is_number(e["value"])), None)


def _against(group: list[dict]) -> list[dict]:
    return [e for e in group if is_baseline(e) and is_number(e["value"])]


def _words(groups: dict) -> Content:
    """k-NN on birds: 71.2 % (68.0-74.1), random network 35.0 %, colour histogram 14.1 %."""
    out = []
    for (dataset, protocol, metric), group in groups.items():
        best = _ours(group)
        if best is None:
            continue
        interval = f" ({_interval(best)})" if _interval(best) else ""
        others = "".join(f", {e['backbone']} {_value(e)}" for e in _against(group))
        named = METRICS.get(metric.lower(), metric.replace("_", " "))
        where = f" on {dataset}" if dataset else ""
        error = f", {named}" if metric != "accuracy" else ""
        out.append(
            h(
                "li",
                h("strong", f"{_protocol(protocol)} {_value(best)}"),
                f"{interval}{others}",
                h("span", f"{where}{error}", class_="quiet"),
            )
        )
    return h("ul", out, class_="prose") if out else None


def _table(groups: dict) -> Content:
    """Backbones in rows, protocols in columns, a table for each dataset."""
    out = []
    for dataset in dict.fromkeys(d for d, *_ in groups):
        mine = {key: group for key, group in groups.items() if key[0] == dataset}
        cell = {(e["backbone"], key): e for key, group in mine.items() for e in reversed(group)}
        names = dict.fromkeys(e["backbone"] for group in mine.values() for e in group)
        said = [METRICS.get(metric.lower(), metric.replace("_", " ")) for *_, metric in mine]
        head = ["backbone", *(f"{_protocol(key[1])}, {metric}" for key, metric in zip(mine, said))]
        rows = []
        for name in names:
            row: list[Content] = [h("strong", name) if not REFERENCE.search(name) else name]
            for key in mine:
                entry = cell.get((name, key))
                row.append(
                    entry
                    and [_value(entry), h("span", f" ({_interval(entry)})" if _interval(entry) else "", class_="quiet")]
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
        top = (
            1.0
            if not error
            else max(max(e["value"], e["high"] if is_number(e.get("high")) else 0) for e in known) or 1.0
        )
        rows = []
        for e in known:
            interval = (e["low"], e["high"]) if _interval(e) else None
            says = f"{_value(e)} ({_interval(e)})" if interval else _value(e)
            rows.append(charts.Bar(e["backbone"], says, (("ref" if is_baseline(e) else "c1", e["value"]),), interval))
        title = f"{_protocol(protocol)} on {dataset}" if dataset else _protocol(protocol)
        if several[dataset, protocol] > 1:
            title += f": {METRICS.get(metric, metric)}"
        title = title[:1].upper() + title[1:] if protocol != "knn" else title
        unit, scale = ("", 1.0) if error else (f"{SPACE}%", 100.0)
        said = "Lower is better." if error else None
        out.append(figure(charts.bars(rows, label=title, top=top, unit=unit, scale=scale), title, said))
    key = legend(("c1", "trained"), ("ref", "to compare with"), ("mark", f"95{SPACE}% interval"))
    return [key, h("div", out, class_="grid two")] if out else None


def _pictures(one: Artifact, of: int) -> Content:
    out = []
    known = [*PICTURES]
    for path in sorted(one.pictures(), key=lambda p: known.index(p.stem) if p.stem in known else len(known)):
        caption = PICTURES.get(path.stem, path.stem.replace("_", " ").capitalize() + ".")
        shown = picture(path, caption)
        where = f"{one.name}: " if of > 1 else ""
        out.append(h("figure", shown, h("figcaption", where, caption)) if shown else None)
    return out


def _settings(entries: list[dict]) -> Content:
    rows = []
    for e in entries:
        settings = e.get("settings")
        if isinstance(settings, dict):  # what fingerprints stand for says the same again
            settings = {name: value for name, value in settings.items() if name not in ("protocol", "versions")}
        told = ", ".join(f"{name} {value}" for name, value in flat(settings))
        if told:
            rows.append((e["backbone"], _protocol(e["protocol"]), e["dataset"], told))
    rows = list(dict.fromkeys(rows))  # several metrics of one protocol
    title = "Settings of the protocols"
    return folded(title, table(title, ("backbone", "protocol", "dataset", "settings"), rows, text=4)) if rows else None


def _cards(groups: dict) -> tuple[Card, ...]:
    """The first dataset's protocols, at most three."""
    out = []
    for (_, protocol, metric), group in groups.items():
        best, others = _ours(group), _against(group)
        random = next((e for e in others if "random" in e["backbone"].lower()), others[0] if others else None)
        if best is not None and len(out) < 3:
            against = f"{random['backbone']} {_value(random)}" if random else ""
            what = "" if protocol in PROTOCOLS else f" {METRICS.get(metric, metric)}"
            out.append(Card(f"{_protocol(protocol)}{what}, {best['backbone']}", _value(best), against, strong=True))
    return tuple(out)


def _clause(groups: dict) -> str:
    for (dataset, protocol, _), group in groups.items():
        best = _ours(group)
        if best is not None:
            where = f" on {dataset}" if dataset else ""
            return f"frozen features reach {_value(best)}{where} by {_protocol(protocol)}"
    return ""
