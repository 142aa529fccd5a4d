"""The report: one HTML page about artifacts, which needs no network, no script and no other file. Groups of copies that
do not fit on it follow on further pages beside it.

Each section reads the artifacts of one kind and is independent of the others; sections without artifacts are skipped.
"""

import glob
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from troodon.report.artifacts import Artifact, find_artifacts
from troodon.report.first import first_screen
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
KICKER = "Troodon report"
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
    out, title = Path(out), title or _title(paths)
    target = out if out.suffix.lower() in (".html", ".htm") and not out.is_dir() else out / "report.html"
    parts = _write_parts(target, title, sections)
    sections = [replace(section, body=join(section.body, _links(parts[section.anchor]))) for section in sections]
    page = _page(title, [*sections, _repeat_section(artifacts)], artifacts)
    write_bytes(target, page.encode())
    count = sum(map(len, parts.values()))
    beside = f", and {plural(count, 'further page')} beside it" if count else ""
    say(f"report: {plural(len(artifacts), 'artifact')}, {file_size(len(page))}, {target}{beside}")
    return target


def _write_parts(target: Path, title: str, sections: list[Section]) -> dict[str, list[tuple[str, str]]]:
    """Write the further pages of all sections beside the page, and remove those of an earlier page of its name.

    Returns by section the names and titles of its pages.
    """
    names, number_of_page = {section.anchor: list[tuple[str, str]]() for section in sections}, 0
    for section in sections:
        for part in section.parts:
            number_of_page += 1
            names[section.anchor].append((f"{target.stem}_groups_{number_of_page:03d}.html", part.title))
    for section in sections:
        listed = names[section.anchor]
        for place, (part, (name, _)) in enumerate(zip(section.parts, listed)):
            links = [(target.name, "the report")]
            links += [(listed[place - 1][0], "previous")] if place else []
            links += [(listed[place + 1][0], "next")] if place + 1 < len(listed) else []
            way = h("nav", (h("a", words, href=quote(file)) for file, words in links), aria_label="Pages")
            main = h("main", h("h1", part.title), way, part.body(), way, id="content")
            write_bytes(target.with_name(name), document(f"{part.title}: {title}", main).encode())
    written = {name for listed in names.values() for name, _ in listed}
    for path in target.parent.glob(f"{glob.escape(target.stem)}_groups_[0-9][0-9][0-9].html"):
        if path.name not in written and KICKER in path.read_text(errors="replace"):
            path.unlink()
    return names


def _links(pages: list[tuple[str, str]]) -> Content:
    if not pages:
        return None
    listed = (h("li", h("a", title, href=quote(name))) for name, title in pages)
    return join(h("p", "Further pages", class_="sub"), h("ul", listed, class_="prose"))


def _title(paths: Sequence[Path]) -> str:
    return ", ".join(Path(path).resolve().name for path in paths)


def document(
    title: str, *body: Content, policy: str | None = POLICY, icon: str = "data:,", state: str | None = None
) -> str:
    """A page of this title, which loads nothing. Without a `policy` the one it is served with holds alone."""
    style = (Path(__file__).with_name("page.css")).read_text()
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy) if policy else None,
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("link", rel="icon", href=icon),
        h("title", title if state else f"{title}: a Troodon report"),
        h("style", Markup(style)),
    )
    skip = h("a", "Skip to the content", href="#content", class_="skip")
    return f"<!doctype html>\n{h('html', head, h('body', skip, body, data_state=state), lang='en')}\n"


def _page(title: str, sections: list[Section], artifacts: list[Artifact]) -> str:
    top = h(
        "header",
        h("p", LOGO, KICKER, class_="kicker"),
        h("h1", title),
        h("p", _lead(sections), class_="lead"),
        first_screen(artifacts),
    )
    cards = [card for section in sections for card in section.cards]
    alone = not any(section.parts for section in sections)
    which = (
        "This page is one file: it runs no script and loads nothing."
        if alone
        else ("This page and those it links to run no script and load nothing.")
    )
    return document(
        title,
        top,
        cards_list(cards) if cards else None,
        h("nav", (h("a", s.title, href=f"#{s.anchor}") for s in sections), aria_label="Sections"),
        h("main", (h("section", h("h2", s.title), s.body, id=s.anchor) for s in sections), id="content"),
        h("footer", h("p", f"Written by Troodon. {which}")),
    )


def _lead(sections: list[Section]) -> str:
    """The sentence at the top of the page."""
    clauses = [section.clause for section in sections if section.clause]
    return sentence(clauses) if clauses else "A record of what was made, and how to make it again."


def cards_list(cards: list[Card]) -> Markup:
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
