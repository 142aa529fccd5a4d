"""How the benchmarks measure: time in alternating rounds, peak memory of tensors; a table and a line of JSON.

Not a benchmark itself. Memory is that of tensors, as torch hands it out: on an accelerator its own record of
the peak, on a processor the sum of what torch's profiler sees allocated and freed, temporaries inside of operations
included. What libraries and allocators hold besides is in neither.
"""

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle() -> None:
    """Wait until the device has done all that it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(sides: Sequence[Callable[[], Any]], rounds: int, warm: int = 1) -> list[float]:
    """The median time of each side over rounds in which they take turns, after so many rounds that do not count."""
    taken: list[list[float]] = [[] for _ in sides]
    for number in range(-warm, rounds):
        for side, times in zip(sides, taken, strict=True):
            settle()
            start = time.perf_counter()
            side()
            settle()
            if number >= 0:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def peak_memory(side: Callable[[], Any]) -> int:
    """Bytes of tensors at the peak, above those that were there before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        side()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> dict[str, Any]:
    """What every line of JSON says of where it was measured."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def line(name: str, ours: float, rival: float, unit: str, *, more_is_better: bool = False, **settings: Any) -> dict:
    """One result; `ratio` is better when larger."""
    ratio = ours / rival if more_is_better else rival / ours
    return {
        "name": name, "ours": ours, "rival": rival, "ratio": ratio, "unit": unit, "settings": settings | machine(),
    }  # fmt: skip


def finish(lines: list[dict]) -> None:
    """A table for people on standard error, and the line of JSON that ends every benchmark."""
    print(f"{'':<34}{'ours':>12}{'rival':>12}{'ratio':>8}  unit", file=sys.stderr)
    for one in lines:
        numbers = f"{one['ours']:>12.4g}{one['rival']:>12.4g}{one['ratio']:>8.2f}"
        print(f"{one['name']:<34}{numbers}  {one['unit']}", file=sys.stderr)
    print(json.dumps(lines))
