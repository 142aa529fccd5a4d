"""Results of benchmarks as rows: appended without loss, and the tables of the documents are made from them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import measure, tables
from benchmarks.tables import Cell, Line, Table, TableError

HOME = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (HOME / "benchmarks").glob("*.py") if '"--quick"' in path.read_text())
TABLE = Table(
    "page.md", "abacus", ("", "ours", "rival", "ratio"),
    (Line("time", "time", notes={"rival": ", a guess"}), Line("memory of {images} images", "memory")),
    settings={"images": 8},
)  # fmt: skip
MARKED = "Before.\n\n<!-- table: speed -->\n\n<!-- end -->\n\nAfter.\n"


def made_row(name="time", ours=2.0, rival=3.0, unit="s", date="2026-01-01", machine="abacus", **settings) -> dict:
    return {
        "name": name, "ours": ours, "rival": rival, "ratio": rival / ours, "unit": unit,
        "settings": {"images": 8} | settings, "machine": machine, "versions": {}, "commit": "abc1234", "date": date,
    }  # fmt: skip


def table_lines(table: Table, rows: list[dict]) -> list[str]:
    return [line for line in tables.render(table, rows).splitlines() if line.startswith("|")]


def test_the_tables_are_those_of_the_rows():
    differing = tables.update_files(write=False)
    assert not differing, f"{', '.join(differing)} differ from benchmarks/results; `make tables` mends them"


def test_a_record_says_where_when_and_of_what(tmp_path):
    results = [measure.result("time", 2.0, 3.0, "s", images=8, rival="walk"), measure.result("growth", 0, 3.0, "MB")]
    path = measure.record(results, tmp_path / "new" / "rows.jsonl", packages=("pytest", "no-such-package"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(row) for row in rows] == 2 * [
        ["name", "ours", "rival", "ratio", "unit", "settings", "machine", "versions", "commit", "date"]
    ]
    assert rows[0]["ratio"] == 1.5
    assert rows[1]["ratio"] is None
    assert rows[0]["settings"]["images"] == 8
    assert rows[0]["settings"].keys() >= {"device", "threads", "torch"}
    versions = rows[0]["versions"]
    assert list(versions) == ["python", "torch", "numpy", "pillow", "simplejpeg", "pytest", "no-such-package"]
    assert versions["pytest"] == pytest.__version__
    assert versions["no-such-package"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", rows[0]["date"])
    assert rows[0]["machine"] == measure.machine_name()


def test_a_record_loses_no_old_row(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    first = measure.record([made_row(ours=1.0)], machine="abacus", commit="abc1234")
    assert first == tmp_path / "abacus.jsonl"
    before = first.read_text()
    measure.record([made_row(ours=2.0), made_row(ours=3.0)], machine="abacus")
    assert first.read_text().startswith(before)
    with open(first, "a") as stream:
        stream.write('{"name": "unfinished')
    measure.record([made_row(ours=4.0)], machine="abacus")
    lines = first.read_text().splitlines()
    assert lines[3] == '{"name": "unfinished'
    assert [json.loads(line)["ours"] for line in lines[:3] + lines[4:]] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(TableError, match=r"abacus.jsonl:4: not a row"):
        tables.load_rows(tmp_path)


def test_a_benchmark_records_only_when_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    parser = measure.argument_parser("A benchmark.", packages=("pytest",))
    results = [measure.result("time", 2.0, None, "s")]
    measure.finish(results, parser.parse_args([]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert not list(tmp_path.iterdir())
    measure.finish(results, parser.parse_args(["--record", "--machine", "abacus"]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    (row,) = tables.load_rows(tmp_path)
    assert row["machine"] == "abacus"
    assert row["commit"] == parser.get_default("commit")
    assert "pytest" in row["versions"]
    measure.finish(results, parser.parse_args(["--record", str(tmp_path / "other.jsonl")]))
    assert len(tables.load_rows(tmp_path)) == 2


def test_a_commit_is_marked_where_the_tree_differs(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(measure, "__file__", str(tmp_path / "benchmarks" / "measure.py"))
    assert measure.commit() is None
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/abacus.jsonl"):
        (tmp_path / name).touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert re.fullmatch(r"[0-9a-f]{7,}", measure.commit())
    (tmp_path / "benchmarks" / "results" / "abacus.jsonl").write_text("{}\n")
    assert re.fullmatch(r"[0-9a-f]{7,}", measure.commit())
    (tmp_path / "code.py").write_text("changed = True\n")
    assert re.fullmatch(r"[0-9a-f]{7,}\+", measure.commit())


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t: 17\nmodel name\t: AMD EPYC 9R14", "zen4"),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t: 1\n", "zen3"),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t: 2\n\nvendor_id\t: other\n", "zen5"),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t: 207\nmodel name\t: x", "emerald-rapids"),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t: 1\nmodel name\t: Intel(R) Core(TM) i7-2600 CPU @ 3.4GHz",
         "intel-core-i7-2600"),
    ],
)  # fmt: skip
def test_a_processor_has_a_short_name(cpuinfo, name):
    assert measure.processor_name(cpuinfo) == name


def test_a_processor_without_a_name_is_called_by_its_architecture(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert measure.processor_name("") == "arm64"
    assert measure.processor_name("processor\t: 0\nCPU architecture: 8\n") == "arm64"


def test_a_table_has_a_line_for_each_result():
    rows = [made_row(), made_row("memory", 1.5e9, 15.75e9, "bytes"), made_row("memory", 1, 1, machine="other")]
    assert table_lines(TABLE, rows) == [
        "|  | ours | rival | ratio |",
        "|---|---|---|---|",
        "| time | 2.00 s | 3.00 s, a guess | 1.50 |",
        "| memory of 8 images | 1.50 GB | 15.75 GB | 11 |",
    ]
    assert tables.render(TABLE, rows).splitlines()[-1] == "Recorded on `abacus`; 2026-01-01; commit abc1234."


def test_repetitions_are_a_mean_and_a_range():
    mean = Table("page.md", "abacus", ("", "k-NN"), (Line("pretrained", "knn"),), (Cell(),), digits=0)
    ranged = replace(mean, repeats="range")
    rows = [made_row("knn", value, unit="%", seed=seed) for seed, value in enumerate((27.3, 34.0, 28.5))]
    assert table_lines(mean, rows)[-1] == "| pretrained | 30 (27 to 34) % |"
    assert "seeds 0, 1, 2" in tables.render(mean, rows)
    assert table_lines(ranged, rows)[-1] == "| pretrained | 27 to 34 % |"
    assert table_lines(ranged, rows[2:])[-1] == "| pretrained | 29 % |"  # a half is rounded up


def test_the_newest_row_counts_and_only_its_repetitions_stand_beside_it():
    newer = made_row(ours=9.0, date="2026-02-01")
    (chosen,) = tables.select([made_row(), newer], "abacus", "time", {"images": 8})
    assert chosen is newer
    old = [made_row(seed=seed, threads=1) for seed in (0, 1)]
    new = [made_row(seed=seed, threads=2, date="2026-02-01") for seed in (0, 2)]
    assert tables.select(old + new, "abacus", "time", {"images": 8}) == new
    again = made_row(ours=9.0, seed=0, threads=2, date="2026-03-01")
    assert tables.select([*old, *new, again], "abacus", "time", {}) == [again, new[1]]


def test_quick_rows_count_only_where_a_table_asks_for_them(capsys):
    whole, quick = made_row(), made_row(ours=9.0, date="2026-02-01", quick=True)
    assert tables.select([whole, quick], "abacus", "time", {}) == [whole]
    assert tables.select([whole, quick], "abacus", "time", {"quick": True}) == [quick]
    parser = measure.argument_parser("A benchmark.")
    parser.add_argument("--quick", action="store_true")
    for words, expected in ((["--quick"], True), ([], None)):
        measure.finish([measure.result("time", 2.0, None, "s")], parser.parse_args(words))
        (row,) = json.loads(capsys.readouterr().out)
        assert row["settings"].get("quick") is expected


def test_a_table_without_its_rows_is_refused():
    with pytest.raises(TableError, match=r"no row memory on abacus"):
        tables.render(TABLE, [made_row()])
    with pytest.raises(TableError, match=r"no row time"):
        tables.render(TABLE, [made_row(images=4)])
    with pytest.raises(TableError, match=r"has no ratio"):
        tables.render(TABLE, [made_row() | {"ratio": None}])


def test_only_what_stands_between_the_marks_changes(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    rows = [made_row(), made_row("memory", 1.5e9, 15.75e9, "bytes")]
    measure.record(rows, tmp_path / "benchmarks" / "results" / "abacus.jsonl", machine="abacus", commit="abc1234")
    page, spec = tmp_path / "page.md", {"speed": TABLE}
    page.write_text(MARKED)
    assert tables.update_files(tmp_path, write=False, tables=spec) == ["page.md: speed"]
    assert page.read_text() == MARKED
    assert tables.update_files(tmp_path, write=True, tables=spec) == ["page.md: speed"]
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- table: speed -->\n\n|  | ours | rival | ratio |\n")
    assert text.endswith("\n\n<!-- end -->\n\nAfter.\n")
    assert tables.update_files(tmp_path, write=True, tables=spec) == []
    page.write_text(text.replace("2.00 s", "1.99 s"))
    assert tables.update_files(tmp_path, write=False, tables=spec) == ["page.md: speed"]


@pytest.mark.parametrize("text", ["no marks", MARKED.replace("speed", "other"), MARKED + MARKED])
def test_each_mark_has_a_table_and_each_table_a_mark(text):
    with pytest.raises(TableError, match=r"page.md: (speed|other).*one mark in the file"):
        tables.updated(text, "page.md", [], {"speed": TABLE})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_records(script, run_script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        run_script(script.name, "__main__")
    assert ended.value.code == 0
    assert "--record" in capsys.readouterr().out


def test_a_finished_demo_gives_rows_of_its_seed(tmp_path, run_script):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 7\nsteps: 800\n")
    measured = [  # backbone, dataset, protocol, metric, value
        ("run", "evaluation", "knn", "accuracy", 0.3),
        ("student", "evaluation", "knn", "accuracy", 0.25),
        ("random", "evaluation", "knn", "accuracy", 0.1),
        ("random, as student", "evaluation", "knn", "accuracy", 0.125),
        ("raw-pixels", "evaluation", "knn", "accuracy", 0.2),
        ("first", "planted", "duplicates", "recall", 0.78),
    ]
    keys = ("backbone", "dataset", "protocol", "metric", "value")
    scores = [dict(zip(keys, row)) | {"low": 0.05, "high": 0.9} for row in measured]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    rows = run_script("demo.py", "demo")["demo_results"](tmp_path)
    assert [(row["name"], row["settings"]["features"], row["ours"], row["rival"]) for row in rows] == [
        ("demo_knn", "pretrained", 30.0, 10.0),
        ("demo_knn", "student", 25.0, 12.5),
        ("demo_knn", "random network", 10.0, None),
        ("demo_knn", "random network, as student", 12.5, None),
        ("demo_knn", "raw pixels", 20.0, 10.0),
        ("demo_duplicates_recall", "first", 78.0, None),
    ]
    assert all(row["settings"]["seed"] == 7 and row["settings"]["steps"] == 800 for row in rows)
    assert rows[0]["ratio"] == 3.0
    assert (rows[0]["low"], rows[0]["high"]) == (5.0, 90.0)


def test_no_benchmark_is_missed():
    helpers = {
        "counting.py",
        "gpu_parts.py",
        "measure.py",
        "pack.py",
        "pipeline.py",
        "pools.py",
        "small_rivals.py",
        "tables.py",
    }
    others = {path.name for path in (HOME / "benchmarks").glob("*.py")} - {path.name for path in SCRIPTS}
    assert others == helpers | {"usual.py"}
