"""Records to other places than metrics.jsonl, which stays the truth: TensorBoard, Weights & Biases, Trackio.

A place that fails is reported once and not used again; it ends no run.
"""

import importlib.util
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from troodon.config import UsageError, to_dict
from troodon.learn.config import PretrainConfig
from troodon.run import say, write_bytes

PROJECT = "troodon"

Write = Callable[[int, dict[str, float]], None]
Place = tuple[Write, Callable[[], None]]  # write numbers of a step; close


class Loggers:
    """Places that are open: `write` records, then `close`. Neither raises."""

    def __init__(self, open_ones: dict[str, Place]):
        self.open_ones = open_ones

    def write(self, record: dict) -> None:
        """The numbers of a record that has a "step"; nothing of another."""
        numbers = {k: float(v) for k, v in record.items() if k != "step" and type(v) in (int, float)}
        if "step" in record and numbers:
            self._each(lambda write, _: write(record["step"], numbers))

    def close(self) -> None:
        self._each(lambda _, close: close())
        self.open_ones = {}

    def _each(self, do: Callable[[Write, Callable[[], None]], None]) -> None:
        for name, place in list(self.open_ones.items()):
            try:
                do(*place)
            except Exception as error:
                del self.open_ones[name]
                _left_out(name, error)


def check(names: Iterable[str]) -> None:
    """UsageError for a place whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"log_to {name}: not installed; pip install 'troodon[{name}]'")


def open_loggers(names: Iterable[str], run: Path, config: dict, *, first_step: int = 0) -> Loggers:
    """Open these places for the run in the folder `run`, which goes on at `first_step`, on rank zero only.

    What they show of `first_step` and later is replaced or written again. UsageError as by `check`.
    """
    check(names)
    known = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    open_ones = {}
    for name in names:
        try:
            open_ones[name] = known[name](run, config, first_step)
        except Exception as error:
            _left_out(name, error)
    return Loggers(open_ones)


def open_for(config: PretrainConfig, run: Path, first_step: int) -> Loggers:
    """Open what the config of a run asks for."""
    return open_loggers(config.log_to, run, to_dict(config), first_step=first_step)


def _left_out(name: str, error: Exception) -> None:
    said = " ".join(str(error).split())
    say(f"  log_to {name}: {type(error).__name__}: {said}; no more goes there, metrics.jsonl has everything")


def _tensorboard(run: Path, config: dict, first_step: int) -> Place:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(run: Path, config: dict, first_step: int) -> Place:
    import wandb

    there = wandb.init(
        project=PROJECT,
        name=run.resolve().name,
        id=_name_for_ever(run),
        resume="allow",
        dir=str(run),
        config=config,
        settings=wandb.Settings(console="off"),  # the run's lines are its own
    )
    there.define_metric("*", step_metric="step")  # its own count of steps refuses those that a resumed run repeats

    def write(step: int, numbers: dict[str, float]) -> None:
        there.log({"step": step, **numbers})

    return write, there.finish


def _trackio(run: Path, config: dict, first_step: int) -> Place:
    import trackio

    # It knows runs by their names alone.
    name = f"{run.resolve().name}-{_name_for_ever(run)[:6]}"
    there = trackio.init(project=PROJECT, name=name, resume="allow", config=config)

    def write(step: int, numbers: dict[str, float]) -> None:
        there.log(numbers, step=step)

    return write, there.finish


def _name_for_ever(run: Path) -> str:
    """A name that this run keeps where it is resumed, moved or renamed, and that no other has."""
    path = run / "logged-as"
    if not path.exists():
        write_bytes(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()
