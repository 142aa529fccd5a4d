"""What this machine can do, and what is missing."""

from collections.abc import Iterator

from troodon.run import environment


def examine() -> Iterator[str]:
    """Lines for people: versions, devices, precision, optional parts."""
    import torch

    from troodon import dist
    from troodon.learn.plan import people, product_rate

    found = environment()
    yield f"troodon {found['troodon']}, Python {found['python']}, {found['platform']}"
    yield "  " + ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    device = dist.device()
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device).total_memory
        yield f"  {torch.cuda.device_count()} x {name}, {people(memory)}B each"
    else:
        yield f"  no CUDA device: everything runs on {found['processors']} processors"
    rates = {dtype: product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    yield "  products: " + ", ".join(f"{str(d).removeprefix('torch.')} {people(r)}FLOP/s" for d, r in rates.items())
    if found["packages"]["simplejpeg"] is None:
        yield "  simplejpeg is not installed: JPEGs decode a fifth slower (pip install 'troodon[fast]')"
