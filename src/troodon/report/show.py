"""A page about one picture of `show`: the picture and its numbers, in one file."""

from collections.abc import Sequence

from troodon.report.markup import Content, data_uri, h, join, number, table
from troodon.report.page import document


def show_page(title: str, picture: bytes, width: int, numbers: dict) -> str:
    """The page: a PNG shown `width` pixels wide, and the numbers that the picture was drawn with."""
    image = h(
        "img",
        src=data_uri(picture, "png"),
        alt=title,
        width=width,
        class_="picture",
        style="max-height: none; margin: 1rem 0 2rem",
    )
    single = {name: value for name, value in numbers.items() if not isinstance(value, list)}
    tables: list[Content] = [table("Settings", ("what", "value"), single.items(), text=2)] if single else []
    for name, value in numbers.items():
        if isinstance(value, list):
            heads, rows, words = _rows(value)
            tables.append(table(name.replace("_", " ").capitalize(), heads, rows, text=words))
    return document(title, h("main", h("h1", title), image, h("h2", "Numbers"), join(*tables), id="content"))


def _rows(values: Sequence) -> tuple[list[str], list[list[Content]], int]:
    """Heads and rows of a table of numbers or of dictionaries, and how many of its first columns are words.

    A list of dictionaries inside a dictionary gives a row each.
    """
    if not (values and isinstance(values[0], dict)):
        return ["place", "value"], [[str(i), _text(value)] for i, value in enumerate(values, 1)], 1
    inner = next((k for k, v in values[0].items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    if inner:
        values = [
            {k: v for k, v in value.items() if k != inner} | {f"{inner} {k}": v for k, v in one.items()}
            for value in values
            for one in value[inner]
        ]
    words = [name for name, value in values[0].items() if isinstance(value, str | None)]
    names = words + [name for name in values[0] if name not in words]
    return [n.replace("_", " ") for n in names], [[_text(v[n]) for n in names] for v in values], len(words)


def _text(value: object) -> Content:
    if isinstance(value, list):
        return ", ".join(number(v) for v in value)
    return number(value) if value is not None else ""
