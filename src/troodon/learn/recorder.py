"""What happens between steps: records, health readings, checkpoints, and the progress line.

A thread of its own reads numbers from the device and writes them, while the training goes on.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from troodon import dist
from troodon.config import pair
from troodon.learn import best, checkpoint, health
from troodon.learn.checkpoint import Saver, TrainingProgress
from troodon.learn.clock import Clock
from troodon.learn.config import PretrainConfig
from troodon.learn.method import Method
from troodon.live import POINTS, clear, draw, is_live, left, panel
from troodon.model.config import Preprocessing
from troodon.model.saved import SavedViT
from troodon.run import MetricsFile, say, write_bytes
from troodon.text import plural
from troodon.views.batch import Batch
from troodon.views.loader import Loader

Probe = Callable[[SavedViT], float]
OpenLog = Callable[[PretrainConfig, Path, int], Any]  # for a run in a folder that goes on at a step: see loggers.py
WAITING = 0.2  # share of the time spent waiting for images, above which advice is given,
WAITED = 3  # after so many records in a row
MANY = 0.1  # share of unreadable images, among those tried, above which there is an alarm
TERMS = ("dino_global", "dino_local", "ibot", "ibot_visible", "koleo", "kde", "contrast", "gram", "cls", "patches")


class Recorder:
    """Records a run: `resume` is called before the first step, `after_step` after each one."""

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        clock: Clock,
        run: Path,
        saver: Saver,
        probe: Probe | None,
        open_log: OpenLog | None = None,
        label: str = "",
    ):
        self.config, self.method, self.optimizer, self.loader, self.run = config, method, optimizer, loader, run
        self.clock, self.saver, self.probe, self.label = clock, saver, probe, label
        self.metrics, self.thread = MetricsFile(run / "metrics.jsonl"), ThreadPoolExecutor(1, "metrics")
        self.writing: Future | None = None
        self.alarms: dict[str, str] = {}
        self.advised = False
        self.broken, self.many_broken = 0, False  # images that cannot be read, as they were told last
        self.open_log, self.log = open_log, None
        self.readings: list[best.Reading] = []

    def resume(self, progress: TrainingProgress) -> None:
        """Go on from this step. Later records are deleted, as they will be written again."""
        self.flush()
        self.progress = progress
        if dist.rank() == 0:
            self.metrics.rewind(progress.step)
        self.records = [r for r in self.metrics.read() if "step" in r]
        self.seconds_before = self.records[-1]["seconds"] if self.records else 0.0
        self.look_back(progress.step)
        if self.log is not None:
            self.log.close()
        if dist.rank() == 0 and self.open_log is not None:
            self.log = self.open_log(self.config, self.run, progress.step)
        self.start = self.last = time.perf_counter()
        self.first_step, self.waited, self.since = progress.step, 0.0, []

    def look_back(self, step: int) -> None:
        """Take the k-NN readings of this run up to this step, the same on every rank."""
        self.readings = dist.all_gather_objects(best.readings(self.metrics.read(), step))[0]

    def given_up(self) -> bool:
        """Whether features have got worse for so long that the run stops."""
        return best.given_up(self.readings, self.config.adapt.patience)

    def before_training(self) -> None:
        """Record the k-NN of the weights that a run begins with, as that of step -1; by its end it should be higher."""
        if self.probe is not None and self.config.probe_every and not self.records:
            record = {"step": -1, "knn": self.knn(0), "seconds": 0.0}
            self.records.append(record)
            weights = checkpoint.backbone_weights(self.method)
            if dist.rank() == 0:
                if self.config.adapt.patience:
                    self.saver.backbone(weights).save(self.run / "backbone")
                self.metrics.append(record)
                say(f"  {self.label}k-NN {record['knn']:.1%} before the first step")

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, while the time spent waiting for each is measured."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    def after_step(self, step: int, parts: list[Batch], terms: dict[str, Tensor]) -> None:
        """Record, read the run's health, probe and save, each at its interval."""
        config, done, start = self.config, step + 1, self.clock.now()
        self.progress = TrainingProgress(done, self.progress.batch + 1, self.progress.rescues)
        self.names = list(terms)
        self.since.append(torch.stack([*terms.values()]))

        due, patience = partial(self.clock.due, done), config.adapt.patience
        probe = due(config.probe_every, by_share=patience > 0) and self.probe is not None
        if due(config.health_every) or due(config.log_every) or probe:
            readings = {}
            if due(config.health_every):
                readings = health.read(self.method, parts, self.clock.values(config.schedules, step))
            self.record(readings, {"knn": self.knn(done)} if probe else {})
        patience = patience if probe else 0
        if patience:
            self.flush()  # a checkpoint is never ahead of the reading that says what it is worth
        if due(config.checkpoint_every) or (patience and best.is_kept(self.readings, patience, done)):
            self.save()
        self.clock.noted(self.clock.now() - start, self.saver.took)

    def record(self, readings: dict[str, Tensor], known: dict[str, float]) -> None:
        """Write the means over ranks and over the steps since the last record, with readings and other numbers."""
        since = torch.stack(self.since).mean(0)
        broken = since.new_tensor([len(self.loader.broken)])
        sums = dist.sum_over_ranks(torch.cat([since, broken]))
        mean, broken = sums[:-1] / dist.world_size(), sums[-1]
        now = time.perf_counter()
        step, steps, seconds = self.progress.step - 1, len(self.since), now - self.last
        scheduled = self.clock.values(self.config.schedules, step)
        known = {
            "lr": scheduled.lr,
            "weight_decay": scheduled.weight_decay,
            "momentum": scheduled.ema_momentum,
            "teacher_temperature": scheduled.teacher_temperature,
            "images_per_second": steps * self.config.batch / seconds,
            "data_wait": min(1.0, self.waited / seconds),
            "seconds": self.seconds_before + now - self.start,
            **self.clock.share(step + 1),
            **known,
        }
        self.last, self.waited, self.since = now, 0.0, []
        self.flush()
        if dist.rank() == 0:
            self.writing = self.thread.submit(self._write, step, self.names, mean, broken, readings, known)

    def _write(
        self, step: int, names: list[str], mean: Tensor, broken: Tensor, readings: dict[str, Tensor], known: dict
    ) -> None:
        terms = dict(zip(names, mean.tolist(), strict=True))
        loss = sum(value for name, value in terms.items() if not name.startswith("grad_norm"))
        read = dict(zip(readings, torch.stack([*readings.values()]).tolist(), strict=True)) if readings else {}
        record = {"step": step, "loss": loss, **terms, **read, **known}
        self.records.append(record)
        self.metrics.append(record)
        if self.log is not None:
            self.log.write(record)
        self._show(record)
        self._tell_broken(step + 1, int(broken))
        slow = [r for r in self.records[-WAITED:] if r.get("data_wait", 0) > WAITING]
        if len(slow) == WAITED and not self.advised:
            self.advised = True
            advice = "; ".join(self.loader.advice())
            say(f"  {known['data_wait']:.0%} of the time is spent waiting for images. What helps: {advice}")
        if read or "knn" in known:
            alarms = health.verdict(self.records, self.config)
            for name in alarms.keys() - self.alarms.keys():
                self.event("health", step + 1, alarms[name], alarm=name)
            for name in self.alarms.keys() - alarms.keys():
                self.event("health", step + 1, f"{name}: no longer", alarm=name, over=True)
            self.alarms = alarms

    def _tell_broken(self, step: int, broken: int) -> None:
        """Say that images cannot be read: at the first, and when they are many."""
        share = self.loader.broken_share(step - self.first_step)
        if broken and not self.broken:
            row, reason = next(iter(dict(self.loader.broken).items()), (None, ""))
            first = f": {self.loader.index.path(row)}: {reason}" if row is not None else ""
            say(f"  {self.label}step {step:,}: an image cannot be read and is set aside, as will be others{first}")
        if share > MANY and not self.many_broken:
            self.many_broken = True
            say(f"  {self.label}alarm: {share:.0%} of the images tried cannot be read: see quarantine.jsonl")
        self.broken = broken

    def event(self, name: str, step: int, message: str, **more: object) -> None:
        """Print a message about step number `step`, and write it to metrics.jsonl, where `rewind` keeps it."""
        say(f"  {self.label}step {step:,}: {message}")
        self.metrics.append({"event": name, "at": step, "message": message, **more})

    def flush(self) -> None:
        """Wait until all records are written; raises what the writing raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def save(self) -> None:
        """Begin to write a checkpoint. If one cannot be written, the run goes on."""
        of_ranks = dist.all_gather_objects(dict(self.loader.broken))
        broken = {row: reason for of_rank in of_ranks for row, reason in of_rank.items()}
        if broken and dist.rank() == 0:
            path = self.run / "quarantine.jsonl"
            records = [
                {"path": self.loader.index.path(row), "reason": reason} for row, reason in sorted(broken.items())
            ]
            now = {record["path"] for record in records}
            records += [record for record in MetricsFile(path).read() if record["path"] not in now]  # before a resume
            with contextlib.suppress(OSError):  # a full disk; the file is written again with the next checkpoint
                write_bytes(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
        kept = best.is_kept(self.readings, self.config.adapt.patience, self.progress.step)
        progress = replace(self.progress, clock=self.clock.state())
        self._report(self.saver.save(progress, self.method, self.optimizer, kept))

    def settle(self) -> str | None:
        """Wait until everything is written; returns why the last checkpoint is not, on every rank, or None."""
        self.flush()
        failed = self.saver.wait()
        self._report(failed)
        return failed

    def finish(self) -> None:
        """Record and save what is not yet, and wait for it. OSError, on every rank, if it cannot be saved."""
        if self.since:
            self.record({}, {})
        failed = self.settle()
        if failed or self.saver.step != self.progress.step:
            self.save()
            failed = self.settle()
        clear(self)
        if self.log is not None:
            self.log.close()
        if self.broken and dist.rank() == 0:
            say(f"  {self.label}{plural(self.broken, 'image')} could not be read: see {self.run / 'quarantine.jsonl'}")
        if failed:
            raise OSError(f"the last checkpoint could not be written: {failed}")

    def _report(self, failed: str | None) -> None:
        if failed and dist.rank() == 0:
            complete = checkpoint.finished(self.run)
            last = f"the last is of step {int(complete[-1].name):,}" if complete else "there is none yet"
            self.event("not saved", self.progress.step, f"a checkpoint could not be written ({failed}); {last}")

    def knn(self, step: int) -> float:
        """The k-NN accuracy of the EMA after this step; computed on rank zero, which has its whole weights."""
        weights, accuracy = checkpoint.backbone_weights(self.method), None
        if self.probe is not None and dist.rank() == 0:
            saved = SavedViT.from_state_dict(weights, self.config.vit, preprocessing(self.config), name="ema")
            accuracy = self.probe(saved)
        accuracy = dist.all_gather_objects(accuracy)[0]
        self.readings.append((step, accuracy))
        return accuracy

    def _show(self, record: dict) -> None:
        done, steps = record["step"] + 1, self.clock.pace.end
        rate = (time.perf_counter() - self.start) / (done - self.first_step)
        terms = ", ".join(f"{n} {record[n]:.3f}" for n in TERMS if n in record)
        knn = next((r["knn"] for r in reversed(self.records) if "knn" in r), None)
        parts = [
            f"step {done:,}/{self.clock.length}",
            f"{record['images_per_second']:.0f} images/s",
            f"loss {record['loss']:.3f} ({terms})",
            f"data wait {record['data_wait']:.0%}",
            *([f"k-NN {knn:.1%}"] if knn is not None else []),
            left(self.clock.seconds_left or (steps - done) * rate),
        ]
        line = f"  {self.label}" + " | ".join(parts)
        if is_live() and done < steps:
            return self._draw(record, done / steps, parts)
        clear(self)
        if done == steps or "knn" in record or done % (10 * self.config.log_every) == 0:
            say(line)

    def _draw(self, record: dict, share: float, parts: list[str]) -> None:
        """Show the run at the bottom of the terminal: its progress, its losses as small curves, and its health."""
        recent = self.records[:: -max(1, -(-len(self.records) // POINTS))][::-1]
        curves = {n: [r[n] for r in recent if n in r] for n in ("loss", *TERMS) if n in record}
        verdict = "no alarm" if any("feature_cosine" in r for r in reversed(self.records)) else ""
        facts = [parts[0], parts[1], *parts[3:]]
        draw(self, partial(panel, self.label.strip(": "), share, facts, curves, self.alarms, verdict), now=True)


def preprocessing(config: PretrainConfig) -> Preprocessing:
    """Preprocessing of the trained network: `inference_px`, or resize the shorter side to 8/7 of the crop, as 256 is to
    224.

    The crop is that of `crops.global_px`, also of a run with mixed sizes.
    """
    crop = config.inference_px or config.crops.global_px
    resize = config.inference_px or round(min(pair(crop)) * 8 / 7)
    return Preprocessing(resize, crop, config.photometric.mean, config.photometric.std, config.range)
