"""The page that follows runs: it reads what is there, whatever state that is in, and shows at once what is wrong."""

import contextlib
import json
import re
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.test_report import make_run, metrics
from troodon import cli
from troodon.images.index import SCHEMA, Index
from troodon.report.follow import Follower
from troodon.report.live import Column, Sight, live_page, news, state_of
from troodon.report.runs import Run, ordered
from troodon.serve import Server
from troodon.verbs import watching

ALARM = {"event": "health", "at": 40, "alarm": "few prototypes", "message": "almost all images get the same few"}
NOTHING = Sight([], [])


@pytest.fixture
def going(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", [*metrics(400)], finished=False)
    return tmp_path / "run"


def run_of(folder: Path) -> Run:
    follower = Follower(folder, folder.name)
    follower.look()
    assert follower.run is not None
    return follower.run


def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    file, follower = tmp_path / "metrics.jsonl", Follower(tmp_path, "run")
    assert follower.look()
    assert follower.run is not None
    assert follower.run.records == []
    assert not follower.look(), "nothing is new"
    file.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    assert follower.look()
    assert [r["step"] for r in follower.run.records] == [1]
    with open(file, "a") as more:
        more.write('ss": 1.5}\nno json\n[1]\n{"step": 2, "loss": NaN}\n')
    assert follower.look()
    assert [r["step"] for r in follower.run.records] == [1, 2, 3]
    assert follower.run.not_finite == [3]
    assert not follower.look()


@pytest.mark.parametrize("replaced", [True, False], ids=["another file", "cut in place"])
def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path, replaced: bool) -> None:
    file, follower = tmp_path / "metrics.jsonl", Follower(tmp_path, "run")
    file.write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(9)))
    follower.look()
    anew = "".join(f'{{"step": {i}, "loss": 7.0}}\n' for i in range(12))  # longer than what was read
    if replaced:
        (tmp_path / "new").write_text(anew)
        (tmp_path / "new").replace(file)
    else:
        file.write_text(anew)
    assert follower.look()
    assert follower.run is not None
    assert [r["loss"] for r in follower.run.records] == [7.0] * 12
    file.unlink()
    assert follower.look()
    assert follower.run.records == []


def test_each_look_reads_only_what_is_new(going: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower, parsed, loads = Follower(going, "run"), [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    follower.look()
    assert len(parsed) == 40
    with open(going / "metrics.jsonl", "ab") as file:
        file.write(b'ss": 1}\n')  # ends the line that was cut short
    follower.look()
    assert len(parsed) == 41


def test_an_alarm_is_seen_in_the_title_the_colour_and_the_first_words(going: Path) -> None:
    calm = news([run_of(going)], [3.0], NOTHING, {})
    assert calm["state"] == "going"
    assert calm["title"] == "20% run"
    text = (going / "metrics.jsonl").read_text().rpartition("\n")[0]
    (going / "metrics.jsonl").write_text(f"{text}\n{json.dumps(ALARM)}\n")
    alarm = news([run_of(going)], [3.0], NOTHING, {})
    assert alarm["state"] == "bad"
    assert alarm["title"].startswith("⚠ few prototypes")
    assert alarm["icon"] != calm["icon"]
    assert "almost all images get the same few" in alarm["parts"]["now"]["html"]
    (going / "metrics.jsonl").write_text(f"{text}\n{json.dumps(ALARM)}\n{json.dumps(ALARM | {'over': True})}\n")
    assert news([run_of(going)], [3.0], NOTHING, {})["state"] == "going"


def test_only_parts_that_have_changed_are_sent(going: Path) -> None:
    first = news([run_of(going)], [3.0], NOTHING, {})
    have = {name: part["version"] for name, part in first["parts"].items()}
    assert set(have) == {"now", "curves", "sight", "more"}
    assert news([run_of(going)], [5.0], NOTHING, have)["parts"] == {}
    seen = Sight(
        [("picture/a", "cat")], [Column("step 10", ["picture/b"], [[("picture/c", "0.90 dog", False)]], 0.5, 0.1)]
    )
    again = news([run_of(going)], [5.0], seen, have)["parts"]
    assert set(again) == {"sight"}
    assert "by chance 10" in again["sight"]["html"]


def test_a_run_is_called_what_it_is(going: Path, tmp_path: Path) -> None:
    run = run_of(going)
    assert state_of(run, 3.0) == ("going", "training")
    assert state_of(run, 50.0) == ("going", "training"), "a checkpoint may take so long"
    assert state_of(run, 900.0)[0] == "waiting"
    assert "no news for 15" in state_of(run, 900.0)[1]
    assert state_of(Run(tmp_path, "new", "", [], []), None) == ("waiting", "nothing recorded yet")
    make_run(tmp_path / "done", [*metrics(2000)])
    assert state_of(run_of(tmp_path / "done"), 9e9) == ("done", "finished")
    assert run.seconds_left == pytest.approx(0.37 * (2000 - 391))


def test_a_run_of_so_many_minutes_is_followed_by_its_time(tmp_path: Path) -> None:
    records = [{"step": i, "loss": 1.0, "seconds": 30.0 * i, "share": i / 20} for i in range(10)]
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "backbone.json").write_text("{}")
    run = Run(tmp_path, "run", "steps: 2000\nminutes: 10.0\n", *ordered(records))
    assert (run.planned, run.finished, run.share, run.seconds_left) == (None, False, 0.45, 330.0)
    ended = Run(tmp_path, "run", run.config, *ordered([*records, {"event": "time", "at": 10, "message": "10 steps"}]))
    assert (ended.finished, ended.share, ended.seconds_left) == (True, 1.0, None)


def test_several_runs_lie_over_one_another(going: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "other", [*metrics(2000)])
    page, policy = live_page([run_of(going), run_of(tmp_path / "other")], [1.0, 1.0], NOTHING)
    loss = re.search(r'aria-label="Total loss, run[^"]*; Total loss, other[^"]*".*?</svg>', page)
    assert loss
    assert loss[0].count("<polyline") == 2
    assert "script-src 'sha256-" in policy
    assert not re.search(r"https?://(?!www\.w3\.org)", page), "it loads nothing from elsewhere"


@contextlib.contextmanager
def served(*runs: Path):
    with watching.serving(list(runs), pictures=False) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield lambda path: urllib.request.urlopen(server.address + path, timeout=5)
        finally:
            server.shutdown()
            thread.join()


def test_the_server_shows_what_is_written_meanwhile(going: Path) -> None:
    with served(going) as get:
        page = get("").read().decode()
        assert "391 of 2,000 steps" in page
        with open(going / "metrics.jsonl", "ab") as file:
            file.write(b'\n{"step": 499, "loss": 3.25}\n')
        told = json.loads(get("news").read())
        assert "500 of 2,000 steps" in told["parts"]["now"]["html"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("picture/none")
        (going / "metrics.jsonl").unlink()
        assert "nothing recorded yet" in json.loads(get("news").read())["title"]


def test_the_address_comes_first_and_ctrl_c_is_no_failure(
    going: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(server: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    before = sorted(going.rglob("*"))
    assert cli.run(["watch", str(going), "--port", "0", "--no-open", "--no-pictures"]) == 0
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{24}/", capsys.readouterr().out.splitlines()[0])
    assert sorted(going.rglob("*")) == before, "it only reads"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}"], "is no run; runs in it: {}/run"),
        (["{}/gone"], "no such folder; give that of a run"),
        ([], "no runs to watch"),
        (["{}/run", "--port", "70000"], "port 70000: is from 0 to 65535"),
    ],
)
def test_what_cannot_be_watched_is_said(
    going: Path, words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    at: Callable[[str], str] = lambda text: text.replace("{}", str(going.parent))  # noqa: E731
    assert cli.run(["watch", *map(at, words), "--no-open"]) == 2
    assert at(said) in capsys.readouterr().err


def make_backbone(folder: Path, seed: int) -> None:
    import torch

    from troodon.model.backbone import Backbone
    from troodon.model.config import Preprocessing, ViTConfig
    from troodon.model.saved import SavedViT

    network = Backbone.random(ViTConfig(dim=16, depth=1, heads=1, patch=8, grid=2), Preprocessing(16, 16), seed)
    SavedViT.from_state_dict(
        {name: torch.as_tensor(value) for name, value in network.vit.state_dict().items()},
        network.config, network.preprocessing, name=folder.parent.name,
    ).save(folder)  # fmt: skip


@pytest.fixture
def seen(going: Path) -> Path:
    """A run with images of two classes, and a backbone in each of two checkpoints."""
    draw, rows = np.random.default_rng(0), []
    for i in range(10):
        path = going.parent / f"{i}.png"
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        rows.append((path.name, str(path), 0, path.stat().st_size, ["cat", "dog"][i % 2], None))
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), SCHEMA)]
    Index(pa.table(columns, schema=SCHEMA)).save(going / "images.parquet")
    for step in (100, 200):
        make_backbone(going / "checkpoints" / f"{step:06d}" / "backbone", step)
    return going


def test_what_each_backbone_sees_is_shown(seen: Path) -> None:
    from troodon.verbs.sight import IMAGES, Eye

    eye = Eye([seen], ["run"])
    eye.quiet = True  # the priority of the tests stays
    eye.look(threading.Event())
    first, last = eye.sight.columns
    assert (first.name, last.name) == ("step 100", "step 200")
    assert len(eye.sight.images) == len(last.maps) == len(last.nearest) == IMAGES
    assert first.maps != last.maps
    assert last.chance == pytest.approx(4 / 9)
    addresses = {last.maps[0], last.nearest[0][0][0], eye.sight.images[0][0]}
    assert {name.removeprefix("picture/") for name in addresses} <= set(eye.pictures)
    held = dict(eye.pictures)
    eye.look(threading.Event())
    assert eye.pictures == held, "nothing is computed again"
    for old in (seen / "checkpoints" / "000100" / "backbone").iterdir():
        old.unlink()
    eye.look(threading.Event())
    assert [column.name for column in eye.sight.columns] == ["step 200"]


def test_a_run_whose_images_are_gone_is_watched_without_pictures(seen: Path) -> None:
    from troodon.verbs.sight import Eye

    for image in seen.parent.glob("*.png"):
        image.unlink()
    eye = Eye([seen], ["run"])
    eye.quiet = True
    eye.look(threading.Event())
    assert eye.sight.columns == []
    assert "none of its images can be read now" in eye.sight.note
