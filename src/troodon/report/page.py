"""One page that tells what happened: it needs no network, no script and no other file.

Every section reads the artifacts of one kind and knows nothing of the others; what is not there is left out.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from troodon.report.artifacts import Artifact, find
from troodon.report.images import images, world
from troodon.report.markup import Card, Content, Markup, Part, file_size, flat, h, join, sentence, table
from troodon.report.scores import scores
from troodon.report.selection import selection
from troodon.report.training import training
from troodon.run import say, write_bytes
from troodon.text import plural

SECTIONS: list[tuple[str, Callable[[list[Artifact]], Part | None]]] = [
    ("world", world),
    ("index", images),
    ("selection", selection),
    ("run", training),
    ("scores", scores),
]
ORDER = ["world", "index", "embeddings", "selection", "run", "backbone", "scores"]  # of the work
# Nothing may be fetched or run, whatever a file name tries.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
EYE = Markup(
    '<svg class="eye" viewBox="0 0 32 32" aria-hidden="true"><path d="M1 16C6 7 11 4 16 4s10 3 15 12c-5 9-10 12-15 12'
    'S6 25 1 16Z" class="white"/><circle cx="16" cy="16" r="9.5" class="iris"/>'
    '<ellipse cx="16" cy="16" rx="2.6" ry="8.5" class="slit"/><circle cx="19.6" cy="11.8" r="1.7" class="glint"/></svg>'
)


def report(paths: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page about the artifacts at `paths`, or up to two folders below them.

    `out` is the page, or a folder that gets a report.html. The same artifacts give the same bytes. UsageError when
    there is no artifact to report on.
    """
    artifacts = find([Path(path) for path in paths])
    parts = []
    for kind, section in SECTIONS:
        part = section([one for one in artifacts if one.kind == kind])
        if part is not None:
            parts.append(part)
    page = _page(title or _title(paths), [*parts, _repeat(artifacts)])
    out = Path(out)
    target = out if out.suffix.lower() in (".html", ".htm") and not out.is_dir() else out / "report.html"
    write_bytes(target, page.encode())
    say(f"report: {plural(len(artifacts), 'artifact')}, {file_size(len(page))}, {target}")
    return target


def _title(paths: Sequence[Path]) -> str:
    return ", ".join(Path(path).resolve().name for path in paths)


def _page(title: str, parts: list[Part]) -> str:
    style = (Path(__file__).with_name("page.css")).read_text()
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=POLICY),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("link", rel="icon", href="data:,"),
        h("title", f"{title}: a Troodon report"),
        h("style", Markup(style)),
    )
    top = h(
        "header", h("p", EYE, "Troodon report", class_="kicker"), h("h1", title), h("p", _lead(parts), class_="lead")
    )
    cards = [card for part in parts for card in part.cards]
    body = h(
        "body",
        h("a", "Skip to the content", href="#content", class_="skip"),
        top,
        _cards(cards) if cards else None,
        h("nav", (h("a", part.title, href=f"#{part.anchor}") for part in parts), aria_label="Sections"),
        h("main", (h("section", h("h2", p.title), p.body, id=p.anchor) for p in parts), id="content"),
        h("footer", h("p", "Written by Troodon. This page is one file: it runs no script and loads nothing.")),
    )
    return f"<!doctype html>\n{h('html', head, body, lang='en')}\n"


def _lead(parts: list[Part]) -> str:
    clauses = [part.clause for part in parts if part.clause]
    return sentence(clauses) if clauses else "A record of what was made, and how to make it again."


def _cards(cards: list[Card]) -> Markup:
    shown = []
    for card in cards:
        told = h("dd", card.note) if card.note else None
        kind = "card strong" if card.strong else "card"
        shown.append(h("div", h("dt", card.label), h("dd", card.value, class_="value"), told, class_=kind))
    return h("dl", shown, class_="cards")


def _repeat(artifacts: list[Artifact]) -> Part:
    """The commands that were recorded, what every artifact is called by, and the versions behind them."""
    in_order = sorted(artifacts, key=lambda one: ORDER.index(one.kind) if one.kind in ORDER else len(ORDER))
    commands = list(dict.fromkeys(shlex.join(one.command) for one in in_order if one.command))
    body: list[Content] = []
    if commands:
        body += [
            h("p", "The commands, in the order of the work:", class_="prose"),
            h("pre", "\n".join(commands)),
        ]
    rows = [(one.name, one.kind, h("code", one.fingerprint or "not finished")) for one in artifacts]
    body.append(
        table("The pieces, and the fingerprints of what made them", ("folder", "kind", "fingerprint"), rows, text=3)
    )
    versions: dict[str, dict] = {}
    for one in artifacts:
        environment = one.json("environment.json")
        if isinstance(environment, dict):
            versions.setdefault(str(flat(environment)), environment)
    body += [table("Versions and machine", ("what", "value"), flat(env), text=2) for env in versions.values()]
    return Part("repeat", "How to repeat it", join(body))
