"""The one rule of where torch computes: the device that `--device` names, or the best that there is."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from troodon.config import UsageError, nearest

if TYPE_CHECKING:
    import torch

if (
    sys.platform == "darwin"
):  # torch reads it when it is imported: what MPS lacks, the processor computes, with a warning
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

KINDS = ("cuda", "mps", "cpu")  # the best first
TRAINABLE = ("cuda", "cpu")  # training and its protocols are not tried on MPS, which has no float64


def check_device(setting: Any) -> None:
    """UsageError unless this is auto, cuda, cuda:NUMBER, mps or cpu, wherever that is; without torch."""
    if not re.fullmatch(r"auto|(cuda|mps|cpu)(:\d+)?", str(setting)):
        raise nearest("device", str(setting), ("auto", "cuda", "cuda:1", "mps", "cpu"))


def choose_device(setting: "str | torch.device" = "auto", kinds: tuple[str, ...] = KINDS) -> "torch.device":
    """The device that is meant by auto, cuda, cuda:1, mps, cpu, or any other name of torch's.

    "auto" is the first of `kinds` that this machine has. "cuda" is the device of this process: processes of one machine
    take its devices in turn. UsageError for a device that is not here, with those that are.
    """
    import torch

    from troodon import dist

    wanted, there = str(setting), devices_here()
    if wanted == "auto":
        wanted = next(kind for kind in kinds if any(name.partition(":")[0] == kind for name in there))
    kind, _, number = wanted.partition(":")
    if kind == "cuda":
        count = sum(name.startswith("cuda") for name in there)
        if not count:
            why = "torch finds no CUDA device" if torch.backends.cuda.is_built() else "torch was built without CUDA"
            raise UsageError(f"{setting}: {why}; there is {' and '.join(there)}")
        if number and int(number) >= count:
            devices = "1 CUDA device, cuda:0" if count == 1 else f"{count} CUDA devices, cuda:0 to cuda:{count - 1}"
            raise UsageError(f"{setting}: this machine has {devices}")
        return torch.device("cuda", int(number)) if number else dist.device()
    if kind in ("mps", "cpu"):  # of which a machine has one
        if kind not in there or number not in ("", "0"):
            raise UsageError(f"{setting}: not on this machine; there is {' and '.join(there)}")
        return torch.device(kind)
    return _other_device(wanted)


def devices_here() -> list[str]:
    """The names of this machine's devices, the best first; the last is cpu."""
    import torch

    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def accelerator(setting: "str | torch.device | None") -> "torch.device | None":
    """The device of matrix products by torch; None for a CPU, on which numpy is faster."""
    if setting is None or str(setting).partition(":")[0] == "cpu":
        return None
    device = choose_device(setting)
    return None if device.type == "cpu" else device


@contextlib.contextmanager
def memory_advice(device: Any, work: str, fix: str) -> Iterator[None]:
    """Where the memory of a device does not hold `work`, raise UsageError with `fix` in place of torch's pages."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{device}: its memory does not hold {work}; {fix}") from error


def _other_device(wanted: str) -> "torch.device":
    """A device of a kind that no verb chooses, such as xpu: from Python it may be given all the same."""
    import torch

    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"device {wanted!r}: not on this machine ({reason})") from None


def ranks_to_start(devices: str | int) -> int:
    """The number of ranks to start for `devices`, a number or "auto"; 1 inside a process group.

    UsageError for more devices than this machine has.
    """
    import torch

    from troodon import dist

    if "RANK" in os.environ or dist.world_size() > 1:
        return 1
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = (available or 1) if devices == "auto" else int(devices)
    if available and ranks > available:
        raise UsageError(f"devices {ranks}: this machine has {available}")
    return ranks
