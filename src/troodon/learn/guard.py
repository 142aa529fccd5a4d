"""What a run does when a loss or a gradient is not finite: writes down why, and goes on elsewhere or stops."""

from pathlib import Path

from troodon import dist
from troodon.learn.checkpoint import Progress
from troodon.learn.config import GuardConfig
from troodon.learn.loop import NotFinite
from troodon.run import write_json
from troodon.views.loader import Loader


def report(trouble: NotFinite, batch: int, loader: Loader, run: Path) -> str:
    """Write the terms of every rank and the images of the batch to `run`/trouble; one line for people. All ranks."""
    bad = [name for name, value in trouble.here.items() if not abs(value) < float("inf")]
    images = [loader.index.path(row) for row in loader.rows(batch)]
    ranks = dist.gather_objects({"not_finite": bad, "terms": trouble.here, "images": images})
    path, written = run / "trouble" / f"step_{trouble.step:06d}_batch_{batch:06d}.json", "are"
    if dist.rank() == 0:
        try:
            write_json(path, {"step": trouble.step, "batch": batch, "ranks": ranks})
        except OSError as error:  # a full disk must not end the run that the guard could go on with
            written = f"could not be written ({error})"
    where = {f"rank {rank}": ", ".join(said["not_finite"]) for rank, said in enumerate(ranks) if said["not_finite"]}
    said = "; ".join(f"{rank}: {names}" for rank, names in where.items())
    return f"not finite ({said}); images and terms {written} in {path.relative_to(run)}"


def where_to(config: GuardConfig, now: Progress, saved: Progress | None) -> tuple[Progress | None, str]:
    """Where a run goes on that met trouble at `now` and could go back to `saved`; None is nowhere. And in words."""
    rescues = now.rescues + 1
    if config.policy == "stop":
        return None, "stopping, as guard.policy says"
    if rescues > config.limit:
        return None, f"stopping: it happened {rescues} times, and guard.limit is {config.limit}"
    if config.policy == "skip":
        return Progress(now.step + 1, now.batch + 1, rescues), "this step is left out"
    if saved is None:
        return None, "stopping: there is no checkpoint yet to go back to"
    said = f"going back to step {saved.step:,}, and on with the images that follow"
    return Progress(saved.step, now.batch + 1, rescues), said
