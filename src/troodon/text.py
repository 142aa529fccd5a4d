"""Numbers as people read them: durations, sizes, counts, and large numbers with a metric prefix; names to print."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

# Characters that move a terminal's cursor, change its colours or turn the direction of text; a name may hold any.
_CONTROLS = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(line: str) -> str:
    """The line with control characters written out, as \\x1b."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


def duration(seconds: float, space: str = " ") -> str:
    """12 s, 3 min 20 s, 1 h 5 min, 2 d 3 h: at most the two largest units, with `space` between number and unit."""
    if seconds < 60:
        return f"{f'{seconds:.2g}' if seconds < 10 else round(seconds)}{space}s"
    rest, parts = round(seconds), []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count}{space}{unit}" for count, unit in parts[:2] if count)


def file_size(size: float, space: str = " ") -> str:
    """999 bytes, 1.2 MB: bytes in kB, MB, GB, TB of a thousand, with `space` between number and unit."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f}{space}{unit}" if unit == "bytes" or size >= 100 else f"{size:.1f}{space}{unit}"


def with_prefix(number: float) -> str:
    """1,234 -> '1.23k': three digits and a metric prefix, to be followed by a unit; "999 " where there is none."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or prefix == "P":
            break
        number /= 1000
    return f"{number:.3g}{' ' if not prefix else ''}{prefix}"


def html_table(title: str, rows: Iterable[Sequence[str]]) -> str:
    """A small table as HTML, for a notebook: its first column names what the others tell."""
    lines = ("".join(f'<td style="text-align: left">{html.escape(cell)}</td>' for cell in row) for row in rows)
    inside = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table><caption style="text-align: left"><b>{html.escape(title)}</b></caption>{inside}</table>'


def plural(count: int, one: str, many: str | None = None) -> str:
    """'1 image', '1,234 images'; `many` where the plural is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def set_aside(reasons: Mapping[str, int], images: int) -> str:
    """'3 of 40 images are set aside: 2 truncated, 1 empty', the most frequent reason first; an alarm above half."""
    count = sum(reasons.values())
    listed = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    verb = "is" if count == 1 else "are"
    return f"{'alarm: ' if 2 * count > images else ''}{count:,} of {images:,} images {verb} set aside: {listed}"
