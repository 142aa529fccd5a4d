"""What happens between steps: records, readings, checkpoints, and the line that people watch.

Numbers leave the device on a thread of their own, which also writes them: the step that made them has gone on by then.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from troodon import dist
from troodon.config import pair, to_dict
from troodon.learn import checkpoint, health
from troodon.learn.checkpoint import Progress, Saver
from troodon.learn.config import PretrainConfig
from troodon.learn.loggers import Loggers, open_loggers
from troodon.learn.method import Method
from troodon.learn.plan import duration
from troodon.model.backbone import Backbone, of_state
from troodon.model.config import Preprocessing
from troodon.run import Metrics, say, write_bytes
from troodon.views.batch import Batch
from troodon.views.loader import Loader

Probe = Callable[[Backbone], float]
WAITING = 0.2  # share of the time that a device waits for images, from which it is said what to do, after
WAITED = 3  # records in a row
TERMS = ("dino_global", "dino_local", "ibot", "koleo", "contrast", "gram", "cls", "patches")


class Recorder:
    """Sees every step of a run, and writes what it says of itself; `resume` comes before the first step."""

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        run: Path,
        saver: Saver,
        probe: Probe | None,
        label: str = "",
    ):
        self.config, self.method, self.optimizer, self.loader, self.run = config, method, optimizer, loader, run
        self.saver, self.probe, self.label = saver, probe, label
        self.metrics, self.thread = Metrics(run / "metrics.jsonl"), ThreadPoolExecutor(1, "metrics")
        self.writing: Future | None = None
        self.alarms: dict[str, str] = {}
        self.advised = False
        self.loggers = Loggers({})

    def resume(self, progress: Progress) -> None:
        """Go on from there: later records are forgotten, for they will be written again."""
        self.flush()
        self.progress = progress
        if dist.rank() == 0:
            self.metrics.rewind(progress.step)
        self.records = [r for r in self.metrics.read() if "step" in r]
        self.seconds_before = self.records[-1]["seconds"] if self.records else 0.0
        self.loggers.close()
        if dist.rank() == 0:
            self.loggers = open_loggers(self.config.log_to, self.run, to_dict(self.config), first_step=progress.step)
        self.start = self.last = time.perf_counter()
        self.first_step, self.waited, self.since = progress.step, 0.0, []

    def before(self) -> None:
        """The k-NN of the weights that a run begins with, as of step -1: by its end they should be better."""
        if self.probe is not None and self.config.probe_every and not self.records:
            record = {"step": -1, "knn": self.knn(), "seconds": 0.0}
            self.records.append(record)
            if dist.rank() == 0:
                self.metrics.append(record)
                say(f"  {self.label}k-NN {record['knn']:.1%} before the first step")

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, while noting how long each was waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    def after_step(self, step: int, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Record, read the run's health, probe and save, each when it is time."""
        config, done = self.config, step + 1
        self.progress = Progress(done, self.progress.batch + 1, self.progress.rescues)
        self.names = list(terms)
        self.since.append(torch.stack([*terms.values()]))

        def due(every: int) -> bool:
            return every > 0 and (done % every == 0 or done == config.steps)

        probe = due(config.probe_every) and self.probe is not None
        if due(config.health_every) or due(config.log_every) or probe:
            readings = {}
            if due(config.health_every):
                readings = health.read(self.method, batch, config.schedules.at(step, config.steps))
            self.record(readings, {"knn": self.knn()} if probe else {})
        if due(config.checkpoint_every):
            self.save()

    def record(self, readings: dict[str, Tensor], known: dict[str, float]) -> None:
        """Write the means over the steps since the last record and over ranks, with what else is known."""
        mean = dist.total(torch.stack(self.since).mean(0)) / dist.world()
        now = time.perf_counter()
        step, steps, seconds = self.progress.step - 1, len(self.since), now - self.last
        knobs = self.config.schedules.at(step, self.config.steps)
        known = {
            "lr": knobs.lr,
            "weight_decay": knobs.weight_decay,
            "momentum": knobs.momentum,
            "teacher_temperature": knobs.teacher_temperature,
            "images_per_second": steps * self.config.batch / seconds,
            "data_wait": min(1.0, self.waited / seconds),
            "seconds": self.seconds_before + now - self.start,
            **known,
        }
        self.last, self.waited, self.since = now, 0.0, []
        self.flush()
        if dist.rank() == 0:
            self.writing = self.thread.submit(self._write, step, self.names, mean, readings, known)

    def _write(self, step: int, names: list[str], mean: Tensor, readings: dict[str, Tensor], known: dict) -> None:
        terms = dict(zip(names, mean.tolist(), strict=True))
        loss = sum(value for name, value in terms.items() if not name.startswith("grad_norm"))
        read = dict(zip(readings, torch.stack([*readings.values()]).tolist(), strict=True)) if readings else {}
        record = {"step": step, "loss": loss, **terms, **read, **known}
        self.records.append(record)
        self.metrics.append(record)
        self.loggers.write(record)
        self._show(record)
        late = [r for r in self.records[-WAITED:] if r.get("data_wait", 0) > WAITING]
        if len(late) == WAITED and not self.advised:
            self.advised = True
            helps = "; ".join(self.loader.advice())
            say(f"  {known['data_wait']:.0%} of the time goes into waiting for images. What helps: {helps}")
        if read or "knn" in known:
            alarms = health.verdict(self.records, self.config)
            for name in alarms.keys() - self.alarms.keys():
                self.event("health", step + 1, alarms[name], alarm=name)
            for name in self.alarms.keys() - alarms.keys():
                self.event("health", step + 1, f"{name}: no longer", alarm=name, over=True)
            self.alarms = alarms

    def event(self, name: str, step: int, message: str, **more: object) -> None:
        """Something that is not a number, after so many steps: to people, and to metrics.jsonl, which keeps it
        whatever is rewound."""
        say(f"  {self.label}step {step:,}: {message}")
        self.metrics.append({"event": name, "at": step, "message": message, **more})

    def flush(self) -> None:
        """Wait until what was recorded is written; raises what the writing raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def save(self) -> None:
        """Begin to write a checkpoint. One that could not be written costs nothing but itself: the run goes on."""
        if self.loader.broken and dist.rank() == 0:
            rows = sorted(self.loader.broken.items())
            lines = [json.dumps({"path": self.loader.index.path(row), "reason": reason}) for row, reason in rows]
            with contextlib.suppress(OSError):  # of a full disk; all of it is written again with the next checkpoint
                write_bytes(self.run / "quarantine.jsonl", "".join(f"{line}\n" for line in lines).encode())
        self._tell(self.saver.save(self.progress, self.method, self.optimizer))

    def settle(self) -> str | None:
        """Wait until all that was begun is written; why the last checkpoint is not, on every rank."""
        self.flush()
        failed = self.saver.wait()
        self._tell(failed)
        return failed

    def finish(self) -> None:
        """Record and save what is not yet, and wait for it. OSError, on every rank, when it cannot be saved."""
        if self.since:
            self.record({}, {})
        failed = self.settle()
        if failed or self.saver.step != self.progress.step:
            self.save()
            failed = self.settle()
        self.loggers.close()
        if failed:
            raise OSError(f"the last checkpoint could not be written: {failed}")

    def _tell(self, failed: str | None) -> None:
        if failed and dist.rank() == 0:
            kept = checkpoint.finished(self.run)
            last = f"the last is of step {int(kept[-1].name):,}" if kept else "there is none yet"
            self.event("not saved", self.progress.step, f"a checkpoint could not be written ({failed}); {last}")

    def knn(self) -> float:
        """How good the average is; on rank zero, which holds its weights for that and writes the records."""
        weights = checkpoint.whole(self.method.average.backbone)
        if dist.rank():
            return float("nan")
        return self.probe(of_state(weights, self.config.vit, preprocessing(self.config), name="average"))

    def _show(self, record: dict) -> None:
        done, steps = record["step"] + 1, self.config.steps
        rate = (time.perf_counter() - self.start) / (done - self.first_step)
        terms = ", ".join(f"{n} {record[n]:.3f}" for n in TERMS if n in record)
        knn = next((r["knn"] for r in reversed(self.records) if "knn" in r), None)
        parts = [
            f"step {done:,}/{steps:,}",
            f"{record['images_per_second']:.0f} images/s",
            f"loss {record['loss']:.3f} ({terms})",
            f"data wait {record['data_wait']:.0%}",
            *([f"k-NN {knn:.1%}"] if knn is not None else []),
            f"{duration((steps - done) * rate)} left",
        ]
        line = f"  {self.label}" + " | ".join(parts)
        told = done == steps or "knn" in record or done % (10 * self.config.log_every) == 0
        if told or sys.stderr.isatty():
            say(line, passing=done < steps)


def preprocessing(config: PretrainConfig) -> Preprocessing:
    """How images are shown to the trained network: the shorter side to 8/7 of the crop, as 256 is to 224.

    The crop is that of `crops.global_px`, also of a run with mixed sizes.
    """
    crop = config.crops.global_px
    return Preprocessing(round(min(pair(crop)) * 8 / 7), crop, config.photometric.mean, config.photometric.std)
