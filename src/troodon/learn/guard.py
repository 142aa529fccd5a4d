"""What a run does when a loss or a gradient is not finite: it records why, and goes on elsewhere or stops."""

from pathlib import Path

from troodon import dist
from troodon.learn.checkpoint import TrainingProgress
from troodon.learn.config import GuardConfig
from troodon.learn.loop import NotFinite
from troodon.run import write_json
from troodon.views.loader import Loader


def report(error: NotFinite, batch: int, loader: Loader, run: Path) -> str:
    """Write the terms of every rank and the images of the batch to `run`/trouble; returns one line about them.

    All ranks call it.
    """
    bad = [name for name, value in error.terms.items() if not abs(value) < float("inf")]
    images = [loader.index.path(row) for row in loader.rows(batch)]
    ranks = dist.all_gather_objects({"not_finite": bad, "terms": error.terms, "images": images})
    path, written = run / "trouble" / f"step_{error.step:06d}_batch_{batch:06d}.json", "are"
    if dist.rank() == 0:
        try:
            write_json(path, {"step": error.step, "batch": batch, "ranks": ranks})
        except OSError as failure:  # a full disk must not end a run that the guard can go on with
            written = f"could not be written ({failure})"
    names = {f"rank {rank}": ", ".join(terms["not_finite"]) for rank, terms in enumerate(ranks) if terms["not_finite"]}
    where = "; ".join(f"{rank}: {terms}" for rank, terms in names.items())
    return f"not finite ({where}); images and terms {written} in {path.relative_to(run)}"


def decide(
    config: GuardConfig, now: TrainingProgress, saved: TrainingProgress | None
) -> tuple[TrainingProgress | None, str]:
    """Where a run goes on after a step at `now` that is not finite; None is nowhere. The second value says it in words.

    `saved` is the last checkpoint.
    """
    rescues = now.rescues + 1
    if config.policy == "stop":
        return None, "stopping, as guard.policy says"
    if rescues > config.limit:
        return None, f"stopping: it happened {rescues} times, and guard.limit is {config.limit}"
    if config.policy == "skip":
        return TrainingProgress(now.step + 1, now.batch + 1, rescues), "this step is left out"
    if saved is None:
        return None, "stopping: there is no checkpoint yet to go back to"
    decision = f"going back to step {saved.step:,}, and on with the images that follow"
    return TrainingProgress(saved.step, now.batch + 1, rescues), decision
