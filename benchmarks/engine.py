"""The training engine's promises: one run on 1, 2 and 4 ranks, resumed on other numbers of ranks, and killed at random.

    python benchmarks/engine.py [--quick] [--kills 20] [--seed 0] [--out FOLDER] [--record]

Every part compares with the undisturbed run on one rank. `ours` and `rival` are both relative differences from it: of
the run that the name states, and of the same run with another order of sums (two ranks), which shows rounding alone.
For the kills they are the steps that were done twice, and those that would have been without checkpoints.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from measure import argument_parser, finish, result
from troodon.config import to_yaml
from troodon.learn.config import PretrainConfig
from troodon.learn.schedules import Schedule, Schedules
from troodon.model.config import HeadConfig, ViTConfig
from troodon.views.config import CropsConfig

CONFIG = PretrainConfig(
    vit=ViTConfig(dim=64, depth=3, heads=2, patch=4, grid=4, layer_scale=0.1, drop_path=0.0),
    dino_head=HeadConfig(256, 64, 32),
    ibot_head=HeadConfig(256, 64, 32),
    crops=CropsConfig(global_px=16, local_px=8, locals=4),
    schedules=Schedules(
        lr=Schedule(peak=1e-3, end=1e-6, warmup=5),
        teacher_temperature=Schedule(start=0.04, peak=0.07, end=0.07, warmup=4),
        last_layer_frozen=1,
    ),
    batch=24,
    steps=20,
    log_every=1,
    health_every=0,
    checkpoint_every=10,
    compute="fp32",
    threads=1,
)


class Runs:
    """Runs of the command line in one folder, on the same images."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        noise = np.random.default_rng(0)
        for i in range(100):
            Image.fromarray(noise.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(self.images / f"{i:03d}.png")

    def start(self, config: PretrainConfig, name: str, ranks: int = 1) -> subprocess.Popen:
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(to_yaml(config))
        words = ["pretrain", str(recipe), "--data", str(self.images), "--out", str(self.folder / name)]
        code = "import sys; from troodon.cli import run; sys.exit(run(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words, "--devices", str(ranks)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(self, config: PretrainConfig, name: str, ranks: int = 1) -> Path:
        child = self.start(config, name, ranks)
        _, messages = child.communicate()
        if child.returncode:
            raise RuntimeError(f"{name} ended with {child.returncode}: {messages.decode()}")
        return self.folder / name

    def stop(self, config: PretrainConfig, name: str, ranks: int, step: int) -> None:
        """Start a run, and send SIGTERM once it has taken `step` steps."""
        child = self.start(config, name, ranks)
        while child.poll() is None and len(losses(self.folder / name)) < step:
            time.sleep(0.005)
        child.send_signal(signal.SIGTERM)
        _, messages = child.communicate()
        if child.returncode not in (0, 130):
            raise RuntimeError(f"{name} ended with {child.returncode}: {messages.decode()}")


def step_records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that are steps."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # a line that is being written
            continue
    return [r for r in records if r.get("step", -1) >= 0 and "loss" in r]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in step_records(run)]


def differences(a: Path, b: Path) -> dict[str, float]:
    """The largest relative differences of losses and of gradient norms over all steps, and of the final weights.

    Of the weights it is the norm of the difference divided by the norm, of the backbone.
    """
    ours, rival = step_records(a), step_records(b)
    if [r["step"] for r in ours] != [r["step"] for r in rival]:
        raise AssertionError(f"{a} and {b} have different steps")
    numbers = {"losses": "loss", "gradients": "grad_norm"}
    largest = {
        name: max(abs(x[key] - y[key]) / abs(y[key]) for x, y in zip(ours, rival, strict=True))
        for name, key in numbers.items()
    }
    a_weights, b_weights = (load_file(run / "backbone" / "model.safetensors") for run in (a, b))
    difference = sum(float((a_weights[name] - b_weights[name]).square().sum()) for name in b_weights)
    return largest | {"weights": (difference / sum(float(t.square().sum()) for t in b_weights.values())) ** 0.5}


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed in the meantime
            continue
    return total


def ranks_and_resharding(runs: Runs, quick: bool) -> list[dict]:
    one = runs.finish(CONFIG, "one")
    measured = {"2 ranks": differences(runs.finish(CONFIG, "two", 2), one)}
    if not quick:
        measured["4 ranks"] = differences(runs.finish(CONFIG, "four", 4), one)
        for ranks in (1, 3):
            name = f"saved on 4 ranks and resumed on {ranks}"
            runs.stop(replace(CONFIG, steps=20), f"to{ranks}", 4, 8)
            measured[name] = differences(runs.finish(CONFIG, f"to{ranks}", ranks), one)
    rounding = measured["2 ranks"]
    return [
        engine_result(f"{name}: {quantity}", value, rounding[quantity], "relative difference from 1 rank", CONFIG)
        for name, values in measured.items()
        for quantity, value in values.items()
    ]


def kills(runs: Runs, count: int, seed: int) -> list[dict]:
    """A run that `kill -9` ends at `count` random moments, and that then continues to its end."""
    config = replace(CONFIG, vit=replace(CONFIG.vit, drop_path=0.3), steps=30 * count, checkpoint_every=5)
    start = time.monotonic()
    whole = runs.finish(config, "whole")
    duration, draw = time.monotonic() - start, random.Random(seed)
    whole_size, run, repeated, largest, without_checkpoints = size(whole), runs.folder / "killed", 0, 0, 0
    moments, writing = [], 0
    for _ in range(count):
        child = runs.start(config, "killed")
        before = len(losses(run))
        if draw.random() < 0.5:  # while a checkpoint is being written
            while child.poll() is None and not list((run / "checkpoints").glob("*.partial")):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.03))
        else:
            while child.poll() is None and len(losses(run)) <= before:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 1.5 * duration / count))
        if child.poll() is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        writing += bool(list((run / "checkpoints").glob("*.partial")))
        steps = len(losses(run))
        saved = max((int(p.name) for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)
        moments.append(steps)
        repeated, without_checkpoints = repeated + max(0, steps - saved), without_checkpoints + steps
        largest = max(largest, size(run))
    finished = runs.finish(config, "killed")
    equal = losses(finished) == losses(whole)
    checkpoints = sorted(p.name for p in (finished / "checkpoints").iterdir())
    difference = differences(finished, whole)
    if not equal or difference["weights"] or checkpoints != sorted(p.name for p in (whole / "checkpoints").iterdir()):
        raise AssertionError(f"killed at {moments}: {difference}, checkpoints {checkpoints}")
    print(
        f"  {len(moments)} kills at {moments} of {config.steps} steps, {writing} while a checkpoint was being written: "
        f"losses and weights equal, at most {largest / whole_size:.2f} times the disk of an undisturbed run",
        file=sys.stderr,
    )
    name = f"{len(moments)} kills, {writing} in a checkpoint: steps done twice"
    return [engine_result(name, repeated, without_checkpoints, "steps", config)]


def engine_result(name: str, ours: float, rival: float, unit: str, config: PretrainConfig) -> dict:
    return result(name, ours, rival, unit, batch=config.batch, steps=config.steps, drop_path=config.vit.drop_path)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two ranks and two kills: under a minute")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="new folder that keeps the runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(arguments.out or Path(scratch) / "runs")
        results = ranks_and_resharding(runs, arguments.quick)
        results += kills(runs, 2 if arguments.quick else arguments.kills, arguments.seed)
    finish(results, arguments)


if __name__ == "__main__":
    main()
