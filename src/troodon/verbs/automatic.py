"""The recipe `auto` of the verb `pretrain`: a look at the images, the device and the folder comes before its config."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from troodon import recipes
from troodon.config import UsageError, from_dict
from troodon.devices import ranks_to_start
from troodon.learn.config import PretrainConfig
from troodon.recipes.automatic import Choice, Device, adapting, auto, automatic
from troodon.run import read_manifest, say
from troodon.verbs.common import Data, as_list, config_of_weights, is_first, said_elsewhere

if TYPE_CHECKING:
    from troodon.model.backbone import Backbone

NAME = auto.__name__


def choose(
    data: Data | None,
    out: str | Path | None,
    *,
    minutes: float = 0.0,
    steps: int | None = None,
    devices: str | int = "auto",
    init: "str | Path | Backbone | None" = None,
) -> Choice:
    """What `auto` chooses for these images; for a run that was begun in `out`, what it chose then.

    UsageError where there are no images to look at.
    """
    manifest = (read_manifest(Path(out)) if out else None) or {"kind": None}
    if manifest["kind"] == "run":
        begun = from_dict(PretrainConfig(), manifest["settings"]["config"], source="manifest.json")
        return Choice(begun, (f"goes on with what it chose for {out}",))
    if data is None or not as_list(data):
        raise UsageError("auto looks at the images first: give them as --data")
    from troodon.images.look import look
    from troodon.images.sources import open_source

    with said_elsewhere():  # by the training, which opens them again
        index = open_source(*as_list(data))
        if init is None:
            kind, count = _computes_on(devices)
            return automatic(look(index), minutes=minutes, steps=steps, device=kind, devices=count)
    config = recipes.pretrain("adapt", lambda: config_of_weights(init))
    return adapting(config, str(getattr(init, "name", init)), len(index), minutes, steps)


def tell(reasons: Sequence[str]) -> None:
    """Print what was chosen, and why."""
    if reasons and is_first():
        say("auto:" + "".join(f"\n  {line}" for line in reasons))


def _computes_on(devices: str | int) -> tuple[Device, int]:
    """The kind of device that trains here, and how many: of processors, those that this process may use."""
    from troodon import dist

    kind = dist.device().type
    if kind != "cuda":
        return "cpu", dist.processors()
    return "cuda", ranks_to_start(devices)
