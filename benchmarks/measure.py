"""How the benchmarks measure and record: median times, peak memory of tensors, a table, a line of JSON, rows in a file.

Not a benchmark itself. Memory is that of tensors, as torch allocates it: on an accelerator torch's own record of the
peak, on a processor the sum of allocations and frees that torch's profiler sees, temporaries inside of operations
included. Memory that libraries and allocators hold besides is in neither. torch is imported only where it is needed, so
that a benchmark without torch can measure the memory of its process.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg")  # versions of these stand in every row
# Counted at import, before a benchmark may keep itself to fewer cores.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
INTEL = {85: "skylake", 106: "ice-lake", 143: "sapphire-rapids", 173: "granite-rapids", 207: "emerald-rapids"}


def argument_parser(doc: str, packages: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has. `packages` are those that the rival needs.

    The commit is read here, before anything is measured: the tree may change while a long benchmark runs.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", nargs="?", const="", metavar="FILE",
        help="append the results to benchmarks/results/MACHINE.jsonl, or to FILE",
    )  # fmt: skip
    parser.add_argument("--machine", help="name of this machine in the records; by default the detected one")
    parser.set_defaults(commit=commit(), packages=tuple(packages))
    return parser


def device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait until the device has completed all queued work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(functions: Sequence[Callable[[], Any]], rounds: int, warmup: int = 1) -> list[float]:
    """The median time of each function over alternating rounds, after `warmup` rounds that are not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for round_number in range(-warmup, rounds):
        for function, its_times in zip(functions, times, strict=True):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if round_number >= 0:
                its_times.append(time.perf_counter() - start)
    return [statistics.median(its_times) for its_times in times]


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of tensors at the peak, above those allocated before the call."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def environment() -> dict[str, Any]:
    """The settings of every result that say where it was measured."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def result(
    name: str, ours: float, rival: float | None, unit: str, /, *, more_is_better: bool = False, **settings: Any
) -> dict:
    """One result. A larger `ratio` is better for ours; it is None where there is no rival, or a side is 0."""
    ratio = None
    if rival is not None and ours and rival:
        ratio = ours / rival if more_is_better else rival / ours
    settings |= environment()
    return {"name": name, "ours": ours, "rival": rival, "ratio": ratio, "unit": unit, "settings": settings}


def finish(results: list[dict], arguments: argparse.Namespace) -> None:
    """Print a table on standard error and the line of JSON that ends every benchmark; append the rows if told to.

    Results of `--quick` say so in their settings: no table shows them unless it asks for them.
    """
    if getattr(arguments, "quick", False):
        results = [each | {"settings": each["settings"] | {"quick": True}} for each in results]
    print(f"{'':<44}{'ours':>12}{'rival':>12}{'ratio':>8}  unit", file=sys.stderr)
    for each in results:
        numbers = (f"{each[key]:>{width}.{digits}}" if each[key] is not None else f"{'-':>{width}}"
                   for key, width, digits in (("ours", 12, "4g"), ("rival", 12, "4g"), ("ratio", 8, "2f")))  # fmt: skip
        print(f"{each['name']:<44}{''.join(numbers)}  {each['unit']}", file=sys.stderr)
    if arguments.record is not None:
        path = record(
            results, arguments.record or None, machine=arguments.machine, packages=arguments.packages,
            commit=arguments.commit,
        )  # fmt: skip
        print(f"appended {len(results)} rows to {path}", file=sys.stderr)
    print(json.dumps(results))


def record(
    results: list[dict], file: str | Path | None = None, *, machine: str | None = None, packages: Sequence[str] = (),
    commit: str | None = None,
) -> Path:  # fmt: skip
    """Append the results to a file of JSON lines, with machine, versions, commit and date; the file's path.

    The rows are written at once, behind all that the file holds. An unfinished last line is ended first, so that no
    row is joined to it.
    """
    machine = machine or machine_name()
    path = Path(file) if file else RESULTS / f"{machine}.jsonl"
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    origin = {"machine": machine, "versions": versions(packages), "commit": commit, "date": date}
    text = "".join(json.dumps(each | origin) + "\n" for each in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as stream:
        if end := stream.seek(0, os.SEEK_END):
            stream.seek(end - 1)
            text = text if stream.read(1) == b"\n" else "\n" + text
        stream.write(text.encode())
        os.fsync(stream.fileno())
    return path


def versions(packages: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions of Python and of packages; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in dict.fromkeys([*PACKAGES, *packages]):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def commit() -> str | None:
    """The short hash of the commit, with `+` where tracked files differ from it; None outside a repository.

    Recorded results do not count: one record would make the tree of the next dirty.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_name() -> str:
    """A short name of the accelerator, as `h200`, or of the processor and the number of cores, as `zen5-2-cores`."""
    import torch

    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name().replace("NVIDIA", ""))
    path = Path("/proc/cpuinfo")
    cores = f"{CORES}-core{'s' if CORES > 1 else ''}"
    return f"{processor_name(path.read_text() if path.exists() else '')}-{cores}"


def processor_name(cpuinfo: str) -> str:
    """The microarchitecture by CPUID family and model, where known, else a short form of the model's name."""
    lines = (line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines}
    numbers = (fields.get(key, "") for key in ("cpu family", "model"))
    vendor, (family, model) = fields.get("vendor_id"), (int(n) if n.isdigit() else 0 for n in numbers)
    if vendor == "AuthenticAMD" and family == 23:
        return "zen" if model < 0x30 else "zen2"
    if vendor == "AuthenticAMD" and family == 25:
        return "zen4" if model >> 4 in (0x1, 0x6, 0x7, 0xA) else "zen3"
    if vendor == "AuthenticAMD" and family == 26:
        return "zen5"
    if vendor == "GenuineIntel" and family == 6 and model in INTEL:
        return INTEL[model]
    name = re.sub(r"\(\w+\)|\b(CPU|Processor)\b|@.*|\bwith\b.*|\d+-Core", " ", fields.get("model name", ""))
    return _slug(name) or _slug(platform.machine()) or "unknown"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
