"""The report: one page, complete, closed, and calm whatever the artifacts hold."""

import contextlib
import html
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from troodon import run, verbs
from troodon.config import UsageError
from troodon.images.index import SCHEMA
from troodon.report import charts, markup
from troodon.report.markup import MINUS, MISSING, SPACE
from troodon.report.page import report
from troodon.run import write_json
from troodon.text import plural


@contextlib.contextmanager
def publish(folder: Path, kind: str, fingerprint: str, settings: dict, command: str = "") -> Iterator[Path]:
    """An artifact that a command made."""
    run.current_command[:] = shlex.split(command)
    with run.publish(folder, kind, fingerprint, settings) as part:
        yield part
    run.current_command.clear()


HOSTILE = "<script>alert(1)</script>\"'&.jpg"
TITLES = ["Images", "What was kept, and why", "Training", "What the features are worth", "How to repeat it"]


class Page(HTMLParser):
    """A page, taken apart; `wrong` tells where its elements are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.elements, self.words = [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += [f"<{name}> never ends" for name in self.open]

    def handle_starttag(self, name: str, attrs: list) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in ("img", "meta", "br", "link"):
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: list) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        if not self.open or self.open.pop() != name:
            self.wrong.append(f"</{name}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """What is read, with plain spaces and hyphens."""
        plain = str.maketrans({SPACE: " ", MINUS: "-", MISSING: "-"})
        return " ".join("".join(self.words).translate(plain).split())

    def of(self, name: str) -> list[dict]:
        return [attrs for found, attrs in self.elements if found == name]


def read(page: Path) -> Page:
    parsed = Page(page.read_text())
    assert parsed.wrong == []
    assert "could not be read" not in parsed.text
    return parsed


# The artifacts of a small pass through the whole system, as the verbs write them.


def paint(kind: int, draw: np.random.Generator, px: int = 72) -> np.ndarray:
    """Discs, stripes or checks of a random colour, uint8 (px, px + 24, 3)."""
    y, x = np.mgrid[:px, : px + 24] / px - 0.5
    x, turn = x - 0.17, draw.uniform(0, math.pi)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    size = draw.uniform(0.15, 0.35)
    shape = [
        u**2 + 2 * v**2 < size**2,
        np.sin(u * 14 / size) > 0,
        (np.sin(9 * u / size) > 0) ^ (np.sin(9 * v / size) > 0),
    ]
    fore, back = draw.uniform(40, 255, 3), draw.uniform(0, 200, 3) * (1 + 0.4 * y[:, :, None])
    return np.clip(np.where(shape[kind][:, :, None], fore, back) + draw.normal(0, 9, (*y.shape, 3)), 0, 255).astype(
        np.uint8
    )


def make_images(folder: Path, count: int = 60) -> dict[str, list]:
    """Image files, every sixth a near-copy of the one before; the last two are broken and gone."""
    draw, columns = np.random.default_rng(0), {name: [] for name in SCHEMA.names}
    folder.mkdir(parents=True)
    for i in range(count):
        kind, name = i % 3, f"photo-{i:03d}.jpg"
        if i % 6 != 5:
            pixels = paint(kind, draw)
        else:
            pixels = np.clip(pixels[2:-2, 3:].astype(int) + 14, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=88)
        if i == count - 2:
            (folder / name).write_bytes((folder / name).read_bytes()[:200])
        values = (
            HOSTILE if i == 0 else name,
            str(folder / name),
            0,
            (folder / name).stat().st_size,
            ["discs", "stripes", "checks"][kind],
            "train",
        )
        for key, value in zip(SCHEMA.names, values):
            columns[key].append(value)
        if i == count - 1:
            (folder / name).unlink()
    return columns


def make_index(folder: Path, columns: dict[str, list]) -> None:
    count = len(columns["path"])
    status = ["ok"] * (count - 2) + ["truncated", "missing"]
    more = {
        "status": status,
        "reason": [None] * (count - 2) + ["image file is truncated", "no such file"],
        "format": [("PNG" if i % 5 == 0 else "JPEG") if s == "ok" else None for i, s in enumerate(status)],
        "mode": ["RGB"] * count,
        "width": [96 + 16 * (i % 7) if s == "ok" else None for i, s in enumerate(status)],
        "height": [72 + 16 * (i % 5) if s == "ok" else None for i, s in enumerate(status)],
        "sha256": [f"{max(i, 4) % 50:064x}" for i in range(count)],
    }
    with publish(folder, "index", "0123456789ab", {}, "troodon scan photos/ --out index") as part:
        pq.write_table(pa.table(columns | more), part / "images.parquet")
        write_json(part / "summary.json", {"images": count})


def make_selection(folder: Path, columns: dict[str, list]) -> None:
    count = len(columns["path"])
    kept, stage, reason, cause, score = [], [], [], [], []
    for i in range(count):
        if i < 12:
            row = (True, "curated", "curated", -1, math.nan)
        elif i >= count - 2:
            row = (False, "decode", "truncated", -1, math.nan)
        elif i % 6 == 5:
            row = (False, "duplicate", f"near-duplicate, cosine 0.{80 + i % 19}", i - 1, 0.8 + i % 19 / 100)
        elif i % 4 == 1:
            row = (False, "retrieve", "not among the 4 nearest of any curated image", -1, math.nan)
        else:
            row = (True, "retrieve", f"nearest 2 of curated image {i % 12}", i % 12, 0.7)
        for values, value in zip((kept, stage, reason, cause, score), row):
            values.append(value)
    ledger = columns | {
        "pool": ["curated" if i < 12 else "uncurated" for i in range(count)],
        "kept": kept,
        "weight": pa.array([float(k) for k in kept], pa.float32()),
        "stage": stage,
        "reason": reason,
        "cause": cause,
        "score": pa.array(score, pa.float32()),
    }
    copies = [i for i in range(12, count - 2) if stage[i] == "duplicate"]
    groups = [(g, row, row != i, 1.0 if row != i else score[i]) for g, i in enumerate(copies) for row in (i - 1, i)]
    hits = [(q, rank, 12 + (7 * q + 5 * rank) % 40, 0.8 - rank / 20) for q in range(12) for rank in range(4)]
    dropped = [sum(s == name and not k for s, k in zip(stage, kept)) for name in ("decode", "duplicate", "retrieve")]
    explanations = ["cannot be decoded", "looks like another image", "nothing curated is like it"]
    left, stages = count, []
    for name, lost, what in zip(("decode", "duplicate", "retrieve"), dropped, explanations):
        stages.append({"name": name, "in": left, "out": left - lost, "dropped": lost, "what": what})
        left -= lost
    calibration = {
        "threshold": 0.62,
        "false_merges": 0.0004,
        "recall": {
            "jpeg_quality_30": 0.998,
            "crop_80": 0.964,
            "crop_50": 0.71,
            "mirror": 0.993,
            "blur": 0.985,
            "text": 0.942,
        },
    }
    summary = {"stages": stages, "threshold": 0.62, "calibration": calibration}
    command = "troodon curate --curated 'my photos' --uncurated index --out selection"
    with publish(folder, "selection", "ba9876543210", {}, command) as part:
        pq.write_table(pa.table(ledger), part / "images.parquet")
        names = ("group", "row", "kept", "score"), ("query", "rank", "row", "score")
        for name, rows, keys in zip(("groups", "hits"), (groups, hits), names):
            pq.write_table(pa.table(dict(zip(keys, map(list, zip(*rows))))), part / f"{name}.parquet")
        write_json(part / "summary.json", summary)


def metrics(steps: int, every: int = 10) -> Iterator[dict]:
    draw = np.random.default_rng(1)
    for step in range(0, steps, every):
        t = step / 2000
        terms = {
            "dino_global": 0.12 * (8.3 - 4.6 * (1 - math.exp(-4 * t))) + draw.normal(0, 0.02),
            "dino_local": 0.88 * (8.3 - 4.1 * (1 - math.exp(-3 * t))) + draw.normal(0, 0.08),
            "ibot": 8.3 - 5 * (1 - math.exp(-2.5 * t)) + draw.normal(0, 0.12),
            "koleo": 0.1 * (2.2 - 1.1 * min(1, 3 * t)) + draw.normal(0, 0.01),
        }
        record = {
            "step": step,
            "loss": sum(terms.values()),
            **terms,
            "grad_norm": abs(1.4 + draw.normal(0, 0.3)) * (9 if step == 700 else 1),
            "lr": 5e-4 * min(1, step / 200) * (0.5 + 0.5 * math.cos(math.pi * min(1, t))),
            "momentum": 1 - 0.008 * (0.5 + 0.5 * math.cos(math.pi * min(1, t))),
            "teacher_temperature": min(0.07, 0.04 + 0.03 * step / 600),
            "weight_decay": 0.04 + 0.16 * (0.5 - 0.5 * math.cos(math.pi * min(1, t))),
            "images_per_second": 412 + draw.normal(0, 12),
            "data_wait": abs(draw.normal(0.04, 0.02)),
            "seconds": 0.37 * step,
        }
        if step % 250 == 0:
            record["knn"] = 0.35 + 0.36 * (1 - math.exp(-3 * t))
        yield record


def make_run(folder: Path, records: list, *, finished: bool = True) -> None:
    environment = {
        "troodon": "0.1.0",
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64",
        "processors": 2,
        "packages": {"torch": "2.13.0", "numpy": "2.4.6", "pillow": "13.0.0", "simplejpeg": None},
    }
    with publish(folder, "run", "00ff00ff00ff", {}, "troodon pretrain small --data selection --out run") as part:
        (part / "config.yaml").write_text("vit:\n  dim: 192\n  depth: 12\nsteps: 2000\nbatch: 64\nseed: 0\n")
        (part / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 99999, "lo')
        write_json(part / "environment.json", environment)
        quarantined = [{"path": HOSTILE, "reason": "image file is truncated", "status": "truncated"}]
        (part / "quarantine.jsonl").write_text("".join(json.dumps(q) + "\n" for q in quarantined))
        (part / "pictures").mkdir()
        draw = np.random.default_rng(2)
        crops = [np.vstack([paint(k, draw)[:72, :72] for _ in range(2)]) for k in (0, 1, 2) * 4]
        Image.fromarray(np.hstack(crops)).save(part / "pictures" / "crops.png")
        if finished:
            write_json(part / "backbone" / "backbone.json", {})


SCORES = [
    ("pretrained", "knn", 0.712, 0.680, 0.741),
    ("random network", "knn", 0.350, 0.318, 0.383),
    ("colour histogram", "knn", 0.141, 0.119, 0.166),
    ("pretrained", "linear", 0.764, 0.735, 0.790),
    ("random network", "linear", 0.412, 0.379, 0.445),
]


def make_scores(folder: Path, entries: list[dict] | None = None, px: int = 27) -> None:
    if entries is None:
        entries = [
            {"protocol": protocol, "dataset": "shapes", "metric": "accuracy", "value": value, "low": low, "high": high,
             "settings": {"k": 10} if protocol == "knn" else {"steps": 500}, "backbone": name}
            for name, protocol, value, low, high in SCORES
        ]  # fmt: skip
    with publish(folder, "scores", "aaaabbbbcccc", {}, "troodon evaluate quick --backbone run") as part:
        write_json(part / "scores.json", entries)
        (part / "pictures").mkdir()
        draw = np.random.default_rng(3)
        for name, columns in (("pca", 8), ("neighbours", 6)):
            rows = [np.hstack([paint((r + c) % 3, draw)[:72, :72] for c in range(columns)]) for r in range(3)]
            Image.fromarray(np.vstack(rows)).resize((columns * px, 3 * px)).save(part / "pictures" / f"{name}.png")


def make_all(folder: Path, px: int = 27) -> Path:
    columns = make_images(folder / "photos")
    make_index(folder / "index", columns)
    make_selection(folder / "selection", columns)
    make_run(
        folder / "run",
        [*metrics(2000), {"event": "not saved", "at": 400, "message": "a checkpoint could not be written"}],
    )
    make_scores(folder / "scores", px=px)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def whole(demo: Path) -> Page:
    return read(report([demo], demo.parent / "report.html"))


def test_broken_copies_are_counted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    image = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3))
    for name, level in (("a", 0), ("copy-of-a", 0), ("in-other-bytes", 9)):
        image.save(tmp_path / "photos" / f"{name}.png", compress_level=level)
    for name in ("broken", "as-broken", "so-broken"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(b"<html>")
    verbs.scan(tmp_path / "photos", tmp_path / "index")
    page = read(report([tmp_path / "index"], tmp_path / "report.html"))
    assert "3 files are byte for byte a copy of another, in 2 groups." in page.text
    assert "1 more has the pixels of another in other bytes." in page.text


def test_a_full_set_has_every_section(whole: Page) -> None:
    for title in TITLES:
        assert whole.text.count(title) >= 2, title  # once in the contents, once over the section
    targets = {attrs["href"][1:] for attrs in whole.of("a")}
    assert targets <= {attrs.get("id") for _, attrs in whole.elements}, "a link that leads nowhere"
    for text in [
        "60 images were found, curation kept 43 of 60, a network learned without labels for 2,000 steps, and",
        "frozen features reach 71.2 % on shapes by k-NN.",
        "k-NN 71.2 % (68.0-74.1), random network 35.0 %, colour histogram 14.1 %",
        "2 files cannot be read (1 truncated, 1 missing)",
        "image file is truncated",
        "10 files are byte for byte a copy of another, in 6 groups",
        "looks like another image",
        "51 (-7)",
        "Calibration: recall",
        "99.8 %",
        "7 groups in all",
        "12 curated images in all",
        "8 images not near enough to any curated one",
        "near-duplicate, cosine …",
        "Finished: 2,000 of 2,000 steps in 12 min 16 s",
        "Total loss",
        "1 file could not be used and was set aside (1 truncated)",
        "a checkpoint could not be written",
        "dim: 192",
        "troodon curate --curated 'my photos' --uncurated index --out selection",
        "00ff00ff00ff",
        "2.13.0",
    ]:
        assert text in whole.text, text
    assert "99999" not in whole.text, "a line cut short was read"
    assert re.search(r"curateddiscs.*0\.\d\d(discs|stripes|checks)", whole.text), "retrieved images have their class"


def test_the_page_is_accessible(whole: Page) -> None:
    assert whole.of("html")[0]["lang"] == "en"
    images = whole.of("img")
    assert len(images) > 60
    assert all(image.get("alt") for image in images)
    assert len(whole.of("table")) == len(whole.of("caption")) > 5
    drawings = [
        attrs for attrs in whole.of("svg") if "chart" in attrs.get("class", "") or "bars" in attrs.get("class", "")
    ]
    assert len(drawings) > 15
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    levels = [int(name[1]) for name, _ in whole.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(b - a for a, b in itertools.pairwise(levels)) <= 1, "a level of headings is left out"


def test_the_page_loads_nothing(demo: Path, whole: Page) -> None:
    page = (demo.parent / "report.html").read_text()
    assert len(page) < 3_000_000
    text = re.sub(r"base64,[\w+/=]+", "", page)
    assert "http" not in re.sub("http-equiv", "", text)
    assert not re.search(r"url\(|@import|<script|javascript:|\bon\w+=", text)
    for name, attrs in whole.elements:
        assert attrs.get("src", "data:").startswith("data:"), name
        assert attrs.get("href", "#")[0] == "#" or attrs["href"] == "data:,", name
    assert "default-src 'none'" in whole.of("meta")[1]["content"]


def test_hostile_names_are_text(demo: Path, whole: Page) -> None:
    assert not whole.of("script")
    assert HOSTILE in " ".join(whole.words), "the quarantined file is named"
    assert HOSTILE in {image["alt"] for image in whole.of("img")}
    odd = markup.h("p", "a\x00b\u202ec\udcff", title='"><b onclick="x')
    assert odd == '<p title="&quot;&gt;&lt;b onclick=&quot;x">a\ufffdb\ufffdc\ufffd</p>'


def test_the_same_artifacts_give_the_same_page(demo: Path, whole: Page, tmp_path: Path) -> None:
    again = report([demo], tmp_path)
    assert again == tmp_path / "report.html"
    assert again.read_bytes() == (demo.parent / "report.html").read_bytes()
    assert "<h1>A &amp; B</h1>" in report([demo], tmp_path / "deep" / "b.html", title="A & B").read_text()


@pytest.mark.parametrize(
    ("name", "title"),
    list(zip(("index", "selection", "run", "scores"), TITLES)),
    ids=("index", "selection", "run", "scores"),
)
def test_sections_appear_only_for_what_is_there(demo: Path, tmp_path: Path, name: str, title: str) -> None:
    page = read(report([demo / name], tmp_path / "page.html"))
    headings = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "page.html").read_text())
    assert headings == [title, "How to repeat it"]
    assert f"{name}/" not in page.text


def test_images_that_are_gone_give_grey_boxes(tmp_path: Path) -> None:
    columns = make_images(tmp_path / "photos", 24)
    make_index(tmp_path / "index", columns)
    make_selection(tmp_path / "selection", columns)
    for file in (tmp_path / "photos").iterdir():
        if file.name != "photo-003.jpg":
            file.unlink()
    (tmp_path / "photos" / "photo-004.jpg").write_bytes(b"no image")
    page = read(report([tmp_path], tmp_path))
    boxes = {attrs["aria-label"] for attrs in page.of("span") if attrs.get("class") == "missing"}
    assert "photo-001.jpg: the file is gone or was cut short" in boxes
    assert any(box.startswith("photo-004.jpg: no known format") for box in boxes)
    assert {image["alt"] for image in page.of("img")} == {"photo-003.jpg"}


def test_metrics_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    records = list(metrics(600))
    records[5]["loss"] = math.nan
    records[6]["loss"] = math.inf
    records[7]["loss"] = None
    records[8]["loss"] = "high"
    del records[9]["dino_local"]
    for record in records:
        del record["data_wait"]
        record["made_up"] = record["step"] ** 2
    make_run(tmp_path / "run", records)
    page = read(report([tmp_path], tmp_path))
    assert "The loss was not finite in 4 records, first at step 51." in page.text
    assert "Waiting for data" not in page.text
    assert "Made up" in page.text
    assert all(re.fullmatch(r"[-\d., ]+", attrs["points"]) for attrs in page.of("polyline"))


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([], "Nothing recorded yet; 2,000 steps to go."),
        ([{"event": "started"}], "Nothing recorded yet; 2,000 steps to go."),
        ([{"step": 0, "loss": 11.5, "lr": 0.0, "seconds": 1.25}], "1 of 2,000 steps in 1.2 s, no backbone yet."),
        (list(metrics(800)), "791 of 2,000 steps in 4 min 52 s, no backbone yet."),
    ],
    ids=["empty", "only an event", "one step", "half way"],
)
def test_a_run_in_progress_has_no_manifest(tmp_path: Path, records: list, text: str) -> None:
    make_run(tmp_path / "run", records, finished=False)
    (tmp_path / "run" / "manifest.json").unlink()
    page = read(report([tmp_path], tmp_path))
    assert text in page.text
    assert "not finished" in page.text
    assert bool(page.of("polyline")) == bool(records and "step" in records[0])


def test_alarms_of_a_run_come_first(tmp_path: Path) -> None:
    readings = {"target_entropy": 0.97, "feature_cosine": 0.4, "effective_rank": 20.0, "grad_norm_dino_head": 1.0}
    records = [{"step": -1, "knn": 0.25, "seconds": 0.0}, *(r | readings for r in metrics(600))]
    make_run(tmp_path / "well", records)
    page = read(report([tmp_path / "well"], tmp_path / "1"))
    assert "60 readings of its health: no alarm." in page.text
    assert all(title in page.text for title in ("Is it healthy?", "Effective rank", "Gradient norm, DINO head"))
    assert "Also recorded" not in page.text
    assert page.of("p").count({"class": "alarm"}) == 0

    def event(name: str, at: int, message: str, **more: object) -> dict:
        return {"event": "health", "alarm": name, "at": at, "message": message, **more}

    over = [event("steep", 100, "gradients are long"), event("steep", 200, "steep: no longer", over=True)]
    make_run(tmp_path / "ill", [*records, *over, event("flat", 300, f"the loss of {HOSTILE} is ln K")])
    page = read(report([tmp_path / "ill"], tmp_path / "2"))
    assert f"flat, since step 300: the loss of {HOSTILE} is ln K" in page.text
    assert page.of("p").count({"class": "alarm"}) == 1
    assert "for 591 steps (not healthy: flat)" in page.text or "for 2,000 steps (not healthy: flat)" in page.text
    assert "gradients are long" in page.text  # in the table of events


def test_scores_without_pictures_values_or_intervals(tmp_path: Path) -> None:
    entry = {"protocol": "depth", "dataset": "rooms", "metric": "rmse", "settings": {}}
    worse, better = (
        entry | {"backbone": "a", "value": 0.9},
        entry | {"backbone": "b", "value": 0.4, "low": 0.3, "high": 0.5},
    )
    broken = entry | {"backbone": "c", "value": math.nan, "low": math.nan, "high": None}
    make_scores(tmp_path / "scores", [worse, broken, better])
    for file in (tmp_path / "scores" / "pictures").iterdir():
        file.write_bytes(b"not a picture")
    page = read(report([tmp_path], tmp_path))
    assert "depth 0.400 (0.300-0.500) on rooms, RMSE" in page.text, "of errors, the least is the best"
    rows = re.findall(r'<th class="word" scope="row">(?:<strong>)?(\w)<', (tmp_path / "report.html").read_text())
    assert rows == ["b", "a", "c"]
    assert not page.of("img")
    assert "40.0 %" not in page.text

    make_scores(tmp_path / "scores", [])
    assert "The scores are empty." in read(report([tmp_path], tmp_path)).text


def test_charts_of_one_protocol_name_their_metrics(tmp_path: Path) -> None:
    both = [
        {"backbone": "run", "dataset": "planted", "protocol": "duplicates", "metric": metric, "value": 0.8}
        for metric in ("precision", "recall")
    ]
    make_scores(tmp_path / "scores", both)
    page = read(report([tmp_path], tmp_path / "report.html"))
    assert "Duplicates on planted: precision" in page.text
    assert "Duplicates on planted: recall" in page.text


def test_a_funnel_is_counted_from_the_ledger_where_it_was_not_recorded(demo: Path, tmp_path: Path) -> None:
    selection = tmp_path / "selection"
    with publish(selection, "selection", "0", {}) as part:
        (part / "images.parquet").write_bytes((demo / "selection" / "images.parquet").read_bytes())
    page = read(report([selection], tmp_path))
    for text in ("58 (-2)", "51 (-7)", "43 (-8)"):
        assert text in page.text


def test_artifacts_are_found_two_folders_deep(demo: Path, tmp_path: Path) -> None:
    for place in ("a/b/scores", "a/b/c/scores", "a/scores.partial", ".hidden/scores"):
        make_scores(tmp_path / place)
    with pytest.raises(
        UsageError, match=r"no artifact here or up to 2 folders below; looked for a manifest\.json of kind"
    ):
        report([tmp_path], tmp_path)
    text = read(report([tmp_path / "a"], tmp_path)).text
    assert "a/b/scores" in text
    assert "b/c" not in text
    assert "partial" not in text
    with pytest.raises(UsageError, match="no such folder"):
        report([tmp_path / "nowhere"], tmp_path)
    with pytest.raises(UsageError, match="no folder to report on"):
        report([], tmp_path)


def test_two_runs_are_distinguished(tmp_path: Path) -> None:
    make_run(tmp_path / "one", list(metrics(2000)))
    make_run(tmp_path / "two", list(metrics(100)), finished=False)
    page = read(report([tmp_path / "one", tmp_path / "two", tmp_path / "one"], tmp_path))
    assert re.findall(r"<h3>(.*?)</h3>", (tmp_path / "report.html").read_text()) == ["one", "two"]
    assert "2 networks learned without labels for 2,000 steps." in page.text


def test_no_torch_is_needed() -> None:
    code = "import sys, troodon.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (markup.number(1234567), "1,234,567"),
        (markup.number(0.712), "0.712"),
        (markup.number(3.4e-4), "3.4e-4"),
        (markup.number(-12.345), f"{MINUS}12.3"),
        (markup.number(1.5e12), "1.5e12"),
        (markup.number(math.nan), MISSING),
        (markup.number(None), MISSING),
        (markup.number(True), "yes"),
        (markup.percent(0.7123), f"71.2{SPACE}%"),
        (markup.percent(None), MISSING),
        (markup.duration(59.9), f"60{SPACE}s"),
        (markup.duration(3600), f"1{SPACE}h"),
        (markup.duration(90061), f"1{SPACE}d 1{SPACE}h"),
        (markup.file_size(999), f"999{SPACE}bytes"),
        (markup.file_size(1234567), f"1.2{SPACE}MB"),
        (plural(1, "image"), "1 image"),
        (markup.sentence(["a", "b", "c"]), "A, b, and c."),
    ],
)
def test_numbers_for_people(text: str, value: str) -> None:
    assert text == value


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-6, 5e-4), (0, 625_000), (8.31, 8.32)])
def test_ticks_are_few_round_numbers_inside_the_range(low: float, high: float) -> None:
    at = charts.ticks(low, high, 4)
    assert 2 <= len(at) <= 6
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in at)
    assert len(set(charts.tick_text(at))) == len(at)
    step = at[1] - at[0]
    assert step / 10 ** math.floor(math.log10(step) + 1e-6) == pytest.approx(1, rel=1e-3) or round(
        step / 10 ** math.floor(math.log10(step) + 1e-6)
    ) in (2, 5)


def test_long_curves_stay_small_and_keep_their_spikes() -> None:
    x_N = np.arange(100_000)
    y_N = np.sin(x_N / 9000)
    y_N[54_321] = -4.0
    drawn = charts.line_chart(x_N, y_N, label="long")
    assert len(drawn) < 30_000
    lowest = max(float(y) for y in re.findall(r",([\d.]+)", re.search(r'points="([^"]+)"', drawn)[1]))
    assert lowest > charts.HEIGHT - charts.BOTTOM - 12, "the dip reaches the foot of the chart"


@pytest.mark.parametrize("y", [[3.0], [2.0] * 5, [0.0] * 30, [-1e-12, 1e12]])
def test_curves_of_few_or_equal_values(y: list[float]) -> None:
    parsed = Page(charts.line_chart(np.arange(len(y)) * 10, np.array(y), label="odd", floor=0.0))
    assert parsed.wrong == []
    assert all(re.fullmatch(r"[\d., ]+", attrs["points"]) for attrs in parsed.of("polyline"))


def test_the_running_mean_has_no_lag_and_no_bias() -> None:
    line = np.linspace(5, -3, 200)
    assert np.allclose(charts.smooth_mean(line, 4)[60:-60], line[60:-60], atol=1e-4)
    assert np.allclose(charts.smooth_mean(np.full(50, 2.5), 4), 2.5)
    noise = np.random.default_rng(0).normal(size=2000)
    assert charts.smooth_mean(noise, 8).std() < 0.4


def test_a_made_world_has_a_section(tmp_path: Path) -> None:
    with publish(tmp_path / "world", "world", "0", {"species": 24, "seed": 0}, "troodon demo") as part:
        (part / "pictures").mkdir()
        Image.fromarray(paint(0, np.random.default_rng(0))).save(part / "pictures" / "first_look.png")
    page = read(report([tmp_path], tmp_path))
    assert (
        '<th class="word" scope="row">species</th><td class="number">24</td>' in (tmp_path / "report.html").read_text()
    )
    assert page.of("img")[0]["alt"] == "first look"
    assert "A record of what was made, and how to make it again." in page.text


def first_words(folder: Path, out: Path) -> str:
    """What the first screen says, from the title to the cards."""
    text = report([folder], out).read_text()
    words = re.sub(r"<[^>]+>", " ", text[text.index("<header>") : text.index("</header>")])
    plain = html.unescape(words).translate(str.maketrans({SPACE: " ", MISSING: "-"}))
    return " ".join(plain.split())


def score(backbone: str, value: float, low: float, high: float) -> dict:
    return {"protocol": "knn", "dataset": "shapes", "metric": "accuracy", "value": value, "low": low, "high": high,
            "settings": {}, "backbone": backbone}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "verdict", "command"),
    [
        (
            (0.70, 0.65, 0.75),
            "It worked: k-NN on shapes is 70.0 %, against 35.0 % of the best baseline, random",
            "--to torch",  # which takes any network, one with a convolutional stem too
        ),
        ((0.36, 0.31, 0.41), "Whether it worked is not sure: k-NN on shapes is 36.0 %", "--init"),
        ((0.20, 0.15, 0.25), "It did not work yet: k-NN on shapes is 20.0 %, not better than the 35.0 %", "--init"),
    ],
)
def test_the_first_screen_judges_by_baselines(
    tmp_path: Path, ours: tuple[float, float, float], verdict: str, command: str
) -> None:
    make_run(tmp_path / "a" / "run", [*metrics(2000)])
    entries = [score("run", *ours), score("random", 0.35, 0.30, 0.40), score("raw pixels", 0.22, 0.18, 0.26)]
    make_scores(tmp_path / "a" / "scores", entries)
    words = first_words(tmp_path / "a", tmp_path / "page.html")
    assert verdict in words
    assert command in words


def test_the_first_screen_says_what_comes_next(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.html"
    assert f"troodon pretrain small --data {demo / 'index'} --out" in first_words(demo / "index", page)
    make_run(tmp_path / "run", [*metrics(2000)])
    words = first_words(tmp_path / "run", page)
    assert "What its features are worth is not measured yet. Its quick k-NN is 68.4 %." in words
    assert "troodon evaluate mine --backbone run --data LABELLED --out run-scores" in words
    make_run(tmp_path / "onward", [{"step": -1, "knn": 0.3, "seconds": 0.0}, *metrics(2000)])
    assert "its quick k-NN 68.4 %, 30.0 % before the first step." in first_words(tmp_path / "onward", page)
    make_run(tmp_path / "going", [*metrics(300)], finished=False)
    assert "troodon pretrain small --data selection --out run" in first_words(tmp_path / "going", page)


def test_the_first_screen_shows_an_alarm(tmp_path: Path) -> None:
    alarm = {"event": "health", "at": 90, "alarm": "flat", "message": "targets are nearly uniform"}
    make_run(tmp_path / "run", [*metrics(2000), alarm])
    make_scores(tmp_path / "scores")
    words = first_words(tmp_path, tmp_path / "page.html")
    assert "The training is not healthy: flat" in words
    assert "It worked" not in words
