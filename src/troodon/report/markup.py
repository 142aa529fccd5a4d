"""HTML that its content cannot break; numbers and tables as HTML text.

Every string that is not `Markup` is escaped when it enters a page, so a file may be called <script>.
"""

import base64
import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import numpy as np

from troodon.text import duration as plain_duration
from troodon.text import file_size as plain_file_size

SPACE = "\N{NO-BREAK SPACE}"
MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
FORBIDDEN = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u202a-\\u202e\\u2066-\\u2069]")
VOID = {"img", "meta", "br", "link"}  # elements without an end tag


class Markup(str):
    """HTML that goes into the page unchanged; any other string is text."""

    __slots__ = ()


Content: TypeAlias = "str | int | float | Iterable[Content] | None"


@dataclass(frozen=True)
class Card:
    """A key number at the top of the page."""

    label: str
    value: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Part:
    """A further page, made when it is written."""

    title: str
    body: Callable[[], Markup]


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    anchor: str
    title: str
    body: Markup
    cards: tuple[Card, ...] = ()
    clause: str = ""  # its part of the sentence at the top of the page
    parts: tuple[Part, ...] = ()


def h(element: str, /, *content: Content, **attributes: object) -> Markup:
    """An element. `class_` and `for_` lose their underscore, other underscores become hyphens; None and False are
    skipped."""
    words = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(_attribute(value))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if element in VOID else f"{start}{join(*content)}</{element}>")


def join(*content: Content) -> Markup:
    """The contents, concatenated; None is nothing, a list stands for its elements."""
    out: list[str] = []
    for item in content:
        if isinstance(item, Markup):
            out.append(item)
        elif isinstance(item, str):
            out.append(html.escape(_printable(item), quote=False))
        elif isinstance(item, Iterable):
            out.append(join(*item))
        elif item is not None:
            out.append(html.escape(number(item)))
    return Markup("".join(out))


def table(caption: str, head: Sequence[Content], rows: Iterable[Sequence[Content]], *, text: int = 1) -> Markup:
    """A table with a caption; its first `text` columns are words, the others are numbers, aligned right."""
    kind = ["word" if i < text else "number" for i in range(len(head))]
    first = h("tr", (h("th", cell, scope="col", class_=k) for cell, k in zip(head, kind)))
    body = [
        h("tr", (h("th" if i == 0 else "td", cell, class_=kind[i], scope=None if i else "row") for i, cell in
                 enumerate(row)))
        for row in rows
    ]  # fmt: skip
    whole = h("table", h("caption", caption), h("thead", first), h("tbody", body))
    return h("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def figure(body: Markup, title: str, caption: Content = None) -> Markup:
    """A figure with a title above and a caption below."""
    return h("figure", h("p", title, class_="title"), body, h("figcaption", caption) if caption else None)


def details(title: str, *content: Content) -> Markup:
    """Content that is folded until its title is clicked."""
    return h("details", h("summary", title), *content)


def note(*content: Content) -> Markup:
    return h("p", *content, class_="note")


def legend(*entries: tuple[str, str]) -> Markup:
    """A legend of (class of the colour, meaning) pairs."""
    return h("p", (h("span", h("i", class_=f"swatch {colour}"), text) for colour, text in entries), class_="legend")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number; True and False are not."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return False
    return math.isfinite(value)


def number(value: object, digits: int = 3) -> str:
    """1,234 or 0.712 or 3.4e-4; a dash for a missing value or one that is not finite; strings are unchanged."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not is_number(value):
        return MISSING
    if isinstance(value, int | np.integer):
        return f"{value:,}".replace("-", MINUS)
    size = abs(float(value))
    if size == 0:
        text = "0"
    elif size >= 1000:
        text = f"{size:,.0f}" if size < 1e9 else _scientific(size)
    elif size >= 1e-2:
        whole = len(str(int(size))) if size >= 1 else 0
        text = f"{size:.{max(0, digits - whole)}f}"
    else:
        text = _scientific(size)
    return MINUS + text if value < 0 else text


def percent(value: object, decimals: int = 1) -> str:
    """0.7123 -> 71.2 %."""
    return f"{100 * float(value):.{decimals}f}{SPACE}%".replace("-", MINUS) if is_number(value) else MISSING


def duration(seconds: object) -> str:
    """12 s, 3 min 20 s, 1 h 5 min, 2 d 3 h."""
    return plain_duration(seconds, SPACE) if is_number(seconds) else MISSING


def file_size(size: object) -> str:
    """999 bytes, 1.2 MB."""
    return plain_file_size(size, SPACE) if is_number(size) else MISSING


def sentence(clauses: Sequence[str]) -> str:
    """The clauses as one sentence, joined by commas and a last "and"."""
    last = {1: "", 2: " and "}.get(len(clauses), ", and ") + clauses[-1]
    text = ", ".join(clauses[:-1]) + last
    return text[:1].upper() + text[1:] + "."


def flatten(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as (name, value) rows."""
    if not isinstance(value, dict):
        return []
    rows = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            rows += flatten(inner, f"{prefix}{key} / ")
        elif isinstance(inner, list):
            rows.append((f"{prefix}{key}", ", ".join(str(v) for v in inner)))
        elif inner is not None:
            rows.append((f"{prefix}{key}", number(inner)))
    return rows


def _scientific(size: float) -> str:
    mantissa, exponent = f"{size:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _attribute(value: object) -> str:
    """The value of an attribute; numbers are short, so that charts stay small."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _printable(str(value))


def _printable(text: str) -> str:
    """Text without what HTML forbids or what changes its direction: controls, undecodable bytes of file names."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
