"""The command `doctor`: what this machine can do, and what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass

from troodon.run import environment
from troodon.text import plural, with_prefix


@dataclass(frozen=True)
class Doctor:
    """What this machine can do, and what is missing; what the cache of remote images holds."""

    empty_cache: bool = False
    """Only empty the cache of remote images."""

    def run(self) -> None:
        for line in empty() if self.empty_cache else examine():
            print(line)


def examine() -> Iterator[str]:
    """Lines to print: versions, devices, speed at each precision, missing optional packages."""
    import torch

    from troodon import dist
    from troodon.learn.plan import product_rate

    machine = environment()
    yield f"troodon {machine['troodon']}, Python {machine['python']}, {machine['platform']}"
    yield "  " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    device = dist.device()
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device).total_memory
        yield f"  {torch.cuda.device_count()} x {name}, {with_prefix(memory)}B each"
    else:
        yield f"  no CUDA device: everything runs on {machine['processors']} processors"
    rates = {dtype: product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    speeds = (f"{str(dtype).removeprefix('torch.')} {with_prefix(rate)}FLOP/s" for dtype, rate in rates.items())
    yield f"  products: {', '.join(speeds)}"
    if machine["packages"]["simplejpeg"] is None:
        yield "  simplejpeg is not installed: JPEGs decode a fifth slower (pip install 'troodon[fast]')"
    yield _describe_cache()


def empty() -> Iterator[str]:
    """Empty the cache of remote images; lines to print."""
    from troodon.images import files

    yield f"emptied:{_describe_cache()}"
    files.empty_cache()


def _describe_cache() -> str:
    from troodon.images import files

    count, size = files.cache_usage()
    return f"  cache of remote images: {files.cache_folder()}, {with_prefix(size)}B in {plural(count, 'file')}"
