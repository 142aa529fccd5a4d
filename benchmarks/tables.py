"""The tables of measured results in README.md and docs/performance.md, made from the rows in benchmarks/results/.

    python benchmarks/tables.py [--check]        # or: make tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `TABLES` says for each NAME which rows, by name and
settings, make which lines and columns. Rows that differ only in `REPEATS` are repetitions of one measurement: a cell
shows their mean or their range. Of rows that differ in nothing the newest counts. Needs the standard library only.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Literal

HOME = Path(__file__).parent.parent
RESULTS = HOME / "benchmarks" / "results"
REPEATS = ("seed", "repeat")  # settings that tell repetitions of one measurement apart
UNITS = {"bytes": (1e-9, " GB"), "s": (1, " s"), "%": (1, " %")}  # scale and suffix; other units stand in the heading
MARK = re.compile(r"<!-- table: (?P<name>\S+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


class TableError(Exception):
    """A table that cannot be made; the message says which and why."""


@dataclass(frozen=True)
class Cell:
    """One column of numbers: a key of the rows, as `ours`, `ratio` or `settings.seconds.padded`."""

    key: str = "ours"
    name: str | None = None  # of the rows, in place of the line's
    settings: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None  # in place of the unit's
    suffix: str | None = None  # in place of the unit's
    digits: int | None = None  # decimals; by default by the size of the number


@dataclass(frozen=True)
class Line:
    """One line: a label, which may name settings as `{plan_gb:.2f}`, and the rows that its cells are taken from."""

    label: str
    name: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # words behind a number, by the key of its cell
    digits: int | None = None


@dataclass(frozen=True)
class Table:
    file: str
    machine: str
    columns: tuple[str, ...]  # the first is that of the labels
    lines: tuple[Line, ...]
    cells: tuple[Cell, ...] = (Cell("ours"), Cell("rival"), Cell("ratio"))
    settings: dict[str, Any] = field(default_factory=dict)  # of every line
    repeats: Literal["mean", "range"] = "mean"  # the mean is followed by the range
    digits: int | None = None


def prototype_lines(
    images: int, prototypes: int, *, label: str = "", fewer: int = 0, digits: int | None = None, quiet: str = ""
) -> tuple[Line, Line]:
    """Peak memory and time; `fewer` are the images of the plain form, from which its numbers are extrapolated."""
    settings = {"images": images, "prototypes": prototypes}
    memory, time = dict[str, str](), dict[str, str]()
    if fewer:
        memory = {"rival": f", by a line through {fewer} and {fewer // 2} images"}
        time = {"rival": f", {images} / {fewer} times {fewer} images"}
    label = f"{images} images, {prototypes:,} prototypes{label}: peak memory"
    return (
        Line(label, "prototype_peak_memory", settings, memory, digits),
        Line(f"the same: time{quiet}", "prototype_time", settings, time),
    )


FP32, BF16, QUIET = {"compute": "float32"}, {"compute": "bfloat16"}, ", a quiet machine"
STEP = {"recipe": "vitl16_short", "drop_path": 0.3, "compile": False, "against": "usual"}
PHOTOS = {"pack": "neardup_cc0_dev"}
TABLES = {
    "demo": Table(
        "README.md", "emerald-rapids-2-cores", ("frozen features", "k-NN", "linear"),
        (
            Line("pretrained for two minutes", settings={"features": "pretrained"}),
            Line("a student of a quarter of its parameters, distilled from it", settings={"features": "student"}),
            Line("random network", settings={"features": "random network"}),
            Line("colour histogram", settings={"features": "colour histogram"}),
            Line("raw pixels", settings={"features": "raw pixels"}),
        ),
        (Cell(name="demo_knn"), Cell(name="demo_linear")), repeats="range", digits=0,
    ),
    "prototypes": Table(
        "docs/performance.md", "zen4-2-cores", ("fp32, 2 threads", "streamed", "plain", "ratio"),
        (
            *prototype_lines(64, 131_072, fewer=12, quiet=QUIET),
            *prototype_lines(64, 65_536, fewer=12, quiet=QUIET),
            prototype_lines(12, 131_072)[0],
            *prototype_lines(8, 131_072, quiet=QUIET),
            *prototype_lines(4, 65_536, label=" (logits kept)", digits=3),
        ),
        settings={"dtype": "float32", "against": "plain"},
    ),
    "step": Table(
        "docs/performance.md", "zen4-2-cores", ("ViT-S/16, drop path 0.3", "ours", "usual", "ratio"),
        (
            Line("8 images, bf16: time of a step", "step_time", STEP | BF16),
            Line("8 images, fp32: time of a step", "step_time", STEP | FP32),
            Line("8 images, bf16: peak memory, weights and state ({state_bytes_gb:.2f} GB) included",
                 "step_peak_memory", STEP | BF16),
            Line("8 images, fp32: peak memory, the same", "step_peak_memory", STEP | FP32),
            Line("8 images, bf16, other recomputation: selective (plan {plan_gb:.2f} GB)",
                 "step_peak_memory_selective", BF16),
            Line("the same, full (plan {plan_gb:.2f} GB)", "step_peak_memory_full", BF16),
        ),
        settings={"size": "small", "images": 8},
    ),
    "step-changes": Table(
        "docs/performance.md", "zen4-2-cores", ("", "fp32", "bf16"),
        tuple(
            Line(label, "step_memory_above_state", {"form": form})
            for form, label in {
                "packed, logits kept": "packed, logits kept (fp32 by the plan)",
                "activations computed again":
                    "stochastic depth keeps nothing; activations computed again; one head called once",
                "directions computed again": "directions of prototypes computed again",
                "usual": "the usual way",
            }.items()
        ),
        (Cell(settings=FP32), Cell(settings=BF16)), settings={"images": 8},
    ),
    "attention": Table(
        "docs/performance.md", "zen4-2-cores",
        ("2 images, both passes, ms; 1 thread, busy", "ours", "padded to the longest", "fused kernel", "products",
         "jagged"),
        (Line("fp32", "attention_time", {"dtype": "float32"}), Line("bf16", "attention_time", {"dtype": "bfloat16"})),
        tuple(
            Cell(form, scale=1000, suffix="")
            for form in ("ours", "rival", *(f"settings.seconds.{f}" for f in ("fused kernel", "products", "jagged")))
        ),
        settings={"images": 2, "heads": 6, "quick": True}, repeats="range", digits=0,
    ),
    "copies": Table(
        "docs/copies.md", "emerald-rapids-2-cores", ("", "closer look", "pHash, 10 bits"),
        (
            Line("edited copies of photographs, 1,140 images: copies removed", "copies_removed", PHOTOS),
            Line("the same: images lost of which no copy stays", "distinct_removed", PHOTOS, digits=0),
            Line("the same: groups that keep the original, or its pixels", "original_kept", PHOTOS),
            Line("the same: processor seconds", "processor_seconds", PHOTOS),
            Line("a made world of charts, tables and things drawn alike: precision", "world_precision"),
            Line("the same: recall", "world_recall"),
            Line("pairs of CIFAR-10 that people judge the same, of 156: joined", "judged_joined", {"judgement": "1"}),
            Line("frames of videos joined to another frame, of 468", "scenes_joined", {"pack": "seg_camvid_dev"}),
            Line("views of objects joined to another view, of 1,640", "scenes_joined", {"pack": "retr_eth80_dev"}),
        ),
        (Cell("ours"), Cell("rival")),
    ),
    "embed": Table(
        "docs/performance.md", "zen4-2-cores",
        ("images a second, ViT-B/14, 4 at a time, 2 threads", "ours", "theirs", "ratio"),
        (
            Line("ours, which chose bf16, against theirs as it comes (fp32)", "embed_images_per_second",
                 {"dtype": "bf16"}),
            Line("both in fp32", "embed_images_per_second_fp32"),
            Line("both in bf16", "embed_images_per_second_bf16"),
        ),
        settings={"size": "base", "px": 224, "images": 4, "against": "transformers"},
    ),
}  # fmt: skip


def load_rows(folder: Path = RESULTS) -> list[dict]:
    """All rows of a folder's JSON lines, oldest first. A line that is no row is an error that names it."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
                row["name"], row["settings"], row["machine"], row["date"]
            except (ValueError, KeyError, TypeError) as error:
                raise TableError(f"{path}:{number}: not a row of results ({error})") from None
            rows.append(row)
    return sorted(rows, key=lambda row: row["date"])  # stable: rows of one date stay in the order of their file


def select(rows: Iterable[dict], machine: str, name: str | None, settings: dict[str, Any]) -> list[dict]:
    """The newest row with this name and these settings, and its repetitions: rows that differ only in REPEATS.

    Rows of `--quick` count only where the settings ask for them.
    """
    settings = {"quick": False} | settings
    matches = [
        row for row in rows
        if (row["machine"], row["name"]) == (machine, name)
        and all(({"quick": False} | row["settings"]).get(key) == value for key, value in settings.items())
    ]  # fmt: skip
    if not matches:
        raise TableError(f"no row {name} on {machine} with {settings}")

    def without_repeats(row: dict) -> dict:
        return {key: value for key, value in row["settings"].items() if key not in REPEATS}

    repeats = [row for row in matches if without_repeats(row) == without_repeats(matches[-1])]
    newest = {tuple(row["settings"].get(key) for key in REPEATS): row for row in repeats}
    return [newest[key] for key in sorted(newest, key=str)]


def number(value: float, is_ratio: bool, digits: int | None) -> str:
    """A number as a table shows it: a half is rounded up, three significant digits and at most two decimals."""
    if digits is None and is_ratio:
        digits = 2 if abs(value) < 3 else 1 if abs(value) < 10 else 0
    elif digits is None:
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    rounded = Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded:,}"


def cell_text(table: Table, line: Line, cell: Cell, rows: list[dict]) -> str:
    """The number of a cell; its mean and range, or its range, where there are repetitions."""
    values = []
    for row in rows:
        value: Any = row
        for part in cell.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise TableError(f"the row {row['name']} of {row['date']} has no {cell.key}")
        values.append(value)
    is_ratio = cell.key == "ratio"
    scale, suffix = (1, "") if is_ratio else UNITS.get(rows[0]["unit"], (1, ""))
    scale, suffix = (scale if cell.scale is None else cell.scale), (suffix if cell.suffix is None else cell.suffix)
    digits = next((d for d in (cell.digits, None if is_ratio else line.digits, table.digits) if d is not None), None)
    if digits is None and suffix == " GB":
        digits = 2
    values = [float(Decimal(repr(value)) * Decimal(repr(scale))) for value in values]
    low, high = (number(value, is_ratio, digits) for value in (min(values), max(values)))
    text = low if low == high else f"{low} to {high}"
    if table.repeats == "mean" and len(values) > 1:
        text = f"{number(sum(values) / len(values), is_ratio, digits)} ({text})"
    return text + suffix + line.notes.get(cell.key, "")


def render(table: Table, rows: list[dict]) -> str:
    """The table in Markdown, and a line that says where its rows come from."""
    lines, used = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"], []
    for line in table.lines:
        cells = []
        for cell in table.cells:
            settings = table.settings | line.settings | cell.settings
            chosen = select(rows, table.machine, cell.name or line.name, settings)
            cells.append(cell_text(table, line, cell, chosen))
            used += chosen
        values = {key: value for key, value in chosen[0]["settings"].items() if isinstance(value, int | float)}
        label = line.label.format(**values, **{f"{key}_gb": value / 1e9 for key, value in values.items()})
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(["", *lines, "", provenance(table, used), ""])


def provenance(table: Table, rows: list[dict]) -> str:
    """Machine, seeds, dates and commits of the rows, in one line."""
    dates = sorted({row["date"][:10] for row in rows})
    commits = sorted({row["commit"] or "unknown" for row in rows})
    seeds = sorted({row["settings"]["seed"] for row in rows if "seed" in row["settings"]})
    parts = [f"`{table.machine}`", *([f"seeds {', '.join(map(str, seeds))}"] if seeds else [])]
    parts += [" to ".join(dict.fromkeys((dates[0], dates[-1])))]
    parts += [f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"]
    return f"Recorded on {'; '.join(parts)}."


def updated(text: str, file: str, rows: list[dict], tables: dict[str, Table] | None = None) -> tuple[str, list[str]]:
    """The text of a file with its tables made again, and the names of those that differed."""
    tables = {name: table for name, table in (TABLES if tables is None else tables).items() if table.file == file}
    names, differing = [match["name"] for match in MARK.finditer(text)], []
    if unknown := sorted(set(names) ^ set(tables)) or sorted({n for n in names if names.count(n) > 1}):
        raise TableError(f"{file}: {', '.join(unknown)}: a table needs one mark in the file and one entry in TABLES")

    def replace(match: re.Match) -> str:
        name = match["name"]
        try:
            body = render(tables[name], rows)
        except TableError as error:
            raise TableError(f"{file}, table {name}: {error}") from None
        if body != match["body"].rstrip("\n") + "\n":
            differing.append(name)
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return MARK.sub(replace, text), differing


def update_files(home: Path = HOME, *, write: bool, tables: dict[str, Table] | None = None) -> list[str]:
    """Make the tables of all files again; `FILE: NAME` of each table that differed. Writes only with `write`."""
    tables = TABLES if tables is None else tables
    rows, differing = load_rows(home / "benchmarks" / "results"), []
    for file in dict.fromkeys(table.file for table in tables.values()):
        text = (home / file).read_text(encoding="utf-8")
        new, names = updated(text, file, rows, tables)
        differing += [f"{file}: {name}" for name in names]
        if write and new != text:
            (home / file).write_text(new, encoding="utf-8")
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table and its rows differ")
    arguments = parser.parse_args()
    try:
        differing = update_files(write=not arguments.check)
    except TableError as error:
        sys.exit(f"error: {error}")
    for each in differing:
        print(f"{each}: {'differs from its rows; `make tables` mends it' if arguments.check else 'made again'}")
    sys.exit(bool(differing) and arguments.check)


if __name__ == "__main__":
    main()
