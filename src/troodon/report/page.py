"""The report: one HTML page about artifacts, which needs no network, no script and no other file.

Each section reads the artifacts of one kind and is independent of the others; sections without artifacts are skipped.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from troodon.report.artifacts import Artifact, find_artifacts
from troodon.report.images import images_section, world_section
from troodon.report.markup import Card, Content, Markup, Section, file_size, flatten, h, join, sentence, table
from troodon.report.scores import scores_section
from troodon.report.selection import selection_section
from troodon.report.training import training_section
from troodon.run import say, write_bytes
from troodon.text import plural

SECTIONS: list[tuple[str, Callable[[list[Artifact]], Section | None]]] = [
    ("world", world_section),
    ("index", images_section),
    ("selection", selection_section),
    ("run", training_section),
    ("scores", scores_section),
]
KIND_ORDER = ["world", "index", "embeddings", "selection", "run", "backbone", "scores"]  # as they are made
# Nothing may be fetched or run, whatever a file name contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LOGO = Markup(
    '<svg class="eye" viewBox="0 0 32 32" aria-hidden="true"><path d="M1 16C6 7 11 4 16 4s10 3 15 12c-5 9-10 12-15 12'
    'S6 25 1 16Z" class="white"/><circle cx="16" cy="16" r="9.5" class="iris"/>'
    '<ellipse cx="16" cy="16" rx="2.6" ry="8.5" class="slit"/><circle cx="19.6" cy="11.8" r="1.7" class="glint"/></svg>'
)


def report(paths: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page about the artifacts at `paths`, or up to two folders below them.

    `out` is the page, or a folder that gets a report.html. The same artifacts give the same bytes. UsageError when
    there is no artifact to report on.
    """
    artifacts = find_artifacts([Path(path) for path in paths])
    sections = []
    for kind, make_section in SECTIONS:
        section = make_section([artifact for artifact in artifacts if artifact.kind == kind])
        if section is not None:
            sections.append(section)
    page = _page(title or _title(paths), [*sections, _repeat_section(artifacts)])
    out = Path(out)
    target = out if out.suffix.lower() in (".html", ".htm") and not out.is_dir() else out / "report.html"
    write_bytes(target, page.encode())
    say(f"report: {plural(len(artifacts), 'artifact')}, {file_size(len(page))}, {target}")
    return target


def _title(paths: Sequence[Path]) -> str:
    return ", ".join(Path(path).resolve().name for path in paths)


def _page(title: str, sections: list[Section]) -> str:
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
        "header",
        h("p", LOGO, "Troodon report", class_="kicker"),
        h("h1", title),
        h("p", _lead(sections), class_="lead"),
    )
    cards = [card for section in sections for card in section.cards]
    body = h(
        "body",
        h("a", "Skip to the content", href="#content", class_="skip"),
        top,
        _cards(cards) if cards else None,
        h("nav", (h("a", s.title, href=f"#{s.anchor}") for s in sections), aria_label="Sections"),
        h("main", (h("section", h("h2", s.title), s.body, id=s.anchor) for s in sections), id="content"),
        h("footer", h("p", "Written by Troodon. This page is one file: it runs no script and loads nothing.")),
    )
    return f"<!doctype html>\n{h('html', head, body, lang='en')}\n"


def _lead(sections: list[Section]) -> str:
    """The sentence at the top of the page."""
    clauses = [section.clause for section in sections if section.clause]
    return sentence(clauses) if clauses else "A record of what was made, and how to make it again."


def _cards(cards: list[Card]) -> Markup:
    shown = []
    for card in cards:
        comment = h("dd", card.note) if card.note else None
        kind = "card strong" if card.strong else "card"
        shown.append(h("div", h("dt", card.label), h("dd", card.value, class_="value"), comment, class_=kind))
    return h("dl", shown, class_="cards")


def _repeat_section(artifacts: list[Artifact]) -> Section:
    """The recorded commands, the fingerprints of all artifacts, and the versions of packages."""
    order = {kind: i for i, kind in enumerate(KIND_ORDER)}
    in_order = sorted(artifacts, key=lambda artifact: order.get(artifact.kind, len(order)))
    commands = list(dict.fromkeys(shlex.join(artifact.command) for artifact in in_order if artifact.command))
    body: list[Content] = []
    if commands:
        body += [
            h("p", "The commands, in the order of the work:", class_="prose"),
            h("pre", "\n".join(commands)),
        ]
    rows = [(artifact.name, artifact.kind, h("code", artifact.fingerprint or "not finished")) for artifact in artifacts]
    body.append(
        table("The pieces, and the fingerprints of what made them", ("folder", "kind", "fingerprint"), rows, text=3)
    )
    versions: dict[str, dict] = {}
    for artifact in artifacts:
        environment = artifact.json("environment.json")
        if isinstance(environment, dict):
            versions.setdefault(str(flatten(environment)), environment)
    body += [table("Versions and machine", ("what", "value"), flatten(env), text=2) for env in versions.values()]
    return Section("repeat", "How to repeat it", join(body))
