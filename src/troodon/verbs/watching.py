"""The verb `watch`: a page about runs that go on, which refreshes itself. Nothing is asked of the training."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from troodon.config import UsageError
from troodon.run import MANIFEST, read_manifest, say
from troodon.serve import Answer, Request, Server, open_browser, way_there
from troodon.verbs.common import Data, Paths, as_list, require_some

if TYPE_CHECKING:
    from troodon.verbs.sight import Eye

PERIOD_S = 2.0  # between two looks at the checkpoints of the runs


class Watcher:
    """Answers the page's questions about some runs from their folders."""

    def __init__(self, runs: Sequence[Path], eye: "Eye | None"):
        from troodon.report.follow import Follower

        self.followers = [Follower(folder, name) for folder, name in zip(runs, _names(runs), strict=True)]
        self.eye, self.lock = eye, threading.Lock()

    def answer(self, request: Request) -> Answer:
        """The page, its news, or a picture."""
        from troodon.report.live import Sight, live_page, news

        if request.path.startswith("picture/"):
            picture = self.eye.pictures.get(request.path.removeprefix("picture/")) if self.eye else None
            return Answer(picture, "image/png") if picture else Answer("no such picture\n", "text/plain", 404)
        if request.path not in ("", "news"):
            return Answer("no such page\n", "text/plain; charset=utf-8", 404)
        with self.lock:
            for follower in self.followers:
                follower.look()
            now = time.time()
            runs = [follower.run for follower in self.followers if follower.run is not None]
            ages = [follower.age(now) for follower in self.followers]
        sight = self.eye.sight if self.eye else Sight([], [])
        if request.path == "news":
            return Answer(news(runs, ages, sight, request.query))
        page, policy = live_page(runs, ages, sight)
        return Answer(page, policy=policy)


def watch(runs: Data, *, port: int = 0, open: bool = True, pictures: bool = True) -> None:
    """Serve a page about runs, also of several over one another, until Ctrl-C; its address is printed first.

    It shows losses, health with its verdict, speed and k-NN as they are written, and, with `pictures`, what backbones
    see in some images of the run, computed in this process. It only reads. `port` 0 takes a free one; `open` shows the
    page in a browser, where there is one. UsageError for a folder that is no run.
    """
    with serving(runs, port, pictures) as server:
        print(server.address, flush=True)
        if hint := way_there(server.server_port):
            say(hint)
        if open and not open_browser(server.address):
            say("open this address in a browser; Ctrl-C ends the page, and no training")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@contextlib.contextmanager
def serving(runs: Data, port: int = 0, pictures: bool = True) -> Iterator[Server]:
    """The server of the page, which answers once its `serve_forever` runs; pictures are made beside it."""
    folders = [_run_folder(Path(path)) for path in as_list(runs)]
    if not 0 <= port < 2**16:
        raise UsageError(f"port {port}: is from 0 to 65535; 0 takes any that is free")
    eye = None
    if pictures:
        from troodon.verbs.sight import Eye

        eye = Eye(folders, _names(folders))
    ended = threading.Event()
    with Server(Watcher(folders, eye).answer, port) as server:
        thread = threading.Thread(target=_look, args=(eye, ended), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            ended.set()
            thread.join(PERIOD_S)


def _look(eye: "Eye | None", ended: threading.Event) -> None:
    """Look at the runs' checkpoints from time to time, after everybody else on this machine."""
    while eye is not None and not ended.is_set():
        eye.look(ended)
        ended.wait(PERIOD_S)


def _run_folder(path: Path) -> Path:
    """The folder of a run that goes on, or is about to. UsageError for anything else."""
    kind = (read_manifest(path) or {}).get("kind")
    if kind == "run" or (kind is None and (path / "metrics.jsonl").is_file()):
        return path
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give that of a run, the --out of pretrain or distill")
    inside = [
        p.parent for p in sorted(path.glob(f"*/{MANIFEST}")) if (read_manifest(p.parent) or {}).get("kind") == "run"
    ]
    listed = f"; runs in it: {' '.join(str(p) for p in inside)}" if inside else ""
    raise UsageError(f"{path}: is {f'no run but of kind {kind}' if kind else 'no run'}{listed}")


def _names(runs: Sequence[Path]) -> list[str]:
    """Their folders' names; with those above them where two have the same."""
    folders = [Path(os.path.abspath(run)) for run in runs]
    names = [folder.name for folder in folders]
    return [n if names.count(n) == 1 else "/".join(f.parts[-2:]) for n, f in zip(names, folders, strict=True)]


@dataclass(frozen=True)
class Watch:
    """A page about runs while they train: losses, health, speed, k-NN, and what backbones see. It only reads."""

    runs: Positional[Paths]
    """Folders of runs; several are drawn over one another."""
    port: int = 0
    """The port on this machine; 0 takes a free one."""
    open: bool = True
    """Show the page in a browser."""
    pictures: bool = True
    """Show what backbones see in some images of the run, computed here on one processor core."""

    def run(self) -> None:
        watch(require_some(self.runs, "runs to watch"), port=self.port, open=self.open, pictures=self.pictures)
