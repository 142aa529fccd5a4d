"""What happens between steps: records, readings, checkpoints, and the line that people watch."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from troodon import dist
from troodon.data.batch import Batch
from troodon.data.loader import Loader
from troodon.learn import checkpoint
from troodon.learn.config import PretrainConfig
from troodon.learn.method import Method
from troodon.learn.plan import duration
from troodon.model.backbone import Backbone, of_state
from troodon.model.config import Preprocessing
from troodon.run import Metrics, write_bytes

Probe = Callable[[Backbone], float]


class Recorder:
    """Sees every step of a run; `stopped_at` is the number of steps done when it was asked to stop early."""

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        run: Path,
        first_step: int,
        *,
        probe: Probe | None,
        asked_to_stop: Callable[[], bool],
    ):
        self.config, self.method, self.optimizer, self.loader, self.run = config, method, optimizer, loader, run
        self.probe, self.asked_to_stop = probe, asked_to_stop
        self.stopped_at: int | None = None
        self.preprocessing = preprocessing(config)
        self.metrics = Metrics(run / "metrics.jsonl")
        records = [r for r in self.metrics.read() if "step" in r]
        self.seconds_before = records[-1]["seconds"] if records else 0.0
        self.start = self.last = time.perf_counter()
        self.first_step, self.waited, self.since = first_step, 0.0, []
        self.knn: float | None = next((r["knn"] for r in reversed(records) if "knn" in r), None)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, while noting how long each was waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    def after_step(self, step: int, terms: dict[str, Tensor]) -> bool:
        """Record, probe and save when it is time; True when the run was asked to stop."""
        config, done = self.config, step + 1
        self.since.append(torch.stack([*terms.values()]))
        last = done == config.steps
        stop = not last and bool(dist.total(torch.tensor(float(self.asked_to_stop()))))
        if last or stop or done % config.log_every == 0:
            record = self._record(step, list(terms))
            if self.probe is not None and config.probe_every and (last or done % config.probe_every == 0):
                record["knn"] = self.knn = self._probe()
            if dist.rank() == 0:
                self.metrics.append(record)
                self._show(record)
        if last or stop or done % config.checkpoint_every == 0:
            self._write_quarantine()
            checkpoint.save(self.run, done, self.method, self.optimizer, self.preprocessing, config.keep)
        if stop:
            self.stopped_at = done
        return stop

    def _record(self, step: int, names: list[str]) -> dict:
        """Means over the steps since the last record, and over ranks."""
        mean = dist.total(torch.stack(self.since).mean(0)) / dist.world()
        now = time.perf_counter()
        steps, seconds = len(self.since), now - self.last
        record = dict(zip(names, mean.tolist(), strict=True))
        knobs = self.config.schedules.at(step, self.config.steps)
        record = {
            "step": step,
            "loss": sum(value for name, value in record.items() if name != "grad_norm"),
            **record,
            "lr": knobs.lr,
            "weight_decay": knobs.weight_decay,
            "momentum": knobs.momentum,
            "teacher_temperature": knobs.teacher_temperature,
            "images_per_second": steps * self.config.batch / seconds,
            "data_wait": min(1.0, self.waited / seconds),
            "seconds": self.seconds_before + now - self.start,
        }
        self.last, self.waited, self.since = now, 0.0, []
        return record

    def _probe(self) -> float:
        weights = checkpoint.whole(self.method.average.backbone)
        return self.probe(of_state(weights, self.config.vit, self.preprocessing, name="average"))

    def _show(self, record: dict) -> None:
        done, steps = record["step"] + 1, self.config.steps
        rate = (time.perf_counter() - self.start) / (done - self.first_step)
        terms = ", ".join(f"{n} {record[n]:.3f}" for n in ("dino_global", "dino_local", "ibot", "koleo") if n in record)
        parts = [
            f"step {done:,}/{steps:,}",
            f"{record['images_per_second']:.0f} images/s",
            f"loss {record['loss']:.3f} ({terms})",
            f"data wait {record['data_wait']:.0%}",
            *([f"k-NN {self.knn:.1%}"] if self.knn is not None else []),
            f"{duration((steps - done) * rate)} left",
        ]
        line = "  " + " | ".join(parts)
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="" if done < steps else "\n", file=sys.stderr, flush=True)
        elif done == steps or "knn" in record or done % (10 * self.config.log_every) == 0:
            print(line, file=sys.stderr, flush=True)

    def _write_quarantine(self) -> None:
        if self.loader.broken and dist.rank() == 0:
            rows = sorted(self.loader.broken.items())
            lines = [json.dumps({"path": self.loader.index.path(row), "reason": reason}) for row, reason in rows]
            write_bytes(self.run / "quarantine.jsonl", "".join(f"{line}\n" for line in lines).encode())


def preprocessing(config: PretrainConfig) -> Preprocessing:
    """How images are shown to the trained network: the shorter side to 8/7 of the crop, as 256 is to 224."""
    crop = config.crops.global_px
    return Preprocessing(round(crop * 8 / 7), crop, config.photometric.mean, config.photometric.std)
